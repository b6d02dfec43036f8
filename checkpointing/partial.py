"""Partial experts: which experts each checkpoint holds, how old the others are, and what that costs.

MoC-System (ASPLOS'25, arXiv 2408.04307): a checkpoint holds everything that is not an expert, and K of the N experts
of each layer. What is restored later has experts of different ages. N experts lie on ``ep`` ranks, N/ep on each, in
contiguous blocks; with more workers than that, ZeRO cuts each rank's experts, in layer order, over the workers that
hold the same ones.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import ceil

from checkpointing.cost import SLACK, STATE_WIDTH, Bandwidths, Cost, StepTimes, capture_cost, does_not_fit, figures
from moe.refs import ExpertRef


@dataclass(frozen=True)
class Experts:
    """The routed experts of a model and how they are spread.

    Attributes:
        layers: global indices of the MoE layers, ascending.
        count: N, experts of each layer.
        ep: ranks that share one set of them.
        replicas: workers that hold the same ones, over which ZeRO cuts their state.

    Raises ValueError if ``ep`` does not divide ``count``.
    """

    layers: tuple[int, ...]
    count: int
    ep: int = 1
    replicas: int = 1

    def __post_init__(self) -> None:
        if self.count < 1 or self.ep < 1 or self.replicas < 1 or self.count % self.ep:
            raise ValueError(f"ep={self.ep} must divide {self.count} experts")

    def all(self) -> Iterable[ExpertRef]:
        return (ExpertRef(layer, expert) for layer in self.layers for expert in range(self.count))


# -- selection ---------------------------------------------------------------------------------------------------------


def turn(experts: Experts, index: int) -> int:
    """The expert whose turn comes at ``index`` (0 <= index < N): one of each EP rank, then the next of each.

    Within a rank the order is van der Corput's: any few consecutive turns spread over the rank's experts, so also over
    the workers among which ZeRO may have cut a layer.
    """
    rank, local = index % experts.ep, index // experts.ep
    block = experts.count // experts.ep
    return rank * block + _spread(block)[local]


@cache
def _spread(count: int) -> tuple[int, ...]:
    """0 ... count - 1 in the order of their bit-reversed fractions."""
    width = max(count - 1, 1).bit_length()
    reversed_bits = [int(f"{i:0{width}b}"[::-1], 2) for i in range(count)]
    place = {bits: i for i, bits in enumerate(sorted(reversed_bits))}
    return tuple(place[bits] for bits in reversed_bits)


def select(experts: Experts, checkpoint: int, k: int) -> tuple[ExpertRef, ...]:
    """The experts that checkpoint number ``checkpoint`` holds, K of each layer.

    Sequential selection, interleaved over layers and EP ranks. The paper has select(c, l) = {(l + cK + j) mod N};
    here (cK + lK + j) mod N are turns, see :func:`turn`: a checkpoint's turns are consecutive over its layers, so that
    each EP rank has equally many experts whenever ep divides K x layers. Every expert is held once in any N/K
    consecutive checkpoints if K divides N, else at least once in the next whole number of them.

    Raises ValueError unless 1 <= k <= N.
    """
    _check_k(experts, k)
    return tuple(
        ExpertRef(layer, expert)
        for place, layer in enumerate(experts.layers)
        for expert in sorted(turn(experts, (checkpoint * k + place * k + j) % experts.count) for j in range(k))
    )


def select_loaded(experts: Experts, unsaved: Sequence[Sequence[int]], k: int) -> tuple[ExpertRef, ...]:
    """The K experts of each layer with the most tokens since they were last captured; of equal ones the lower index.

    Args:
        unsaved: tokens per layer and expert, summed over all ranks: every rank must pass the same.

    Raises ValueError unless 1 <= k <= N and ``unsaved`` has that shape.
    """
    _check_k(experts, k)
    if [len(row) for row in unsaved] != [experts.count] * len(experts.layers):
        raise ValueError(f"unsaved tokens must be of {len(experts.layers)} layers with {experts.count} experts each")
    return tuple(
        ExpertRef(layer, expert)
        for layer, row in zip(experts.layers, unsaved, strict=True)
        for expert in sorted(sorted(range(experts.count), key=lambda e: (-row[e], e))[:k])
    )


def most_selected(experts: Experts, here: Collection[ExpertRef], k: int) -> int:
    """The most of the experts ``here`` that :func:`select` gives at once."""
    wanted = set(here)
    return max((len(wanted.intersection(select(experts, c, k))) for c in range(experts.count)), default=0)


def _check_k(experts: Experts, k: int) -> None:
    if not 1 <= k <= experts.count:
        raise ValueError(f"K={k} of {experts.count} experts: choose 1 to {experts.count}")


# -- ages --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ages:
    """The step at which each expert was last captured in one tier; -1 for never."""

    steps: Mapping[ExpertRef, int]

    @classmethod
    def unsaved(cls, experts: Experts) -> Ages:
        return cls(dict.fromkeys(experts.all(), -1))

    def saved(self, step: int, chosen: Iterable[ExpertRef]) -> Ages:
        """After ``chosen`` were captured at ``step``."""
        return Ages({**self.steps, **dict.fromkeys(chosen, step)})

    def persisted(self, memory: Ages, chosen: Iterable[ExpertRef]) -> Ages:
        """Ages on disk after the copies in memory of ``chosen`` were written."""
        return Ages({**self.steps, **{ref: memory.steps[ref] for ref in chosen}})

    def lines(self, step: int) -> list[str]:
        """What a recovery at ``step`` restores, a line for each layer: every expert with its age.

        >>> Ages({ExpertRef(0, 0): 4, ExpertRef(0, 1): 3}).lines(4)
        ['L00: E000 step 4, E001 step 3 (-1)']
        """
        layers: dict[int, list[str]] = {}
        for ref, age in sorted(self.steps.items()):
            lag = f" ({age - step})" if age < step else ""
            layers.setdefault(ref.layer, []).append(f"E{ref.expert:03d} step {age}{lag}")
        return [f"L{layer:02d}: {', '.join(row)}" for layer, row in layers.items()]


# -- cost --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SparsePartition:
    """One worker's parameters, those of experts apart. ``count``: N. The rest is as in ``cost.Partition``."""

    others: int
    experts: int
    count: int
    disk: bool = False
    state_width: int = STATE_WIDTH

    @property
    def state_bytes(self) -> int:
        return (self.others + self.experts) * self.state_width


