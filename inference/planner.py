"""Which missing experts of a layer call are fetched, and which the CPU computes where they lie. No torch here.

Three lanes work at once: the link brings experts one after the other; the GPU computes resident ones, then what the
link has brought; the CPU computes others from host memory. A plan is the choice that ends soonest by the machine's
measured costs. (Fiddler, ICLR 2025, chooses for each expert alone; HybriMoE fills the three timelines greedily;
FlexInfer, MLSys 2025, chooses one way for a whole phase.) Here the choice is exact, and all three fall out of it:

* A fetch costs the same whatever the rows, the CPU's time grows with them. So of any two missing experts the one with
  more rows is the better one to fetch, and the best plan is a cut of the experts in order of rows. All cuts are tried.
* Experts arrive at even intervals and the GPU's times fall along the order, so the GPU ends either just behind the
  last arrival or with everything queued behind the first: no timeline has to be simulated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from inference.costmodel import ExpertCosts, overlap, total
from inference.errors import InferenceError

Missing = tuple[int, int]  # expert, rows
HIT, FETCH, CPU, SPLIT = "resident", "fetch", "cpu", "split"


class PlanError(InferenceError):
    """Work that this machine can do in no way."""


@dataclass(frozen=True)
class Cut:
    """Where the order is cut, and what that takes.

    Attributes:
        fetched: so many from the front are fetched.
        seconds: until the slowest lane ends, predicted.
        bound: that lane: ``link``, ``cpu`` or ``gpu``.
        fetch_only_s, cpu_only_s: what fetching all, or computing all on the CPU, would take; infinite where impossible.
        link_rate, cpu_rate: bytes/s that the lanes were reckoned with.
    """

    fetched: int
    seconds: float
    bound: str
    fetch_only_s: float
    cpu_only_s: float
    link_rate: float
    cpu_rate: float


@dataclass(frozen=True)
class Split:
    """The plan of one layer call: ``fetch`` in the order in which the link brings them, the rest by the CPU."""

    fetch: tuple[int, ...]
    cpu: tuple[int, ...]
    cut: Cut

    @property
    def mode(self) -> str:
        if self.fetch and self.cpu:
            return SPLIT
        return FETCH if self.fetch else CPU if self.cpu else HIT

    def reason(self) -> str:
        """Why, in a sentence."""
        cut, misses = self.cut, len(self.fetch) + len(self.cpu)
        link, cpu = f"link {cut.link_rate / 1e9:.3g} GB/s", f"CPU {cut.cpu_rate / 1e9:.3g} GB/s"
        if self.mode == HIT:
            return f"resident: nothing is missing; bound by {cut.bound}"
        if self.mode == SPLIT:
            carried = f"{link} and {cpu} carry {len(self.fetch)} and {len(self.cpu)} of {misses} misses"
            against = f"{duration(cut.fetch_only_s)} by link alone, {duration(cut.cpu_only_s)} by CPU alone"
            return f"split: {carried}; bound by {cut.bound}; {duration(cut.seconds)} against {against}"
        if self.mode == FETCH:
            why = "the CPU computes nothing here" if math.isinf(cut.cpu_only_s) else f"{cpu} would not help"
            return f"fetch: {link} brings all {misses} misses, {why}; bound by {cut.bound}"
        why = "there is no link" if math.isinf(cut.fetch_only_s) else f"{link} would not help"
        return f"cpu: {cpu} computes all {misses} misses where they lie, {why}; bound by {cut.bound}"


def plan_call(
    costs: ExpertCosts,
    missing: Sequence[Missing],
    *,
    resident_rows: Sequence[int] = (),
    worth: Mapping[int, float] | None = None,
    link_busy_s: float = 0.0,
    max_fetch: int | None = None,
) -> Split:
    """The best cut for one call of one layer. Deterministic: the same arguments give the same plan.

    Args:
        missing: (expert, rows), each expert once.
        resident_rows: rows of each resident expert that the call uses: the GPU's work meanwhile.
        worth: how much each expert is worth keeping, as policies score it. Among experts with equally many rows the
            worthiest are fetched, since fetching is what makes them resident; then those with the lowest number.
        link_busy_s: until the link is free for this call.
        max_fetch: at most so many may be fetched, where slots are few; the rest must be computed.

    Raises PlanError if some expert can neither be fetched nor computed.
    """
    order = in_order(missing, worth)
    cut = best_cut(costs, [rows for _, rows in order], resident_rows, link_busy_s, max_fetch)
    return Split(
        fetch=tuple(e for e, _ in order[: cut.fetched]), cpu=tuple(e for e, _ in order[cut.fetched :]), cut=cut
    )


def in_order(missing: Sequence[Missing], worth: Mapping[int, float] | None = None) -> list[Missing]:
    """Most rows first; of equally many the worthiest, then the lowest number."""
    if worth is None:
        return sorted(missing, key=lambda item: (-item[1], item[0]))
    return sorted(missing, key=lambda item: (-item[1], -worth.get(item[0], 0.0), item[0]))


def best_cut(
    costs: ExpertCosts,
    rows: Sequence[int],
    resident_rows: Sequence[int] = (),
    link_busy_s: float = 0.0,
    max_fetch: int | None = None,
) -> Cut:
    """How many of the missing, given by their rows in falling order, to fetch; see :func:`plan_call`."""
    lanes = Lanes(costs, rows, resident_rows, link_busy_s)
    most = len(rows) if max_fetch is None else min(max_fetch, len(rows))
    best = int(lanes.all_n[: most + 1].argmin())  # of equally good cuts the one that fetches least
    seconds = float(lanes.all_n[best])
    if math.isinf(seconds):
        raise PlanError(f"{len(rows)} experts are missing, {most} may be fetched and the CPU may compute none")
    split = 0 < best < len(rows)
    return Cut(
        fetched=best,
        seconds=seconds,
        bound=lanes.bound(best),
        fetch_only_s=float(lanes.all_n[-1]) if most == len(rows) else math.inf,
        cpu_only_s=float(lanes.all_n[0]),
        link_rate=costs.expert_bytes / (costs.link_overlapped_s if split else costs.link_s),
        cpu_rate=_cpu_rate(costs, rows[best:] or rows, split),
    )


def _cpu_rate(costs: ExpertCosts, rows: Sequence[int], overlapped: bool) -> float:
    seconds = total(costs.lanes(n)[overlapped] for n in rows)
    return len(rows) * costs.expert_bytes / seconds if seconds else 0.0


class Lanes:
    """When each lane ends if the first n of the order are fetched, for all n from 0 to M at once; infinite for what the
    machine cannot do.

    Attributes:
        link_n, cpu_n, gpu_n, all_n: [M+1] seconds; ``all_n`` when the last one ends.
    """

    def __init__(self, costs: ExpertCosts, rows: Sequence[int], resident_rows: Sequence[int], busy_s: float) -> None:
        many = len(rows)
        count_n = np.arange(many + 1)
        cpu_M, beside_M, gpu_M = np.array([costs.lanes(n) for n in rows]).reshape(-1, 3).T
        impossible_n = np.zeros(many + 1, dtype=bool)
        link_s, link_beside_s = costs.link_s, costs.link_overlapped_s
        if not costs.has_link:
            impossible_n |= count_n > 0
            link_s = link_beside_s = 0.0
        if not costs.threads:
            impossible_n |= count_n < many
            cpu_M = beside_M = np.zeros(many)
        busy_n, handed_n = np.where(count_n > 0, busy_s, 0.0), np.where(count_n < many, costs.handover_s, 0.0)
        self.link_n, self.cpu_n = overlap(
            (busy_n + count_n * link_s, busy_n + count_n * link_beside_s),
            (handed_n + _behind(cpu_M), handed_n + _behind(beside_M)),
        )
        resident_s = total(costs.lanes(n)[2] for n in resident_rows)
        queued_n = np.concatenate([[0.0], gpu_M.cumsum()])
        self._last_n = np.concatenate([[0.0], gpu_M])
        interval_n = np.maximum(self.link_n - busy_n, 0.0) / np.maximum(count_n, 1)
        self.gpu_n = np.maximum(resident_s + queued_n, busy_n + interval_n + queued_n)
        self.gpu_n = np.maximum(self.gpu_n, self.link_n + self._last_n)
        self.gpu_n[0] = resident_s
        self.all_n = np.maximum(np.maximum(self.link_n, self.cpu_n), self.gpu_n)
        self.all_n[impossible_n] = np.inf

    def bound(self, count: int) -> str:
        """The lane that ends last; one that only waits for the link is the link's."""
        link_end, cpu_end, gpu_end = self.link_n[count], self.cpu_n[count], self.gpu_n[count]
        if cpu_end >= max(link_end, gpu_end) and count < len(self.all_n) - 1:
            return "cpu"
        return "link" if count and link_end + self._last_n[count] >= gpu_end else "gpu"


