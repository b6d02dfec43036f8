"""What protecting a worker's state costs, and the schedule that follows: bandwidths, times and sizes in, a plan out.

Bytes are those of one worker's flat optimizer partition: 12 per parameter (fp32 master weight and AdamW's two moments;
8 with an optimizer of one moment) and, in a write-ahead log, the reduced gradient in 2 (bf16) or 4 (fp32) bytes. A
capture of step t is copied while step t + 1 runs forward and backward, and must be whole before its optimizer changes
the state, so that

    stall = max(0, T_copy - T_F&B)

where a device's log, which is there before the optimizer changes the state, is copied beside the optimizer already
(O_save of MoC-System, ASPLOS'25, arXiv 2408.04307; CheckFreq, FAST'21, pipelines the same way). The keeper hashes
what was copied; it may lag, but not for ever, so a step cannot be shorter than the hashing of what it captures. A GPU
takes nearly all checksums itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from checkpointing.moments import state_width

STATE_WIDTH = state_width("adamw")
SLACK = 3  # captures that may be under way beyond the committed step
MAX_OVERHEAD = 0.035  # of a step's time, CheckFreq's bound
_MAX_ROTATION = 256
_SAME = 0.001  # of a step's time: stalls closer than this are not worth memory
_MORE = 1.4  # times the memory and the seconds of a restore, for fewer bytes in every step
_RESTORE_S = 1.4  # a restore may take so long for the same, as predicted
_RESTORE_ON_DEVICE_S = 1.75  # in which registering 20 GB/s reads as much as 25 would in the other
_REGISTER = 20e9  # bytes per second, of a new process's slots: 17 to 26 in five runs on H100s

Binding = Literal["nothing", "budget", "link", "hash", "recipe"]


class BudgetError(ValueError):
    """Not even the smallest schedule fits; the message has the bytes needed and those available."""


@dataclass(frozen=True)
class Bandwidths:
    """Bytes per second, as measured with all workers of the machine busy.

    Attributes:
        device_to_host: None where state lies in host memory; captures then run at ``host_copy``.
        hash: of the keeper's checksums, all its threads together, as this worker's share.
        disk: written and synced, as this worker's share; None if it was not measured.
        device_sums: whether the device takes a capture's checksums; the keeper then reads hardly any of it.
    """

    device_to_host: float | None
    host_copy: float
    hash: float
    disk: float | None = None
    device_sums: bool = False

    def __post_init__(self) -> None:
        for name in ("device_to_host", "host_copy", "hash", "disk"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"bandwidth {name}={value} bytes/s must be more than 0; measure it again")

    @property
    def capture(self) -> float:
        return self.host_copy if self.device_to_host is None else self.device_to_host

    @property
    def restore(self) -> float:
        """Verified and copied back; for a device, while further slots are registered, which takes longest."""
        if self.device_to_host is None:
            return 1 / (1 / self.hash + 1 / self.host_copy)
        return min(_REGISTER, self.hash, self.device_to_host)


@dataclass(frozen=True)
class StepTimes:
    """Seconds of one undisturbed optimizer step, and of its forward and backward passes alone."""

    step: float
    forward_backward: float

    def __post_init__(self) -> None:
        if not 0 < self.forward_backward <= self.step:
            raise ValueError(f"forward and backward of {self.forward_backward} s do not fit a step of {self.step} s")

    @property
    def optimizer(self) -> float:
        """At most: it has the step's collectives, too."""
        return self.step - self.forward_backward


@dataclass(frozen=True)
class Partition:
    """One worker's share of what trains.

    Attributes:
        parameters: elements of its flat optimizer partitions.
        gradient_bytes: of one element in the log: 2 if bf16 holds it exactly, else 4.
        disk: whether checkpoints also go to disk during the run, which takes room for one more whole state.
        state_width: bytes of one element's master weight and moments.
    """

    parameters: int
    gradient_bytes: int = 2
    disk: bool = False
    state_width: int = STATE_WIDTH

    @property
    def state_bytes(self) -> int:
        return self.parameters * self.state_width


@dataclass(frozen=True)
class Cost:
    """What a schedule takes.

    Attributes:
        bytes_per_step: copied, mean over steps.
        memory_bytes: slots that the keeper must own for this worker.
        copy_s, hash_s: seconds for the bytes of one capture; hash_s is 0 where the device takes its checksums.
        stall_s: seconds per step that training waits, mean over steps.
        recovery_s: expected seconds to verify, copy back and redo, after the workers are there again.
        lost_s: expected seconds of work to be done again.
    """

    bytes_per_step: float
    memory_bytes: int
    copy_s: float
    hash_s: float
    stall_s: float
    recovery_s: float
    lost_s: float


