"""The rotation of mode ``wal`` and the experts per capture of ``pec``, settled once at a run's start from what this
machine can do."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from checkpointing.bandwidth import keeper_hashers, measure
from checkpointing.cost import Bandwidths, Partition, choose_rotation
from checkpointing.keeper.memory import available_bytes
from checkpointing.record_sums import has_device_sums
from trainer.events import EventLog, read_events
from trainer.mode_plan import Basis, basis_of, budget_of, pec_schedule
from trainer.plan import plan_run
from trainer.rendezvous import Process
from trainer.schema import Recipe


def settle(recipe: Recipe, process: Process, run_dir: Path, events: EventLog, partition: Partition) -> int:
    """The recipe's rotation, the one this run began with, or the best for its memory and bandwidth. A collective.

    All workers measure at once, since they share a machine; rank 0 decides for all with the slowest figures, and writes
    events ``bandwidth`` and ``schedule``. Raises cost.BudgetError, on every rank, if nothing fits the memory budget.
    """

    def choose(basis: Basis, budget: int) -> tuple[int, str]:
        schedule = choose_rotation(partition, basis.times, basis.rates, budget)
        return schedule.rotation, schedule.reason

    return _settled("rotation", recipe.checkpoint.wal.rotation, choose, recipe, process, run_dir, events)


def settle_k(recipe: Recipe, process: Process, run_dir: Path, events: EventLog) -> int:
    """The recipe's ``pec.k_snapshot``, or what this run began with, or the most that hide. As :func:`settle`."""

    def choose(basis: Basis, budget: int) -> tuple[int, str]:
        schedule = pec_schedule(recipe, plan_run(recipe).share, basis, budget)
        return schedule.k, schedule.reason

    return _settled("k", recipe.checkpoint.pec.k_snapshot, choose, recipe, process, run_dir, events)


def _settled(
    name: str,
    fixed: int | str,
    choose: Callable[[Basis, int], tuple[int, str]],
    recipe: Recipe,
    process: Process,
    run_dir: Path,
    events: EventLog,
) -> int:
    # What the recipe leaves open is known by now, and a GPU's steps are not a CPU's.
    recipe = replace(recipe, parallel=replace(recipe.parallel, device=process.device.type))
    known: list[Any] = [None]
    if process.rank == 0:
        kept = [row[name] for row in read_events(run_dir) if row["kind"] == "schedule" and row.get(name)]
        known = [fixed if fixed != "auto" else kept[-1] if kept else None]
    dist.broadcast_object_list(known, src=0)
    if known[0] is not None:
        return int(known[0])
    outcome: list[Any] = [None]
    rates = _slowest(process)
    if process.rank == 0:
        try:
            basis = basis_of(recipe, plan_run(recipe).share)
            basis = type(basis)(rates, basis.times, basis.note)
            chosen, reason = choose(basis, budget_of(recipe, available_bytes()))
            events.write("bandwidth", **vars(rates))
            events.write("schedule", **{name: chosen}, reason=reason)
            print(f"checkpoints: {reason}", flush=True)
            outcome = [chosen]
        except ValueError as error:
            outcome = [error]
    dist.broadcast_object_list(outcome, src=0)
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return int(outcome[0])


def _slowest(process: Process) -> Bandwidths:
    """What every worker can count on."""
    threads = keeper_hashers(max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    mine = measure(threads, nbytes=32 << 20, device_to_host=_device_copy if process.device.type == "cuda" else None)
    mine = replace(mine, device_sums=has_device_sums(process.device))
    everyone: list[Any] = [None] * process.world
    dist.all_gather_object(everyone, mine)
    return Bandwidths(
        None if mine.device_to_host is None else min(rates.device_to_host for rates in everyone),
        min(rates.host_copy for rates in everyone),
        min(rates.hash for rates in everyone),
        device_sums=all(rates.device_sums for rates in everyone),
    )


def _device_copy(nbytes: int) -> float:
    source = torch.empty(nbytes, dtype=torch.uint8, device="cuda")
    target = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    torch.cuda.synchronize()
    began = time.perf_counter()
    target.copy_(source, non_blocking=True)
    torch.cuda.synchronize()
    return time.perf_counter() - began