def _behind(cost_M: np.ndarray) -> np.ndarray:
    """[M+1] sums of all costs from the n-th on."""
    return np.concatenate([[0.0], cost_M[::-1].cumsum()])[::-1]


class CallPlanner:
    """Plans call after call of one model, and counts what it chose.

    Calls of the same rows have the same cut, and decoding makes few kinds of them, so cuts are remembered: planning
    must not take longer than it saves.

    Attributes:
        modes: how many calls went which way.
        newest: the last plan that had anything missing.
    """

    def __init__(self, costs: ExpertCosts) -> None:
        self.costs = costs
        self.modes: dict[str, int] = {}
        self.newest: Split | None = None
        self._cuts: dict[tuple[tuple[int, ...], tuple[int, ...]], Cut] = {}

    def __call__(
        self, missing: Sequence[Missing], resident_rows: Sequence[int], worth: Mapping[int, float] | None = None
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(experts to fetch, experts for the CPU); see :func:`plan_call`."""
        split = self.plan(missing, resident_rows, worth)
        self.count(split)
        return split.fetch, split.cpu

    def plan(
        self, missing: Sequence[Missing], resident_rows: Sequence[int], worth: Mapping[int, float] | None = None
    ) -> Split:
        """The same, not counted as a call."""
        order = in_order(missing, worth)
        key = tuple(rows for _, rows in order), tuple(sorted(resident_rows))
        cut = self._cuts.get(key)
        if cut is None:
            if len(self._cuts) >= _REMEMBERED:
                self._cuts.clear()
            cut = self._cuts[key] = best_cut(self.costs, *key)
        experts = tuple(expert for expert, _ in order)
        return Split(experts[: cut.fetched], experts[cut.fetched :], cut)

    def count(self, split: Split) -> None:
        """A call went this way."""
        self.modes[split.mode] = self.modes.get(split.mode, 0) + 1
        if split.fetch or split.cpu:
            self.newest = split


_REMEMBERED = 4096


def duration(seconds: float) -> str:
    return (
        f"{seconds:.1f} s"
        if seconds >= 10
        else f"{1e3 * seconds:.0f} ms"
        if seconds >= 0.1
        else f"{1e3 * seconds:.3g} ms"
    )
