"""All workers choose one rotation, and later attempts keep it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from checkpointing.cost import BudgetError, Partition, wal_memory
from tests.forked import run_ranks
from trainer.events import EventLog, read_events
from trainer.recipe import load_recipe
from trainer.rendezvous import Process
from trainer.rotation import settle
from trainer.schema import Recipe

QUICKSTART = Path(__file__).resolve().parents[2] / "recipes" / "quickstart.yaml"
WAL = ["checkpoint.mode=wal", "parallel.workers=1", "parallel.ep=1"]


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


def settle_on_a_rank(rank: int, world: int, folder: Path) -> None:
    process = Process(rank, world, rank, torch.device("cpu"))
    recipe = load_recipe(QUICKSTART, ["checkpoint.mode=wal"])
    with EventLog(folder, rank, 0) as events:
        chosen = settle(recipe, process, folder, events, Partition(10**6, 4))
    (folder / f"{rank}.json").write_text(json.dumps(chosen))


def test_two_ranks_agree(tmp_path: Path) -> None:
    run_ranks(settle_on_a_rank, tmp_path, tmp_path)
    chosen = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert chosen[0] == chosen[1]
    rows = [row for row in read_events(tmp_path) if row["kind"] == "schedule"]
    assert [(row["rank"], row["rotation"]) for row in rows] == [(0, chosen[0])]
