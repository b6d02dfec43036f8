"""Routing that draws random numbers and drops tokens, balanced by a bias and a global-batch loss, survives kills."""

import pytest
import torch

from checkpointing.store import Checkpoint, list_checkpoints
from moe.bias import EXTRA, biases
from trainer import export

pytestmark = [pytest.mark.drill, pytest.mark.slow]

BALANCED = [
    "model.router_aux_loss_coef=0",
    "routing={method: top_k, jitter: 0.1, capacity_factor: 1.1}",
    "balance={aux_loss: global_batch, aux_loss_coef: 0.01, z_loss_coef: 0.001, bias_update_rate: 0.01}",
]


def final_hash(rows):
    return next(row["state_hash"] for row in rows if row["kind"] == "done")


@pytest.fixture(scope="module")
def calm(start):
    return start("balanced", BALANCED).finish()


def test_a_killed_run_ends_with_the_same_biases_and_bits(start, calm, folder):
    kills = "rank=1,step=4,at=forward;rank=0,step=7,at=optimizer;rank=1,step=10,at=capture"
    rows = start("balanced-killed", BALANCED, kill=kills).finish()
    assert sum(row["kind"] == "kill" for row in rows) == 3
    assert final_hash(rows) == final_hash(calm)
    blobs = [
        extras_of(folder / name, rank) for name in ("balanced", "balanced-killed") for rank in ("dp0000", "dp0001")
    ]
    assert len(set(blobs)) == 1
    moved = biases(blobs[0], 4)
    assert moved.any()
    assert float(moved.abs().max()) <= 0.12 + 1e-6  # twelve steps of 0.01


def extras_of(run, coordinate):
    _, newest = list_checkpoints(run / "checkpoints")[-1]
    return Checkpoint.open(newest).extras(coordinate)[EXTRA]


def test_a_run_begins_with_the_biases_of_another_layout(start, calm, folder):
    alone = ["parallel.workers=1", "parallel.ep=1", f"checkpoint.load_from={folder / 'balanced'}"]
    job = start("balanced-alone", [*BALANCED, *alone, "train.steps=13"])
    job.finish()
    before, after = extras_of(folder / "balanced", "dp0000"), extras_of(folder / "balanced-alone", "dp0000")
    step = (biases(after, 4) - biases(before, 4)).abs()
    assert torch.all((step < 1e-6) | ((step - 0.01).abs() < 1e-6))
    assert step.any()
    plain = start("balanced-lost", [*alone, "train.steps=13"])
    assert plain.wait() == 2
    assert "set balance.bias_update_rate as it was" in plain.output.read_text()


def test_export_refuses_what_transformers_cannot_do_until_told_to(calm, folder, capsys):
    run, out = folder / "balanced", folder / "balanced-export"
    with pytest.raises(export.ExportError, match="qwen3_moe in transformers has no selection bias"):
        export.main(str(run), str(out))
    assert not out.exists()
    assert export.main(str(run), str(out), inexact=True) == 0
    assert "the exported model computes something else" in capsys.readouterr().out
