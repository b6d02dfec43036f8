"""The lost-token meter: how much training a lossy mode has thrown away, and when it must stop being lossy.

MoC-System (ASPLOS'25, arXiv 2408.04307) measures the proportion of lost tokens,

    PLT = 1/N_moe * sum over MoE layers i of [ sum over faults j of L_ij ] / (T_i * TopK_i)

L_ij: token copies that layer i's experts had learnt from between their own last capture and the step recovered at fault
j. T_i * TopK_i: token copies that the whole run routes through layer i. Padding and copies that no expert took are in
neither number, and how many of these are still to come is not known: what was counted so far is extended to the run's
last step. Tokens after the recovered step are not lost: the run does those steps again. The paper found validation loss
unharmed below 3.75 %.

A :class:`Meter` is a value: each event gives a new one. It travels with the run's captures (:meth:`Meter.dump`), so
that the one restored with step s knows what was true at s. All ranks must feed it the same: counts summed over ranks.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from moe.refs import ExpertRef

MAX_PLT = 0.0375
_ON_DISK = 2  # marks of one expert: of the newest checkpoint, which may not be whole yet, and of the one before

Counts = tuple[tuple[int, ...], ...]


class MeterError(ValueError):
    """Counts or a dump that cannot be this run's; the message says how they differ."""


@dataclass(frozen=True)
class Limits:
    """What may be lost.

    Attributes:
        routed_tokens: token copies that the whole run would route through each MoE layer if there were no padding and
            none were dropped; what is meant until some were counted.
        steps: I_total, of the whole run.
        max_plt: never to be reached.
        dynamic_k: whether K may grow after a recovery.
        fallback: the exact mode to switch to.
    """

    routed_tokens: int
    steps: int
    max_plt: float = MAX_PLT
    dynamic_k: bool = True
    fallback: Literal["wal", "dense"] = "wal"


@dataclass(frozen=True)
class Mark:
    """A capture of one expert.

    Attributes:
        step: of the capture; -1 for the state at the run's start.
        tokens: copies that it had learnt from by then, and those counted as lost since, to be counted only once.
    """

    step: int
    tokens: int


START = Mark(-1, 0)


