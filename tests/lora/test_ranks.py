"""Two real DeepSpeed ranks train one adapter as a single process does, and see a cut-off one together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lora.attach import attach
from lora.config import BankConfig
from lora.format import collect_adapter, save_adapter
from moe.convert import convert

BANKS = {
    "e": BankConfig("expert-lora", r=4, alpha=8.0),
    "a": BankConfig("mola", r=2, alpha=4.0, num_experts=4, top_k=2),
}


def run_ranks(folder: Path, world: int = 2) -> None:
    script = Path(__file__).with_name("train_ranks.py")
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(world)}
    logs = [open(folder / f"log-{rank}", "w") for rank in range(world)]  # noqa: SIM115 - closed below
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), str(folder)],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=logs[rank],
            stderr=subprocess.STDOUT,
            cwd=root,
        )
        for rank in range(world)
    ]
    try:
        codes = [process.wait(timeout=120) for process in ranks]
    finally:
        for process, log in zip(ranks, logs, strict=True):
            process.kill()
            process.wait()
            log.close()
    assert codes == [0] * world, "\n".join((folder / f"log-{r}").read_text()[-3000:] for r in range(world))


@dataclass(frozen=True)
class Runs:
    folder: Path
    start: dict[str, Tensor]
    one_process: dict[str, Tensor]


@pytest.fixture(scope="module")
def runs(tiny_moe, tmp_path_factory) -> Runs:
    """The same three steps from B != 0, by one process and by two ranks under each ZeRO stage."""
    folder = tmp_path_factory.mktemp("ranks")
    model = tiny_moe()
    model.save_pretrained(folder / "base")
    attach(model, BANKS, convert(model))
    generator = torch.Generator().manual_seed(3)
    trained = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        for parameter in trained:
            parameter.normal_(0, 0.2, generator=generator)
    start = {path: tensor.clone() for path, tensor in collect_adapter(model).items()}
    save_adapter(folder / "adapter", start, BANKS, "")
    tokens_SBT = torch.randint(64, (3, 4, 16), generator=generator)
    torch.save(tokens_SBT, folder / "tokens.pt")
    run_ranks(folder)
    optimizer = torch.optim.SGD(trained, lr=0.2)
    for tokens_BT in tokens_SBT:
        optimizer.zero_grad()
        model(tokens_BT, labels=tokens_BT).loss.backward()
        optimizer.step()
    return Runs(folder, start, collect_adapter(model))


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
def test_two_ranks_train_the_adapter_of_one_process(runs, stage):
    parts = [torch.load(runs.folder / f"trained-{stage}-{rank}.pt") for rank in range(2)]
    for path, want in runs.one_process.items():
        pieces = [part[path] for part in parts]
        got = torch.cat(pieces) if ".experts." in path else pieces[0]
        moved = (want - runs.start[path]).norm()
        assert (got - want).norm() < 1e-4 * moved, path
        assert ".experts." in path or torch.equal(*pieces), path


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
def test_ranks_judge_a_cut_off_adapter_alike(runs, stage):
    results = [json.loads((runs.folder / f"result-{stage}-{rank}.json").read_text()) for rank in range(2)]
    assert results[0] == results[1]  # else one would raise and the other wait in the next collective
    assert results[0]["done"]
    error = results[0]["error"]
    assert all(f"L00.E00{e}.adapter.down_proj.B" in error for e in range(4, 8))
    assert not any(innocent in error for innocent in ("L00.E003", "gate_up_proj", "L01"))
