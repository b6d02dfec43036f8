"""What each checkpoint mode would cost a recipe's run, in the words of the plan card (no torch here).

Bandwidths and step times are those that an earlier attempt of the run wrote to its events, or assumptions, named as
such.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

from checkpointing.cost import (
    Bandwidths,
    BudgetError,
    Partition,
    StepTimes,
    budget_share,
    choose_interval,
    choose_rotation,
    dense_cost,
    disk_interval,
    figures,
    seconds,
)
from checkpointing.moments import state_width
from checkpointing.partial import PecSchedule, SparsePartition, choose_k
from checkpointing.plt import Limits, Meter, decide, expected_loss
from trainer.schema import Recipe

_GIB = 1 << 30
_UNLIMITED = 1 << 62
# Assumed where nothing was measured, bytes and floating-point operations per second and worker.
_CPU = Bandwidths(device_to_host=None, host_copy=5e9, hash=10e9, disk=0.5e9)
_GPU = Bandwidths(device_to_host=50e9, host_copy=10e9, hash=20e9, disk=1e9, device_sums=True)
_CPU_FLOPS, _GPU_FLOPS = 25e9, 50e12
_FORWARD_BACKWARD = 0.9  # of a step, assumed
_WARM = 5  # steps of an attempt that are not yet typical


@dataclass(frozen=True)
class Share:
    """What one worker keeps and does.

    Attributes:
        parameters: that train, of its optimizer partition; ``experts`` of these are experts'.
        num_experts: routed experts of each layer; ``moe_layers`` layers have some.
        active: parameters of the model that one token uses.
        top_k: experts per token.
    """

    parameters: int
    experts: int
    num_experts: int
    moe_layers: int
    active: int
    top_k: int


@dataclass(frozen=True)
class Basis:
    """What the predictions rest on; ``note`` says where it comes from."""

    rates: Bandwidths
    times: StepTimes
    note: str


def basis_of(recipe: Recipe, share: Share, events: Iterable[Mapping[str, Any]] = ()) -> Basis:
    """From the rows of an earlier attempt of this run where they say, else assumed."""
    rows = list(events)
    gpu = recipe.parallel.device == "cuda"
    rates, times = _measured_rates(rows), _measured_times(rows)
    which = [name for name, found in (("bandwidth", rates), ("step time", times)) if found is None]
    note = f"assumed {' and '.join(which)}" if which else "measured in this run"
    if times is None:
        # 2 operations per parameter and token forward, 4 backward.
        tokens = recipe.train.global_batch_size * recipe.data.sequence_length / recipe.parallel.workers
        forward_backward = 6 * share.active * tokens / (_GPU_FLOPS if gpu else _CPU_FLOPS)
        times = StepTimes(forward_backward / _FORWARD_BACKWARD, forward_backward)
    return Basis(rates or (_GPU if gpu else _CPU), times, note)


def _measured_rates(rows: list[Mapping[str, Any]]) -> Bandwidths | None:
    """The last row of kind ``bandwidth``."""
    for row in reversed(rows):
        if row.get("kind") == "bandwidth":
            return Bandwidths(
                device_to_host=row["device_to_host"],
                host_copy=row["host_copy"],
                hash=row["hash"],
                disk=row.get("disk"),
                device_sums=bool(row.get("device_sums")),
            )
    return None


def _measured_times(rows: list[Mapping[str, Any]]) -> StepTimes | None:
    """Medians over the steps of rank 0, each from its ``step`` row and the ``optimizer`` row before it, or when its
    gradients were there if it says so: a GPU comes to the update later than the host that queues it."""
    began: dict[tuple[int, int], float] = {}
    steps: list[tuple[float, float]] = []
    for row in rows:
        key = (row.get("attempt", 0), row.get("step") or 0)
        if row.get("rank") == 0 and row.get("kind") == "optimizer":
            began[key] = row["time"]
        elif row.get("rank") == 0 and row.get("kind") == "step" and key in began:
            whole = row["seconds"] - row.get("stall_copied_s", 0.0)
            steps.append((whole, whole - (row["time"] - (row.get("gradients_there") or began[key]))))
    typical = [pair for pair in steps[_WARM:] if 0 < pair[1] <= pair[0]]
    if not typical:
        return None
    whole = median(pair[0] for pair in typical)
    return StepTimes(whole, min(whole, median(pair[1] for pair in typical)))


def budget_of(recipe: Recipe, available: int | None, local_workers: int | None = None) -> int:
    """Bytes for each worker of a machine.

    Args:
        available: free memory of that machine; None if it is not known, which sets no limit.
        local_workers: how many share it; by default all of the recipe's.
    """
    gib, workers = recipe.checkpoint.memory.budget_gib, local_workers or recipe.parallel.workers
    if gib != "auto":
        return int(gib * _GIB) // workers
    return _UNLIMITED if available is None else budget_share(available, workers)


def mode_rows(recipe: Recipe, share: Share, basis: Basis, budget: int) -> list[tuple[str, str]]:
    """One row for each mode; the recipe's own is marked.

    Raises BudgetError if the recipe's own does not fit a budget that it sets itself.
    """
    chosen = recipe.checkpoint.mode
    times, rates = basis.times, basis.rates
    link, disk = rates.capture / 1e9, recipe.checkpoint.disk
    hashed = "hashed by the GPU" if rates.device_sums else f"{rates.hash / 1e9:.3g} GB/s hashed"
    rows = [
        (
            "capture",
            f"per worker, at {link:.3g} GB/s copied, {hashed}, a step of "
            f"{seconds(times.step)} ({seconds(times.forward_backward)} forward and backward): {basis.note}",
        )
    ]
    for mode, describe in (("wal", _wal), ("dense", _dense), ("pec", _pec)):
        try:
            text = describe(recipe, share, basis, budget)
        except BudgetError as error:
            if mode == chosen and recipe.checkpoint.memory.budget_gib != "auto":
                raise
            text = f"does not fit here: {error}"
        rows.append((f"{'*' if mode == chosen else ' '} {mode}", text))
    if disk.every and rates.disk:
        partition = Partition(share.parameters, state_width=state_width(recipe.train.optimizer))
        least = disk_interval(partition, times, rates.disk)
        written = f"at {rates.disk / 1e9:.3g} GB/s a checkpoint takes {seconds(partition.state_bytes / rates.disk)}"
        late = f", {least} steps: it delays the next one, due after {disk.every}" if least > disk.every else ""
        rows.append(("  disk", written + late))
    return rows


def _wal(recipe: Recipe, share: Share, basis: Basis, budget: int) -> str:
    disk = recipe.checkpoint.disk
    partition = Partition(
        share.parameters,
        _gradient_bytes(recipe),
        disk.every > 0 or disk.final,
        state_width(recipe.train.optimizer),
    )
    fixed = recipe.checkpoint.wal.rotation if recipe.checkpoint.mode == "wal" else "auto"
    schedule = choose_rotation(
        partition, basis.times, basis.rates, budget, fixed=None if fixed == "auto" else int(fixed)
    )
    return f"{schedule.reason}; exact"


def _dense(recipe: Recipe, share: Share, basis: Basis, budget: int) -> str:
    width = state_width(recipe.train.optimizer)
    partition = Partition(share.parameters, disk=recipe.checkpoint.disk.every > 0, state_width=width)
    schedule = choose_interval(partition, basis.times, basis.rates, budget)
    if recipe.checkpoint.mode != "dense":
        return f"{schedule.reason}; exact"
    every = recipe.checkpoint.memory.every
    cost = dense_cost(partition, every, basis.times, basis.rates)
    return f"every {every} steps, as the recipe says: {figures(cost)}; exact; within 3.5 % from every {schedule.every}"


def _pec(recipe: Recipe, share: Share, basis: Basis, budget: int) -> str:
    if not share.experts or share.num_experts < 2:
        return "not for this run: no routed experts train"
    steps, pec, every = recipe.train.steps, recipe.checkpoint.pec, recipe.checkpoint.memory.every
    schedule = pec_schedule(recipe, share, basis, budget)
    routed = recipe.train.global_batch_size * recipe.data.sequence_length * share.top_k * steps
    limits = Limits(routed, steps, pec.max_plt, pec.dynamic_k, pec.fallback)
    meter = Meter.new(range(share.moe_layers), share.num_experts, schedule.k)
    decision = decide(meter, limits, first_k=schedule.k, every=every)
    lost = expected_loss(schedule.k, share.num_experts, every, steps)
    text = f"{schedule.reason}; a fault loses {lost:.2%} of the tokens, max_plt is {pec.max_plt:.2%}"
    return text if decision.mode is None and decision.k == schedule.k else f"{text}, so at once: {decision.reason}"


def pec_schedule(recipe: Recipe, share: Share, basis: Basis, budget: int) -> PecSchedule:
    """Mode ``pec`` with the recipe's K or the best. Raises BudgetError as :func:`checkpointing.partial.choose_k`."""
    checkpoint = recipe.checkpoint
    partition = SparsePartition(
        share.parameters - share.experts,
        share.experts,
        share.num_experts,
        checkpoint.disk.every > 0,
        state_width(recipe.train.optimizer),
    )
    fixed = None if checkpoint.pec.k_snapshot == "auto" else checkpoint.pec.k_snapshot
    return choose_k(partition, checkpoint.memory.every, basis.times, basis.rates, budget, fixed=fixed)


def _gradient_bytes(recipe: Recipe) -> int:
    half = recipe.parallel.dtype == "bf16" or (recipe.parallel.dtype == "auto" and recipe.parallel.device == "cuda")
    return 2 if half else 4
