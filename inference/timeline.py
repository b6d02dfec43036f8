"""Replay of recorded decoding on a machine's clock: predictors, prefetches and the split between link and CPU included.

Policies, predictors and the planner are the runtime's own objects and functions, the costs a machine profile's. What is
simplified: prefetches are handed over piece by piece (packed ones whole) with no window ahead, so a demand waits for
one at most; of :class:`inference.prefetch.Prefetcher` only :func:`worth_fetching` is here, without corrected chances of
absent experts, the limit to the first of them and the price of regretted evictions; calls of many rows are demanded,
too, where the runtime streams them; the dense part takes the same time in all layers; nothing of the host's own work is
counted.

A prefetched expert is fetched: it counts in ``fetched`` whether it came in time, late or in vain, and only then is the
time that it saved seen, in the clock. So a hit by prefetch is no miss avoided.

No torch here. Shapes: L MoE layers, counted from 0 by *row*; E experts of each; N used in one call; D calls ahead.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from inference.costmodel import ExpertCosts
from inference.planner import plan_call
from inference.predictors import LEAST_CHANCE, PREDICTORS, Predictor, Suggestion, worth_fetching
from inference.simulate import WARM_UP, Routing, make_policy

CHUNK_BYTES = 8 << 20  # as inference.transfer has it
Expert = tuple[int, int]  # row, expert


@dataclass
class TimedReplay:
    """What a policy and a predictor made of a trace on a machine, after the warm-up.

    Attributes:
        wanted: distinct experts of all calls.
        resident: of those, in a slot when the call came; a prefetch may have brought them.
        late: on their way in.
        demanded, computed: fetched when the call came, and left to the CPU.
        prefetched: handed to the link ahead; ``useless`` were not used before they were evicted.
        seconds, tokens: of the clock, and tokens decoded meanwhile.
        stall_s: for how long calls waited for experts beyond what resident ones took.
    """

    policy: str
    predictor: str
    slots: int
    wanted: int = 0
    resident: int = 0
    late: int = 0
    demanded: int = 0
    computed: int = 0
    prefetched: int = 0
    useless: int = 0
    tokens: int = 0
    seconds: float = 0.0
    stall_s: float = 0.0

    @property
    def name(self) -> str:
        return self.policy if self.predictor == "none" else f"{self.policy} + {self.predictor}"

    @property
    def fetched(self) -> int:
        """Experts that crossed the link, for whatever reason."""
        return self.demanded + self.prefetched

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def saved_share(self) -> float:
        """Share of the wanted experts that neither crossed the link nor were left to the CPU: the honest hit rate."""
        return 1 - (self.fetched + self.computed) / max(self.wanted, 1)


@dataclass
class _Link:
    """The link's clock, and prefetches that wait for it, the nearest first. Seconds left to bring each."""

    expert_s: float
    chunk_s: float
    free_at: float = 0.0
    queue: dict[Expert, float] = field(default_factory=dict)
    arrived: list[Expert] = field(default_factory=list)

    def run(self, until: float) -> None:
        """Bring prefetches as far as time allows; a piece that has begun is finished."""
        while self.queue and self.free_at < until:
            expert, left = next(iter(self.queue.items()))
            piece = min(left, self.chunk_s)
            self.free_at += piece
            if left - piece < 1e-12:
                del self.queue[expert]
                self.arrived.append(expert)
            else:
                self.queue[expert] = left - piece
        self.free_at = max(self.free_at, until)