@dataclass(frozen=True)
class WalSchedule:
    """``rotation``: steps in which every part of the state is captured once. ``binds``: which limit chose it."""

    rotation: int
    binds: Binding
    cost: Cost
    reason: str


@dataclass(frozen=True)
class DenseSchedule:
    """``every``: steps between whole captures. ``binds``: which limit chose it."""

    every: int
    binds: Binding
    cost: Cost
    reason: str


def budget_share(available_bytes: int, workers: int) -> int:
    """The budget of one of ``workers`` on a machine, if the recipe leaves it to us: half of what is free there."""
    return available_bytes // 2 // workers


def capture_cost(
    nbytes: float,
    memory: int,
    every: int,
    times: StepTimes,
    rates: Bandwidths,
    replay_bytes: float,
    redone: float,
    early_bytes: float = 0.0,
) -> Cost:
    """The cost of capturing ``nbytes`` every ``every`` steps.

    Args:
        memory: bytes of the slots.
        replay_bytes: verified and copied back at recovery.
        redone: optimizer steps done again at recovery.
        early_bytes: of the capture, copied while the optimizer still runs.
    """
    copy_s, hash_s = nbytes / rates.capture, 0.0 if rates.device_sums else nbytes / rates.hash
    early_s = min(early_bytes / rates.capture, times.optimizer)
    stall = max(0.0, copy_s - early_s - times.forward_backward, hash_s - every * times.step) / every
    recovery = replay_bytes / rates.restore + redone * times.optimizer
    # E[O_lost] = I/2 (MoC-System); a capture protects nothing until it is copied.
    lost = every * times.step / 2 + copy_s
    return Cost(nbytes / every, memory, copy_s, hash_s, stall, recovery, lost)


# -- write-ahead log ---------------------------------------------------------------------------------------------------


def wal_bytes_per_step(partition: Partition, rotation: int) -> float:
    """The log of one step and 1/rotation of the state."""
    return partition.parameters * (partition.gradient_bytes + partition.state_width / rotation)


