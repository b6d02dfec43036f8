"""New experts beside frozen ones through the real engine: weight decay, accumulation, ZeRO-2, a kill, an export."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from checkpointing.store import Checkpoint, list_checkpoints
from moe.extend import Extension, extend
from trainer import export
from trainer.drill import judge
from trainer.faults import KillSpec

pytestmark = [pytest.mark.drill, pytest.mark.slow]


@pytest.fixture(scope="module")
def base(undisturbed, folder):
    assert export.main(str(folder / "undisturbed"), str(folder / "to-extend")) == 0
    assert extend(folder / "to-extend", folder / "extended", Extension(4)) == 4
    return folder / "extended"


@pytest.fixture(scope="module")
def trained(start, base):
    job = start("extended-run", settings(base))
    return job, job.finish()


def settings(base):
    return [
        f"model={{path: {base}, attention_dropout: 0.1, router_aux_loss_coef: 0.01, frozen_experts: 4}}",
        "data.tokenizer={kind: model}", 'data.include=["email/*.py"]', "parallel.ep=1", "train.weight_decay=0.5",
    ]  # fmt: skip


def test_frozen_slices_keep_every_bit_and_the_others_train(trained, base, folder):
    job, rows = trained
    assert export.main(str(job.run_dir), str(folder / "extended-out")) == 0
    models = (AutoModelForCausalLM.from_pretrained(p, dtype=torch.float32) for p in (base, folder / "extended-out"))
    before, after = (dict(model.named_parameters()) for model in models)
    assert before.keys() == after.keys()
    for name, was in before.items():
        now = after[name]
        if ".experts." in name:
            assert torch.equal(now[:4], was[:4]), name
            assert all((now[e] != was[e]).any() for e in range(4, 8)), name
        elif name.endswith("mlp.gate.weight"):
            assert (now != was).any(), name
        else:
            assert torch.equal(now, was), name
    heldout = [row["loss"] for row in rows if row["kind"] == "heldout"]
    assert heldout[-1] < heldout[0]


def test_checkpoints_hold_what_trains_and_nothing_else(trained):
    _, folder = list_checkpoints(trained[0].run_dir / "checkpoints")[-1]
    tensors = Checkpoint.open(folder).manifest["tensors"]
    assert {fact["expert"] for fact in tensors.values()} == {None, 4, 5, 6, 7}
    assert {f["param"].rpartition("mlp.")[2] for f in tensors.values() if f["expert"] is None} == {"gate.weight"}


def test_a_kill_costs_no_bit(start, trained, base):
    kill = KillSpec(1, 7, "optimizer")
    job = start("extended-killed", settings(base), kill=str(kill))
    verdict = judge(job.recipe, kill, trained[1], job.finish())
    assert verdict.passed, verdict.problems