@dataclass(frozen=True)
class Meter:
    """The state of the meter after some step.

    Attributes:
        layers: global indices of the MoE layers.
        k: experts of each layer per capture.
        counts: cumulative token copies per layer and expert, as last fed.
        memory: per layer and expert, its newest capture.
        disk: per layer and expert, its captures on disk, oldest first.
        lost: token copies lost per layer, over all faults.
        lost_under_k: of these, since ``k`` took its present value.
        faults: recoveries so far.
        begun, step: ``counts`` are of the steps after ``begun`` up to ``step``.
    """

    layers: tuple[int, ...]
    k: int
    counts: Counts
    memory: tuple[tuple[Mark, ...], ...]
    disk: tuple[tuple[tuple[Mark, ...], ...], ...]
    lost: tuple[int, ...]
    lost_under_k: tuple[int, ...]
    faults: int = 0
    begun: int = 0
    step: int = 0

    @classmethod
    def new(cls, layers: Sequence[int], experts: int, k: int) -> Meter:
        """Before the first step. Raises ValueError unless 1 <= k <= experts."""
        if not 1 <= k <= experts:
            raise ValueError(f"K={k} of {experts} experts: choose 1 to {experts}")
        rows, none = len(layers), (0,) * len(layers)
        memory, disk = ((START,) * experts,) * rows, (((),) * experts,) * rows
        return cls(tuple(layers), k, ((0,) * experts,) * rows, memory, disk, none, none)

    @property
    def experts(self) -> int:
        """N, of each layer."""
        return len(self.counts[0]) if self.counts else 0

    # -- events --------------------------------------------------------------------------------------------------------

    def begins(self, step: int) -> Meter:
        """When the first step that it counts is the one after ``step``."""
        return replace(self, begun=step, step=step)

    def captured(self, step: int, cumulative: Sequence[Sequence[int]], chosen: Iterable[ExpertRef]) -> Meter:
        """When ``chosen`` are captured after ``step``.

        Raises MeterError if ``cumulative`` has another shape, or fell.
        """
        counts, wanted = self._fed(cumulative), frozenset(chosen)
        memory = tuple(
            tuple(
                Mark(step, count) if ExpertRef(layer, expert) in wanted else mark
                for expert, (mark, count) in enumerate(zip(marks_E, counts_E, strict=True))
            )
            for layer, marks_E, counts_E in zip(self.layers, self.memory, counts, strict=True)
        )
        return replace(self, counts=counts, memory=memory, step=step)

    def persisted(self, chosen: Iterable[ExpertRef]) -> Meter:
        """When the copies in memory of ``chosen`` go to disk with the present step."""
        wanted = frozenset(chosen)
        disk = tuple(
            tuple(
                (*older[-_ON_DISK + 1 :], mark) if ExpertRef(layer, expert) in wanted else older
                for expert, (older, mark) in enumerate(zip(disk_E, memory_E, strict=True))
            )
            for layer, disk_E, memory_E in zip(self.layers, self.disk, self.memory, strict=True)
        )
        return replace(self, disk=disk)

    def loss_of(self, ages: Mapping[ExpertRef, int]) -> tuple[int, ...]:
        """Token copies per layer that a recovery at this meter's step would lose with experts of these ages.

        An age between two remembered captures counts as the older: never too little is counted.
        """
        return tuple(
            sum(
                count - self._mark(row, expert, ages[ExpertRef(layer, expert)]).tokens
                for expert, count in enumerate(counts_E)
            )
            for row, (layer, counts_E) in enumerate(zip(self.layers, self.counts, strict=True))
        )

    def recovered(self, ages: Mapping[ExpertRef, int]) -> Meter:
        """After a recovery that restored this meter and experts of these ages.

        What was lost is added to the remembered captures, too: if an older one is restored later, that loss is not
        counted twice.
        """
        memory: list[tuple[Mark, ...]] = []
        disk: list[tuple[tuple[Mark, ...], ...]] = []
        for row, (layer, counts_E) in enumerate(zip(self.layers, self.counts, strict=True)):
            restored = [self._mark(row, expert, ages[ExpertRef(layer, expert)]) for expert in range(self.experts)]
            memory.append(tuple(Mark(mark.step, n) for mark, n in zip(restored, counts_E, strict=True)))
            disk.append(
                tuple(
                    tuple(Mark(m.step, m.tokens + n - mark.tokens) for m in older if m.step <= mark.step)
                    for older, mark, n in zip(self.disk[row], restored, counts_E, strict=True)
                )
            )
        loss = self.loss_of(ages)
        return replace(
            self,
            memory=tuple(memory),
            disk=tuple(disk),
            lost=tuple(map(sum, zip(self.lost, loss, strict=True))),
            lost_under_k=tuple(map(sum, zip(self.lost_under_k, loss, strict=True))),
            faults=self.faults + 1,
        )

    def _mark(self, row: int, expert: int, age: int) -> Mark:
        """The newest remembered capture at or before ``age``."""
        marks = (*self.disk[row][expert], self.memory[row][expert])
        return max((mark for mark in marks if mark.step <= age), key=lambda mark: mark.step, default=START)

    def with_k(self, k: int) -> Meter:
        """With another K, whose own loss starts from nothing."""
        return self if k == self.k else replace(self, k=k, lost_under_k=(0,) * len(self.layers))

    def _fed(self, cumulative: Sequence[Sequence[int]]) -> Counts:
        counts = tuple(tuple(int(count) for count in row) for row in cumulative)
        if [len(row) for row in counts] != [self.experts] * len(self.layers):
            raise MeterError(f"routed tokens must be of {len(self.layers)} layers with {self.experts} experts each")
        for layer, before, after in zip(self.layers, self.counts, counts, strict=True):
            if any(new < old for old, new in zip(before, after, strict=True)):
                raise MeterError(
                    f"layer {layer}: cumulative routed tokens fell; feed counts since the run's first step"
                )
        return counts

    # -- figures -------------------------------------------------------------------------------------------------------

    def unsaved(self) -> Counts:
        """Token copies per layer and expert since its last capture, for load-aware selection."""
        return tuple(
            tuple(count - mark.tokens for mark, count in zip(marks_E, counts_E, strict=True))
            for marks_E, counts_E in zip(self.memory, self.counts, strict=True)
        )

    def plt(self, limits: Limits) -> float:
        """The proportion of lost tokens so far."""
        return self._proportion(self.lost, limits)

    def plt_under_k(self, limits: Limits) -> float:
        return self._proportion(self.lost_under_k, limits)

    def _proportion(self, lost_M: Sequence[int], limits: Limits) -> float:
        steps, parts = self.step - self.begun, []
        for lost, counts_E in zip(lost_M, self.counts, strict=True):
            counted = sum(counts_E)
            routed = counted * limits.steps / steps if counted and steps else limits.routed_tokens
            parts.append(lost / routed)
        return sum(parts) / len(parts) if parts else 0.0

    # -- storage -------------------------------------------------------------------------------------------------------

    def dump(self) -> bytes:
        values = {**vars(self), "memory": _plain(self.memory), "disk": _plain(self.disk)}
        return json.dumps(values, separators=(",", ":")).encode()

    @classmethod
    def load(cls, blob: bytes) -> Meter:
        """Inverse of :meth:`dump`. Raises MeterError for anything else."""
        try:
            values = json.loads(blob)
            return cls(
                layers=tuple(values["layers"]),
                k=int(values["k"]),
                counts=tuple(map(tuple, values["counts"])),
                memory=tuple(tuple(Mark(*mark) for mark in row) for row in values["memory"]),
                disk=tuple(tuple(tuple(Mark(*m) for m in marks) for marks in row) for row in values["disk"]),
                lost=tuple(values["lost"]),
                lost_under_k=tuple(values["lost_under_k"]),
                faults=int(values["faults"]),
                begun=int(values.get("begun", 0)),  # dumps of older versions have neither
                step=int(values.get("step", 0)),
            )
        except (ValueError, TypeError, KeyError) as error:
            raise MeterError(f"not the state of a lost-token meter: {error}; restore another checkpoint") from error


