"""Multi-token prediction modules under EP, accumulation and a real kill: kept by checkpoints, left out by export."""

from __future__ import annotations

import pytest
from transformers import AutoModelForCausalLM

from checkpointing.store import Checkpoint, list_checkpoints
from moe.mtp import PREFIX
from trainer import export
from trainer.drill import judge
from trainer.faults import KillSpec

pytestmark = [pytest.mark.drill, pytest.mark.slow]

SETTINGS = ["train.mtp={depth: 2, weight: 0.3}"]


@pytest.fixture(scope="module")
def undisturbed_mtp(start):
    job = start("mtp", SETTINGS)
    return job, job.finish()


def test_a_kill_costs_no_bit_and_at_most_one_step(start, undisturbed_mtp):
    kill = KillSpec(1, 7, "optimizer")
    job = start("mtp-killed", SETTINGS, kill=str(kill))
    verdict = judge(job.recipe, kill, undisturbed_mtp[1], job.finish())
    assert verdict.passed, verdict.problems
    assert verdict.steps_lost <= 1


def test_checkpoints_keep_the_modules_and_exports_leave_them_out(undisturbed_mtp, tmp_path, capsys):
    job, rows = undisturbed_mtp
    _, folder = list_checkpoints(job.run_dir / "checkpoints")[-1]
    kept = {fact["param"] for fact in Checkpoint.open(folder).manifest["tensors"].values()}
    assert {f"{PREFIX}{layer}.block.mlp.experts.down_proj" for layer in (2, 3)} <= kept
    assert f"{PREFIX}3.projection.weight" in kept
    assert export.main(str(job.run_dir), str(tmp_path / "out")) == 0
    assert "left out" in capsys.readouterr().out
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert [name for name in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[name]] == []
    trained = [row["loss"] for row in rows if row["kind"] == "step"]
    heldout = [row["loss"] for row in rows if row["kind"] == "heldout"]
    # Early in training every module's loss is about the model's own: 1.3 times it in training, once in evaluation.
    assert trained[0] == pytest.approx(1.3 * heldout[0], rel=0.05)
    assert heldout[-1] < heldout[0]
