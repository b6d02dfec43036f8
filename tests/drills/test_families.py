"""The families that are least like the others, trained expert-parallel through DeepSpeed, killed, and exported."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from checkpointing.store import list_checkpoints
from trainer import export
from trainer.cli import main
from trainer.drill import judge
from trainer.faults import KillSpec

pytestmark = [pytest.mark.drill, pytest.mark.slow]

_SHAPE = (
    "hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, moe_intermediate_size: 16, num_experts: 4, "
    "num_experts_per_tok: 2, attention_dropout: 0.1, router_aux_loss_coef: 0.01"
)
_LATENT = (
    "n_shared_experts: 1, q_lora_rank: 12, kv_lora_rank: 12, qk_rope_head_dim: 8, qk_nope_head_dim: 8, v_head_dim: 8, "
    "first_k_dense_replace: 1, intermediate_size: 24, n_group: 2, topk_group: 1"
)
MODELS = {
    "mixtral": f"model={{family: mixtral, {_SHAPE}, num_key_value_heads: 1, tie_word_embeddings: true}}",
    "deepseek_v3": f"model={{family: deepseek_v3, {_SHAPE}, {_LATENT}}}",
    "gpt_oss": f"model={{family: gpt_oss, {_SHAPE}, num_key_value_heads: 1, sliding_window: 8}}",
}
KILLED = {"gpt_oss": KillSpec(rank=1, step=5, at="optimizer"), "deepseek_v3": KillSpec(rank=0, step=6, at="capture")}
STEPS = "train.steps=8"


@pytest.fixture(scope="module")
def finished(start):
    """Undisturbed runs, by family, each started when first asked for."""
    jobs = {}

    def run(family):
        if family not in jobs:
            jobs[family] = start(family, [MODELS[family], STEPS])
            jobs[family].finish()
        return jobs[family]

    return run


@pytest.mark.parametrize("family", sorted(MODELS))
def test_it_learns_and_its_export_is_the_trained_model_byte_for_byte(finished, family, tmp_path):
    job = finished(family)
    heldout = [row["loss"] for row in job.rows() if row["kind"] == "heldout"]
    assert heldout[-1] < heldout[0] - 0.05
    out = tmp_path / "out"
    assert export.main(str(job.run_dir), str(out)) == 0
    trained = export.trained_tensors(export.open_run(job.run_dir)[1])
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert model.config.model_type == family
    assert dict(model.named_parameters()).keys() == trained.keys()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, trained[name]), name


@pytest.mark.parametrize("family", sorted(KILLED))
def test_a_killed_run_ends_with_the_same_bits(finished, start, family):
    job = start(f"{family}-killed", [MODELS[family], STEPS], kill=str(KILLED[family]))
    verdict = judge(job.recipe, KILLED[family], finished(family).rows(), job.finish())
    assert verdict.passed, verdict.problems
    assert verdict.tier == "memory"


@pytest.mark.parametrize("family", sorted(MODELS))
def test_an_exported_folder_trains_on(finished, start, family, tmp_path):
    """A folder is read by two ranks, each its own experts; with a rate of nearly nothing it must come out as it was."""
    out, again = tmp_path / "out", tmp_path / "again"
    assert export.main(str(finished(family).run_dir), str(out)) == 0
    stored = load_file(out / "model.safetensors")
    for name, tensor in stored.items():
        if name.endswith("e_score_correction_bias"):
            tensor.copy_(torch.arange(len(tensor)) / 8)  # a new model's is zero, and would not be missed
    save_file(stored, out / "model.safetensors", metadata={"format": "pt"})
    job = start(
        f"{family}-again",
        [f"model={{path: {out}}}", "data.tokenizer={kind: model}", "train.steps=1", "train.lr=1e-30",
         "train.warmup_steps=0", "train.weight_decay=0"],
    )  # fmt: skip
    job.finish()
    assert list_checkpoints(job.run_dir / "checkpoints")
    assert export.main(str(job.run_dir), str(again)) == 0
    exported = load_file(again / "model.safetensors")
    assert exported.keys() == stored.keys()
    for name, tensor in stored.items():
        assert torch.equal(exported[name].view(torch.uint8), tensor.view(torch.uint8)), name


@pytest.mark.parametrize("family", sorted(KILLED))
def test_deepspeeds_engine_loads_an_export_and_its_own_save_comes_back(finished, run_layout_workers, family, tmp_path):
    """Expert biases are files of their own there, and the correction bias is among the weights."""
    exported, saved, dump = tmp_path / "exported", tmp_path / "saved", tmp_path / "dump"
    run = finished(family).run_dir
    assert main(["checkpoint", "export", str(run), str(exported), "--deepspeed"]) == 0
    kept = "checkpoint={mode: dense, memory: {enabled: false}, disk: {every: 0, final: false}}"
    overrides = [MODELS[family], "train.steps=1", "train.warmup_steps=0", kept]
    run_layout_workers(f"{family}-deepspeed", overrides, 2, "deepspeed", dump, exported, saved)
    trained = export.trained_tensors(export.open_run(run)[1])
    for rank in range(2):
        for path, weight in torch.load(dump / "loaded" / f"{rank}.pt")["weights"].items():
            mine = trained[path].chunk(2)[rank] if ".experts." in path else trained[path]
            assert torch.equal(weight, mine), path
    back = tmp_path / "back"
    assert main(["checkpoint", "import", str(saved), str(back)]) == 0
    assert main(["checkpoint", "verify", str(back)]) == 0