def _plain(marks: Mark | tuple[Any, ...]) -> list[Any]:
    return [marks.step, marks.tokens] if isinstance(marks, Mark) else [_plain(mark) for mark in marks]


# -- decisions ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Decision:
    """How to go on: with ``k`` experts per capture, or in the exact mode ``mode`` (None: stay lossy)."""

    k: int
    mode: Literal["wal", "dense"] | None
    reason: str


def expected_loss(k: int, experts: int, every: int, steps: int) -> float:
    """PLT that one fault costs on average: (N/K - 1)/2 x I_ckpt/I_total.

    With sequential selection and balanced routing, an expert captured j checkpoints before the last one loses
    j x I_ckpt steps, and j is uniform over 0 ... N/K - 1.
    """
    return max(0.0, (experts / k - 1) / 2 * every / steps)


def doublings(k: int, experts: int) -> list[int]:
    """K, 2K, 4K ... and at last N."""
    values = [k]
    while values[-1] < experts:
        values.append(min(2 * values[-1], experts))
    return values


def decide(meter: Meter, limits: Limits, first_k: int, every: int) -> Decision:
    """How a run goes on, asked at its start and after every recovery.

    Dynamic K (MoC-System): when the loss under the present K exceeds its limit, K doubles, until all experts are
    captured. ``max_plt`` is shared equally by the K from ``first_k`` on that lose anything. Then, so that ``max_plt``
    is never reached: K doubles while the next fault is expected to reach it, if K may; else the run becomes exact.

    Args:
        first_k: the K that the run began with.
        every: steps between captures.
    """
    total, experts, k = meter.plt(limits), meter.experts, meter.k
    so_far = f"{total:.2%} of the run's tokens lost in {meter.faults} recoveries"
    if total >= limits.max_plt:
        return Decision(
            k, limits.fallback, f"{so_far}: max_plt {limits.max_plt:.2%} is reached; going on in mode {limits.fallback}"
        )
    lossy = [value for value in doublings(first_k, experts) if value < experts]
    share = limits.max_plt / max(len(lossy), 1)
    grown = ""
    if limits.dynamic_k and k < experts and meter.plt_under_k(limits) > share:
        grown = f", {meter.plt_under_k(limits):.2%} of them with K={k}, whose share is {share:.2%}"
        k = min(2 * k, experts)
    while total + expected_loss(k, experts, every, limits.steps) >= limits.max_plt:
        expected = f"the next fault is expected to lose {expected_loss(k, experts, every, limits.steps):.2%}"
        if not limits.dynamic_k or 2 * k >= experts:
            reason = f"{so_far}; with K={k} {expected}, max_plt is {limits.max_plt:.2%}"
            return Decision(k, limits.fallback, f"{reason}; going on in mode {limits.fallback}")
        grown += f"; with K={k} {expected}, too near max_plt {limits.max_plt:.2%}"
        k *= 2
    change = f"K={k} from now on" if k != meter.k else f"K={k} stays"
    return Decision(k, None, f"{so_far}{grown}; {change}")
