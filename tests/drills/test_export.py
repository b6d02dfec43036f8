"""What leaves a run: Hugging Face folders and adapters, checked against the run and against other tools."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from checkpointing.store import list_checkpoints
from inference.engine import LLM
from lora.format import load_adapter
from tests.forked import run_planaria
from trainer import data, export
from trainer.drill import judge
from trainer.faults import KillSpec
from trainer.recipe import load_recipe

pytestmark = [pytest.mark.drill, pytest.mark.slow]
LORA = Path(__file__).parent / "lora.yaml"
ONLY_EXPERTS = "adapter={experts: {preset: expert-lora, r: 4, alpha: 8}}"


@pytest.fixture(scope="module")
def exported(undisturbed, folder):
    out = folder / "exported"
    assert export.main(str(folder / "undisturbed"), str(out)) == 0
    return out


@pytest.fixture(scope="module")
def tuned(start, exported):
    """Two adapter runs on the same base: with both banks, and with the expert bank alone."""
    both = start("lora", [f"model.path={exported}"], recipe=LORA)
    both.finish()
    experts = start("lora-experts", [f"model.path={exported}", ONLY_EXPERTS], recipe=LORA)
    experts.finish()
    return both, experts


def relative(got, want):
    return float((got - want).norm() / want.norm())


def test_the_exported_model_is_the_trained_one_byte_for_byte(exported, folder):
    _recipe, checkpoint = export.open_run(folder / "undisturbed")
    trained = export.trained_tensors(checkpoint)
    loaded = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32).state_dict()
    assert loaded.keys() == trained.keys()
    for name, tensor in trained.items():
        assert torch.equal(loaded[name], tensor), name
    on_disk = load_file(next(exported.glob("*.safetensors")))
    gate_rows = trained["model.layers.1.mlp.experts.gate_up_proj"][3, :16]
    assert torch.equal(on_disk["model.layers.1.mlp.experts.3.gate_proj.weight"], gate_rows)


def test_transformers_finds_the_loss_that_training_reported(exported, undisturbed, folder):
    recipe = load_recipe(folder / "undisturbed" / "recipe.yaml")
    bundle = data.load(recipe, rank=1)
    model = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    rows = torch.stack([torch.from_numpy(bundle.heldout[i]) for i in range(4)])
    with torch.no_grad():
        losses = [float(model(input_ids=row[None], labels=row[None]).loss) for row in rows]
    reported = [row["loss"] for row in undisturbed if row["kind"] == "heldout"][-1]
    assert np.mean(losses) == pytest.approx(reported, rel=1e-5)


def test_the_tokenizer_comes_along(exported):
    tokenizer = AutoTokenizer.from_pretrained(exported)
    assert tokenizer.decode(tokenizer("def f(x):\n    return x")["input_ids"]) == "def f(x):\n    return x"


def test_the_runtime_serves_the_export_with_its_adapter(tuned, folder):
    both, _ = tuned
    out = folder / "lora-exported"
    assert export.main(str(both.run_dir), str(out)) == 0
    adapter = load_adapter(out / "adapter")
    assert all(float(t.abs().max()) > 0 for name, t in adapter.tensors.items() if name.endswith(".B"))
    with_adapter = [LLM(str(out), b, str(out / "adapter")).generate(["def "], 24)[0].token_ids for b in (0, 0.5, 1)]
    assert with_adapter[0] == with_adapter[1] == with_adapter[2]
    plain = LLM(str(out), 1.0).logits([1, 2, 3])
    assert relative(LLM(str(out), 1.0, str(out / "adapter")).logits([1, 2, 3]), plain) > 1e-3


def test_peft_loads_a_trained_expert_adapter_with_equal_logits(tuned, folder):
    peft = pytest.importorskip("peft")
    _, experts = tuned
    out = folder / "lora-experts-exported"
    assert export.main(str(experts.run_dir), str(out)) == 0
    base = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, out / "adapter").eval()
    ids = torch.randint(0, 256, (1, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = model(input_ids=ids).logits[0]
    ours = LLM(str(out), 0.5, str(out / "adapter")).logits(ids[0].tolist())
    assert relative(ours, theirs) <= 1e-5


def test_a_killed_adapter_run_ends_with_the_same_bits(tuned, start, exported):
    kill = KillSpec(rank=1, step=5, at="optimizer")
    both, _ = tuned
    job = start("lora-killed", [f"model.path={exported}"], recipe=LORA, kill=str(kill))
    verdict = judge(job.recipe, kill, both.rows(), job.finish())
    assert verdict.passed, verdict.problems
    assert verdict.tier == "memory"


def test_a_run_that_cannot_be_exported_says_why(exported, folder, tmp_path):
    taken = run_planaria("export", folder / "undisturbed", exported)
    assert (taken.returncode, "not empty" in taken.stderr) == (2, True)
    nothing = run_planaria("export", tmp_path, tmp_path / "out")
    assert (nothing.returncode, "recipe.yaml" in nothing.stderr) == (2, True)
    assert "Traceback" not in taken.stderr + nothing.stderr


def test_a_damaged_checkpoint_is_not_exported(undisturbed, folder, tmp_path):
    run = tmp_path / "damaged"
    shutil.copytree(folder / "undisturbed", run)
    for _step, checkpoint in list_checkpoints(run / "checkpoints"):
        file = checkpoint / "dp0001.safetensors"
        blob = bytearray(file.read_bytes())
        blob[-5000] ^= 1
        file.write_bytes(blob)
    done = run_planaria("export", run, tmp_path / "out")
    assert done.returncode == 2
    assert "dp0001.safetensors" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