class Timeline:
    """One replay.

    Args:
        dense_s: of one layer's attention and everything else before its experts are known.
        lead: layer calls ahead for which the predictor suggests.
    """

    def __init__(
        self,
        routing: Routing,
        policy: str,
        predictor: str,
        slots: int,
        costs: ExpertCosts,
        dense_s: float,
        lead: int = 1,
    ) -> None:
        top_k = routing.index_TLK.shape[2]
        self.routing, self.slots, self.costs, self.dense_s = routing, slots, costs, dense_s
        self.policy = make_policy(policy, routing, slots)
        self.predictor: Predictor = PREDICTORS[predictor](routing.layers, routing.experts, top_k, lead)
        self.kind = predictor
        self.counts = TimedReplay(policy, predictor, slots)
        self.now = 0.0
        self.piece = 1.0 if costs.packed else min(1.0, CHUNK_BYTES / costs.expert_bytes)  # of an expert
        self.link = _Link(costs.link_s, costs.link_s * self.piece)
        self.resident_LE = np.zeros((routing.layers, routing.experts), dtype=bool)
        self.coming: dict[Expert, int] = {}  # the call each is meant for
        self.untried: set[Expert] = set()
        self.calls = 0
        self.rate_LE = np.zeros((routing.layers, routing.experts))
        self.demanding = 1.0

    def run(self, warm_up: float = WARM_UP) -> TimedReplay:
        """The first ``warm_up`` of the tokens count nothing."""
        counted_from, began = int(len(self.routing.index_TLK) * warm_up), None
        ends = {tokens.start: tokens for tokens in self.routing.spans()}
        for token, row, experts_N in self.routing.calls():
            if began is None and token >= counted_from and row == 0:
                began = self.now
                self.counts = TimedReplay(self.counts.policy, self.kind, self.slots)
            if row == 0:
                self.counts.tokens += 1  # of each sequence that is decoded
                if token in self.routing.starts:
                    self.policy.begin()
                    self.predictor.begin()
            self._call(ends[token], row, experts_N)
        self.counts.seconds = self.now - (began or 0.0)
        return self.counts

    def _call(self, tokens: slice, row: int, experts_N: np.ndarray) -> None:
        self.calls += 1
        self.now += self.dense_s
        self.link.run(self.now)
        self._settle()
        heads = self.routing.heads
        ahead_2LE = heads.ahead(tokens, row) if heads is not None and self._hears() else None
        if ahead_2LE is not None and self.policy.uses_heads:
            self.policy.foresee(ahead_2LE)
        self.policy.use(row, experts_N)
        wanted = experts_N.tolist()
        here = [e for e in wanted if self.resident_LE[row, e]]
        late = [e for e in wanted if (row, e) in self.coming]
        missing = [e for e in wanted if not self.resident_LE[row, e] and (row, e) not in self.coming]
        self._count(row, wanted, here, late)
        self._work(row, here, late, missing)
        self._note(row, wanted, bool(missing))
        self.predictor.observe(row, experts_N, self._ahead(tokens, row, ahead_2LE))
        self._drop_stale()
        for suggestion in self.predictor.suggest(row):
            self._follow(suggestion)

    def _hears(self) -> bool:
        return self.policy.uses_heads or self.kind == "heads"

    def _ahead(self, tokens: slice, row: int, ahead_2LE: np.ndarray | None) -> np.ndarray | None:
        """What :class:`inference.predictors.Lookahead` takes, from what was recorded."""
        heads = self.routing.heads
        if self.kind == "heads" and ahead_2LE is not None:
            following = [(row + d) % self.routing.layers for d in range(1, self.predictor.lead + 1)]
            return np.asarray(ahead_2LE[0, following])
        if self.kind == "next_gate" and heads is not None:
            return np.asarray(heads.gate_TLE[tokens, row].astype(np.float64).sum(0)[None])
        return None

    def _settle(self) -> None:
        for row, expert in self.link.arrived:
            self.resident_LE[row, expert] = True
            self.coming.pop((row, expert))
            self.untried.add((row, expert))
        self.link.arrived.clear()

    def _count(self, row: int, wanted: list[int], here: list[int], late: list[int]) -> None:
        self.counts.wanted += len(wanted)
        self.counts.resident += len(here)
        self.counts.late += len(late)
        self.untried -= {(row, e) for e in here}

    def _work(self, row: int, here: list[int], late: list[int], missing: list[int]) -> None:
        """The call itself: what is late first, then demands; the CPU and resident experts beside them."""
        costs = self.costs
        promoted = sum(self.link.queue.pop((row, e)) for e in late)
        busy = max(self.link.free_at - self.now, 0.0) + promoted
        split = plan_call(
            costs, [(e, 1) for e in missing], resident_rows=[1] * (len(here) + len(late)), link_busy_s=busy
        )
        seconds = max(split.cut.seconds, busy + costs.gpu_s(1)) if late else split.cut.seconds
        self.counts.stall_s += seconds - costs.gpu_s(1) * (len(here) + len(late))
        if late or split.fetch:
            self.link.free_at = self.now + busy + len(split.fetch) * costs.link_s
        self.now += seconds
        for e in late:
            del self.coming[row, e]
            self.resident_LE[row, e] = True
        self.counts.demanded += len(split.fetch)
        self.counts.computed += len(split.cpu)
        self._admit(row, here + late, list(split.fetch))

    def _admit(self, row: int, used: list[int], fetched: list[int]) -> None:
        """Fetched experts get slots; of more than there are slots the last pass through."""
        evictable_LE = self.resident_LE.copy()
        evictable_LE[row, used] = False
        free = self.slots - int(self.resident_LE.sum()) - len(self.coming)
        room = free + int(evictable_LE.sum())
        kept = fetched[: max(room, 0)]
        self._evict(evictable_LE, len(kept) - free)
        self.resident_LE[row, kept] = True

    def _evict(self, evictable_LE: np.ndarray, count: int) -> None:
        if count <= 0:
            return
        for flat in self.policy.victims(evictable_LE, count):
            row, expert = divmod(int(flat), self.routing.experts)
            self.resident_LE[row, expert] = False
            if (row, expert) in self.untried:
                self.untried.discard((row, expert))
                self.counts.useless += 1

    def _note(self, row: int, wanted: list[int], demanded: bool) -> None:
        self.rate_LE[row] *= 0.5 ** (1 / 16)
        self.rate_LE[row, wanted] += 1 - 0.5 ** (1 / 16)
        self.demanding += (float(demanded) - self.demanding) / 64

    def _drop_stale(self) -> None:
        for expert in [one for one, call in self.coming.items() if call <= self.calls]:
            if self.link.queue.get(expert, 0.0) >= self.link.expert_s - 1e-12:  # has not begun
                del self.link.queue[expert], self.coming[expert]
                self.counts.prefetched -= 1

    def _follow(self, suggestion: Suggestion) -> None:
        row = suggestion.row
        room = self.slots // 4 - len(self.coming)
        for expert, chance in zip(suggestion.experts_N.tolist(), suggestion.chance_N.tolist(), strict=True):
            if chance < LEAST_CHANCE or room <= 0:
                return
            if self.resident_LE[row, expert] or (row, expert) in self.coming:
                continue
            free = self.slots - int(self.resident_LE.sum()) - len(self.coming)
            loss = 0.0
            if free <= 0:
                if not self.resident_LE.any():
                    return
                victim = divmod(int(self.policy.victims(self.resident_LE, 1)[0]), self.routing.experts)
                loss = float(self.rate_LE[victim])
            if not worth_fetching(chance, loss, fetch_s=1.0, delay_s=self.demanding * self.piece):
                return  # the next is less likely
            self._evict(self.resident_LE, 1 if free <= 0 else 0)
            self.coming[row, expert] = self.calls + suggestion.distance
            self.link.queue[row, expert] = self.link.expert_s
            self.counts.prefetched += 1
            room -= 1


def timed_table(budget: float, found: list[TimedReplay]) -> list[str]:
    """Of one budget. Shares are of the experts that calls wanted."""
    head = f"{f'{budget:.0%} resident':<32}{'tokens/s':>9}{'resident':>10}{'late':>7}{'demanded':>10}{'by CPU':>8}"
    lines = [f"{head}{'ahead':>7}{'useless':>9}{'saved':>7}"]
    for one in found:
        shares = (one.resident, one.late, one.demanded, one.computed, one.prefetched, one.useless)
        cells = [f"{100 * count / max(one.wanted, 1):.1f}" for count in shares] + [f"{100 * one.saved_share:.1f}"]
        widths = (10, 7, 10, 8, 7, 9, 7)
        line = "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
        lines.append(f"{one.name:<32}{one.tokens_per_second:>9.1f}{line}")
    return lines
