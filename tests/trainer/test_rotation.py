"""All workers choose one rotation, and later attempts keep it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from checkpointing.cost import BudgetError, Partition, wal_memory
from trainer.events import EventLog, read_events
from trainer.launch import worker_environment
from trainer.recipe import load_recipe
from trainer.rendezvous import Process
from trainer.rotation import settle
from trainer.schema import Recipe

QUICKSTART = Path(__file__).resolve().parents[2] / "recipes" / "quickstart.yaml"
WAL = ["checkpoint.mode=wal", "parallel.workers=1", "parallel.ep=1"]

TWO_RANKS = """
import json, os, sys
import torch.distributed as dist
from pathlib import Path
from checkpointing.cost import Partition
from trainer.events import EventLog
from trainer.recipe import load_recipe
from trainer.rendezvous import join
from trainer.rotation import settle
process = join("cpu")
folder = Path(sys.argv[1])
recipe = load_recipe(sys.argv[2], ["checkpoint.mode=wal"])
events = EventLog(folder, process.rank, 0)
chosen = settle(recipe, process, folder, events, Partition(10**6, 4))
(folder / f"{process.rank}.json").write_text(json.dumps(chosen))
dist.barrier()
os._exit(0)  # gloo's threads end with the process
"""


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[Process]:
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield Process(0, 1, 0, torch.device("cpu"))
    dist.destroy_process_group()


def recipe_with(*overrides: str) -> Recipe:
    return load_recipe(QUICKSTART, [*WAL, *overrides])


def test_the_first_attempt_measures_and_later_ones_keep_its_rotation(alone: Process, tmp_path: Path) -> None:
    partition = Partition(10**5, 4)
    with EventLog(tmp_path, 0, 0) as events:
        first = settle(recipe_with(), alone, tmp_path, events, partition)
        rows = {row["kind"]: row for row in read_events(tmp_path)}
        assert rows["bandwidth"]["host_copy"] > 0
        assert rows["bandwidth"]["device_to_host"] is None
        assert rows["schedule"]["rotation"] == first
        assert "no limit binds" in rows["schedule"]["reason"]
        events.write("schedule", rotation=first + 3)  # as if it had measured otherwise
        assert settle(recipe_with(), alone, tmp_path, events, partition) == first + 3
        assert settle(recipe_with("checkpoint.wal.rotation=6"), alone, tmp_path, events, partition) == 6


def test_a_budget_is_kept(alone: Process, tmp_path: Path) -> None:
    partition = Partition(10**6, 4)
    least = min(wal_memory(partition, n) for n in range(2, 50)) / 2**30
    with EventLog(tmp_path, 0, 0) as events:
        chosen = settle(
            recipe_with(f"checkpoint.memory.budget_gib={least * 1.001}"), alone, tmp_path, events, partition
        )
        assert wal_memory(partition, chosen) <= least * 1.001 * 2**30
    with EventLog(tmp_path / "other", 0, 0) as events, pytest.raises(BudgetError, match="budget_gib"):
        settle(recipe_with(f"checkpoint.memory.budget_gib={least / 2}"), alone, tmp_path / "other", events, partition)


def test_two_ranks_agree(tmp_path: Path) -> None:
    script = tmp_path / "rank.py"
    script.write_text(TWO_RANKS)
    worker = [str(script), str(tmp_path), str(QUICKSTART)]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=0"]
    command = [sys.executable, *torchrun, *worker]
    environment = {**worker_environment(2), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(QUICKSTART.parents[1])}
    done = subprocess.run(command, env=environment, timeout=120, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    chosen = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert chosen[0] == chosen[1]
    rows = [row for row in read_events(tmp_path) if row["kind"] == "schedule"]
    assert [(row["rank"], row["rotation"]) for row in rows] == [(0, chosen[0])]
