"""Adapters on dense bases through the real engine: a kill, an export, the runtime, and every dense family."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from inference.engine import LLM
from lora.format import apply_adapter, load_adapter
from moe.family_table import DENSE
from trainer import export
from trainer.drill import judge
from trainer.faults import KillSpec
from trainer.tokenizer import byte_tokenizer, save_tokenizer

pytestmark = [pytest.mark.drill, pytest.mark.slow]
RECIPE = Path(__file__).parent / "dense.yaml"
SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 257, "max_position_embeddings": 64,
    "bos_token_id": None, "eos_token_id": 256, "initializer_range": 0.1,
}  # fmt: skip


@pytest.fixture(scope="module")
def base(folder):
    """Makes a folder of one dense family."""

    def make(family):
        out = folder / f"dense-{family}"
        if not out.exists():
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES)).save_pretrained(out)
            save_tokenizer(byte_tokenizer(), out)
        return out

    return make


@pytest.fixture(scope="module")
def trained(start, base):
    job = start("dense", [f"model.path={base('llama')}"], recipe=RECIPE)
    return job, job.finish()


def test_a_killed_run_ends_with_the_same_bits(trained, start, base):
    kill = KillSpec(rank=1, step=5, at="optimizer")
    job = start("dense-killed", [f"model.path={base('llama')}"], recipe=RECIPE, kill=str(kill))
    verdict = judge(job.recipe, kill, trained[1], job.finish())
    assert verdict.passed, verdict.problems
    assert verdict.tier == "memory"


def test_the_export_is_the_base_and_an_adapter_that_the_runtime_serves(trained, base, folder):
    job, rows = trained
    out = folder / "dense-exported"
    assert export.main(str(job.run_dir), str(out)) == 0
    assert (out / "model.safetensors").read_bytes() == (base("llama") / "model.safetensors").read_bytes()
    adapter = load_adapter(out / "adapter")
    assert all(float(t.abs().max()) > 0 for path, t in adapter.tensors.items() if path.endswith(".B"))
    ids = torch.randint(0, 256, (1, 24), generator=torch.Generator().manual_seed(0))
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    with torch.no_grad():
        plain = model(ids).logits[0]
        apply_adapter(model, adapter)
        want = model.eval()(ids).logits[0]
    served = LLM(str(out), adapter=str(out / "adapter"))
    torch.testing.assert_close(served.logits(ids[0].tolist()), want)
    torch.testing.assert_close(LLM(str(out)).logits(ids[0].tolist()), plain)
    assert (want - plain).norm() > 1e-3 * plain.norm()
    assert len(served.generate(["def "], 8)[0].token_ids) == 8
    heldout = [row["loss"] for row in rows if row["kind"] == "heldout"]
    assert heldout[-1] < heldout[0]


@pytest.mark.parametrize("family", sorted(set(DENSE) - {"llama"}))
def test_the_other_dense_families_train(family, start, base):
    job = start(f"dense-{family}-run", [f"model.path={base(family)}", "train.steps=2", "parallel.workers=1"],
                recipe=RECIPE)  # fmt: skip
    assert [row["step"] for row in job.finish() if row["kind"] == "done"] == [2]