@dataclass(frozen=True)
class PecSchedule:
    """``k``: experts of each layer per capture; ``hidden``: whether copying them hides behind forward and backward."""

    k: int
    hidden: bool
    cost: Cost
    reason: str


def pec_bytes(partition: SparsePartition, k: int) -> float:
    """C_pec = (P_ne + K/N P_e) (B_w + B_o) of MoC-System, per worker. Here B_w + B_o is ``state_width``: the
    bf16 weights are the rounded masters and need not be kept."""
    return (partition.others + partition.experts * k / partition.count) * partition.state_width


def pec_memory(partition: SparsePartition, k: int) -> int:
    """Bytes of all slots: the newest copy of everything, with a disk tier a second one that is being written, and room
    for captures under way."""
    return partition.state_bytes * (1 + partition.disk) + ceil(pec_bytes(partition, k) * SLACK)


def choose_k(
    partition: SparsePartition,
    every: int,
    times: StepTimes,
    rates: Bandwidths,
    budget: int,
    fixed: int | None = None,
) -> PecSchedule:
    """The largest K with T_snapshot <= T_F&B (MoC-System, adaptive configuration) that fits ``budget`` bytes; K = 1 if
    not even that hides.

    Args:
        every: steps between captures.
        fixed: the recipe's K, which is kept or refused.

    Raises:
        BudgetError: the fixed K, or K = 1, needs more than ``budget``.
    """
    candidates = [fixed] if fixed is not None else range(1, partition.count + 1)
    costs = {k: _pec_cost(partition, k, every, times, rates) for k in candidates}
    fitting = {k: cost for k, cost in costs.items() if cost.memory_bytes <= budget}
    if not fitting:
        raise does_not_fit(f"mode pec with k_snapshot={min(costs)}", costs[min(costs)].memory_bytes, budget)
    hiding = [k for k, cost in fitting.items() if not cost.stall_s]
    k = max(hiding) if hiding else min(fitting)
    cost, hidden = fitting[k], bool(hiding)
    if fixed is not None:
        why = "as the recipe says"
    elif k == partition.count:
        why = "all of them: nothing is lost"
    elif not hidden:
        why = "although not even one hides behind forward and backward"
    elif k + 1 in fitting:
        why = "the most without a stall"
    else:
        why = "the most that the memory budget allows"
    reason = f"{k} of {partition.count} experts a layer every {every} steps, {why}: {figures(cost)}"
    return PecSchedule(k, hidden, cost, reason)


def _pec_cost(partition: SparsePartition, k: int, every: int, times: StepTimes, rates: Bandwidths) -> Cost:
    memory = pec_memory(partition, k)
    return capture_cost(pec_bytes(partition, k), memory, every, times, rates, partition.state_bytes, 0)