def wal_memory(partition: Partition, rotation: int) -> int:
    """Bytes of all slots: the newest base of each part and the log since the oldest of them, each with slack."""
    bases = -(-partition.state_bytes * (rotation + SLACK) // rotation)
    whole = partition.state_bytes if partition.disk else 0
    return bases + whole + (rotation - 1 + SLACK) * partition.gradient_bytes * partition.parameters


def wal_cost(partition: Partition, rotation: int, times: StepTimes, rates: Bandwidths) -> Cost:
    log = partition.gradient_bytes * partition.parameters
    return capture_cost(
        wal_bytes_per_step(partition, rotation),
        wal_memory(partition, rotation),
        1,
        times,
        rates,
        partition.state_bytes + (rotation - 1) * log,
        rotation - 1,
        0 if rates.device_to_host is None else log,
    )


def choose_rotation(
    partition: Partition, times: StepTimes, rates: Bandwidths, budget: int, fixed: int | None = None
) -> WalSchedule:
    """The rotation with the smallest stall, and of those that differ by less than 0.1 % of a step the one that moves
    the fewest bytes in a step: copied and read again, they share the host's memory with whoever queues kernels, and the
    device's with its kernels; and a stall that is predicted from an assumed step time may come all the same. For that
    it may take two fifths more memory, and as much longer to restore or 1.4 s (1.75 on a device), than the one with the
    least; never more than ``budget`` bytes.

    Args:
        fixed: the recipe's rotation, which is kept or refused.

    Raises:
        BudgetError: the fixed rotation, or every one, needs more.
    """
    candidates = range(2, _MAX_ROTATION + 1) if fixed is None else [fixed]
    costs = {n: wal_cost(partition, n, times, rates) for n in candidates}
    fitting = {n: cost for n, cost in costs.items() if cost.memory_bytes <= budget}
    if not fitting:
        n, cost = min(costs.items(), key=lambda item: item[1].memory_bytes)
        what = "checkpoint.wal.rotation=" if fixed is not None else "mode wal at rotation "
        raise does_not_fit(f"{what}{n}", cost.memory_bytes, budget)
    enough_s = _RESTORE_S if rates.device_to_host is None else _RESTORE_ON_DEVICE_S
    n = _best(fitting, times, enough_s)
    cost = fitting[n]
    binds: Binding = "recipe" if fixed is not None else _what_binds(cost, times, costs[_best(costs, times, enough_s)])
    reason = f"rotation {n}, {_limits(binds, cost, budget)}: {figures(cost)}"
    return WalSchedule(n, binds, cost, reason)


def _best(costs: dict[int, Cost], times: StepTimes, enough_s: float) -> int:
    """``enough_s``: seconds to restore that are short enough."""
    least = min(cost.stall_s for cost in costs.values())
    same = {n: cost for n, cost in costs.items() if cost.stall_s <= least + _SAME * times.step}
    small = min(same.values(), key=lambda cost: cost.memory_bytes)
    memory, recovery_s = _MORE * small.memory_bytes, max(_MORE * small.recovery_s, enough_s)
    near = {n: c for n, c in same.items() if c.memory_bytes <= memory and c.recovery_s <= recovery_s}
    return min(near, key=lambda n: (near[n].bytes_per_step, n))


def _what_binds(cost: Cost, times: StepTimes, unbounded: Cost) -> Binding:
    """``unbounded``: the cost that would be chosen without a budget."""
    if cost.stall_s > unbounded.stall_s + _SAME * times.step:
        return "budget"
    if cost.stall_s <= _SAME * times.step:
        return "nothing"
    return "link" if cost.copy_s - times.forward_backward >= cost.hash_s - times.step else "hash"


# -- whole captures ----------------------------------------------------------------------------------------------------


def dense_memory(partition: Partition) -> int:
    """Three generations: the committed step, one being sealed, one being copied; with a disk tier one being written."""
    return partition.state_bytes * (4 if partition.disk else 3)


def dense_cost(partition: Partition, every: int, times: StepTimes, rates: Bandwidths) -> Cost:
    whole = partition.state_bytes
    return capture_cost(whole, dense_memory(partition), every, times, rates, whole, 0)


def choose_interval(
    partition: Partition, times: StepTimes, rates: Bandwidths, budget: int, max_overhead: float = MAX_OVERHEAD
) -> DenseSchedule:
    """The smallest interval whose stall is at most ``max_overhead`` of the time, and in which the keeper can seal one
    capture before the next (CheckFreq, FAST'21: a profiled frequency, overhead at most 3.5 %).

    Raises:
        BudgetError: the generations need more than ``budget`` bytes.
    """
    memory = dense_memory(partition)
    if memory > budget:
        raise does_not_fit("mode dense", memory, budget)
    once = dense_cost(partition, 1, times, rates)
    by_link = _ceil(max(0.0, once.copy_s - times.forward_backward), max_overhead * times.step)
    by_hash = _ceil(once.hash_s, times.step)
    every = max(1, by_link, by_hash)
    binds: Binding = "nothing" if every == 1 else "link" if by_link >= by_hash else "hash"
    cost = dense_cost(partition, every, times, rates)
    return DenseSchedule(every, binds, cost, f"every {every} steps, {_limits(binds, cost, budget)}: {figures(cost)}")


def disk_interval(partition: Partition, times: StepTimes, disk: float) -> int:
    """The least steps between checkpoints on a disk of ``disk`` bytes/s: writing one must end before the next begins
    (MoC-System)."""
    return max(1, _ceil(partition.state_bytes / disk, times.step))


def _ceil(amount: float, unit: float) -> int:
    """The smallest whole n with amount <= n * unit, up to rounding of the division."""
    whole = int(amount / unit)
    return whole if amount <= whole * unit else whole + 1


# -- words -------------------------------------------------------------------------------------------------------------


def does_not_fit(what: str, needed: int, budget: int) -> BudgetError:
    """The error for ``what``, with both figures in bytes."""
    return BudgetError(
        f"{what} needs {needed:,} bytes ({size(needed)}) of memory for this worker, {budget:,} ({size(budget)}) are "
        "allowed; raise checkpoint.memory.budget_gib, use fewer workers on this machine, or set "
        "checkpoint.memory.enabled: false"
    )


def _limits(binds: Binding, cost: Cost, budget: int) -> str:
    return {
        "nothing": "which no limit binds",
        "budget": f"bound by the memory budget of {size(budget)}",
        "link": f"bound by the copy, {seconds(cost.copy_s)} a capture",
        "hash": f"bound by the keeper's checksums, {seconds(cost.hash_s)} a capture",
        "recipe": "as the recipe says",
    }[binds]


def figures(cost: Cost) -> str:
    """A cost in words."""
    return (
        f"{size(cost.bytes_per_step)} a step, {size(cost.memory_bytes)} of memory, predicted stall "
        f"{seconds(cost.stall_s)} a step, restore {seconds(cost.recovery_s)}"
    )


def seconds(value: float) -> str:
    """``0 ms``, ``12.3 ms``, ``1.25 s``."""
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.3g} ms"


def size(nbytes: float) -> str:
    """``12 B``, ``3.4 MiB``, ``120 GiB``."""
    count, units = float(nbytes), ["B", "KiB", "MiB", "GiB", "TiB"]
    while count >= 1024 and len(units) > 1:
        count, units = count / 1024, units[1:]
    return f"{count:.0f} {units[0]}" if count >= 100 or units[0] == "B" else f"{count:.1f} {units[0]}"
