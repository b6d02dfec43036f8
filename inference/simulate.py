"""Replay of recorded routing through caches: hit rates of policies, and the bounds that none can pass.

The policies are the very classes that the runtime uses. No torch here.

Shapes: L MoE layers, E experts of each, T tokens, K choices of a token.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from inference.activation import ActivationMatrix, ExpertMap
from inference.foresight import ForeseenReuse
from inference.policies import LRFU, LRU, AgedLFU, LayeredLRU, PerLayerLRU, Policy, Scores
from inference.recorded_heads import RecordedHeads, heads_file, read_heads
from inference.reuse import ExpectedReuse
from inference.shadow import WITH_HEADS, Hedge, Shadow
from moe.tracefile import Trace, TraceError, trace_file

FIXED: dict[str, Callable[[int, int], Policy]] = {
    "lru": LRU,
    "per_layer_lru": PerLayerLRU,
    "layered_lru": LayeredLRU,
    "lrfu": LRFU,
    "aged_lfu": AgedLFU,
    "expected_reuse": ExpectedReuse,
    "activation_matrix": ActivationMatrix,
    "expert_map": ExpertMap,
}
FORESEEN, HEDGE, BELADY, BYPASS = "foreseen_reuse", "hedge", "belady", "belady_bypass"
POLICIES = (*FIXED, HEDGE)
WARM_UP = 0.25  # of the tokens: they count nothing


@dataclass(frozen=True)
class Routing:
    """Recorded passes through the model: in each every layer once, in order.

    Attributes:
        index_TLK: experts that each token used in each layer.
        experts: E.
        starts: tokens at which a sequence starts.
        passes: the first token of each pass; None: each token was decoded alone.
        heads: what lookahead heads say of each token; None: nothing was recorded.
    """

    index_TLK: np.ndarray
    experts: int
    starts: frozenset[int] = frozenset()
    passes: tuple[int, ...] | None = None
    heads: RecordedHeads | None = None

    @property
    def layers(self) -> int:
        return int(self.index_TLK.shape[1])

    def calls(self) -> Iterator[tuple[int, int, np.ndarray]]:
        """(first token, row, distinct experts) in the order in which a decoder makes them."""
        for tokens in self.spans():
            for row in range(self.layers):
                index_N = self.index_TLK[tokens, row].reshape(-1)
                yield tokens.start, row, np.unique(index_N[index_N < self.experts])

    def spans(self) -> Iterator[slice]:
        """The tokens of each pass."""
        starts = range(len(self.index_TLK)) if self.passes is None else self.passes
        for start, end in pairwise((*starts, len(self.index_TLK))):
            yield slice(start, end)

    def told_calls(self, uses_heads: bool) -> Iterator[tuple[int, int, np.ndarray, np.ndarray | None]]:
        """The same with what heads say at each call [2,L,E], if that is wanted and was recorded."""
        heads = self.heads if uses_heads else None
        ends = {tokens.start: tokens for tokens in self.spans()} if heads else {}
        for token, row, experts_N in self.calls():
            yield token, row, experts_N, None if heads is None else heads.ahead(ends[token], row)


def read_routing(path: str | os.PathLike[str], sequence: int = 0, tokens: int = 0) -> Routing:
    """A rank's trace: as it was served, or what training and reading a text recorded as if decoded token by token.

    Args:
        path: of a run's folder, a trace folder, or a trace.
        sequence: length of the sequences in a row, where the trace does not say; 0: none is known.
        tokens: at most how many are read, from the end, where the model has learnt most; 0: all.

    Raises TraceError.
    """
    file = _file_of(Path(path))
    trace = Trace(file)
    layers, source = trace.header.layers, trace.header.source
    if sequence and source != "training":
        raise TraceError(f"{file} says itself where sequences start, so --sequence has no effect; leave it out")
    passes = list(dict.fromkeys((step, micro) for step, micro, _ in trace.keys))
    parts, steps, taken = [], [], 0
    for step, micro in reversed(passes):
        records = [trace.record(step, micro, layer) for layer in layers]
        if any(record is None for record in records):
            continue  # cut short by a kill
        parts.append(np.stack([record.index_TK for record in records if record is not None], 1))
        steps.append(step)
        taken += len(parts[-1])
        if tokens and taken >= tokens:
            break
    if not parts:
        raise TraceError(f"{file} holds no whole pass through the model; record a longer run")
    parts, steps = parts[::-1], steps[::-1]
    index_TLK = np.concatenate(parts)
    if index_TLK.size and not 0 <= index_TLK.min() <= index_TLK.max() < trace.header.num_experts:
        raise TraceError(
            f"{file} names experts that a model of {trace.header.num_experts} does not have; record it again"
        )
    firsts = [0, *np.cumsum([len(part) for part in parts[:-1]]).tolist()]
    if source == "training":
        starts = list(range(0, len(index_TLK), sequence)) if sequence else []
    else:
        starts = [first for i, first in enumerate(firsts) if not i or steps[i] != steps[i - 1]]
    heads = read_heads(file)
    if heads is not None and len(heads.codes_TLR) < len(index_TLK):
        raise TraceError(f"{file}: more tokens than beside it in {heads_file(file).name}; record both again")
    return Routing(
        index_TLK,
        trace.header.num_experts,
        frozenset(starts),
        tuple(firsts) if source == "serving" else None,
        heads.tail(len(index_TLK)) if heads is not None else None,
    )


def _file_of(path: Path) -> Path:
    for folder in (path / "trace", path):
        if (file := trace_file(folder, 0)).is_file():
            return file
    return path


class Belady(Policy):
    """MIN: evicts what is needed again last.

    It knows the future, so it bounds every policy (L. A. Belady, IBM Systems Journal 5(2), 1966).
    """

    def __init__(self, routing: Routing) -> None:
        super().__init__(routing.layers, routing.experts)
        never = routing.index_TLK.shape[0] * routing.layers
        # For each call, when its experts are needed next: found from the end.
        next_LE = np.full((self.layers, self.experts), never)
        self._next: list[np.ndarray] = []
        calls = list(routing.calls())
        for number in range(len(calls) - 1, -1, -1):
            _, row, experts_N = calls[number]
            self._next.append(next_LE[row, experts_N].copy())
            next_LE[row, experts_N] = number
        self._soon_LE = -np.full((self.layers, self.experts), float(never))

    def _note(self, row: int, experts_N: np.ndarray) -> None:
        self._soon_LE[row, experts_N] = -self._next.pop()

    def scores(self) -> Scores:
        return self._soon_LE


@dataclass(frozen=True)
class Replay:
    """What one policy made of a trace; counted after the warm-up."""

    policy: str
    slots: int
    hits: int
    misses: int

    @property
    def hit_rate(self) -> float:
        return self.hits / max(self.hits + self.misses, 1)


def make_policy(name: str, routing: Routing, slots: int) -> Policy:
    """Raises ValueError for a name that is none."""
    if name in (BELADY, BYPASS):
        return Belady(routing)
    if name == HEDGE:
        return Hedge(routing.layers, routing.experts, slots, WITH_HEADS if routing.heads is not None else None)
    if name == FORESEEN and routing.heads is not None:
        return ForeseenReuse(routing.layers, routing.experts)
    if name not in FIXED:
        raise ValueError(f"no policy {name!r} here; choose from {', '.join((*POLICIES, BELADY, BYPASS))}")
    return FIXED[name](routing.layers, routing.experts)


def replay(routing: Routing, name: str, slots: int, warm_up: float = WARM_UP) -> Replay:
    """Decode ``routing`` with ``slots`` resident experts; the first ``warm_up`` of the tokens count nothing.

    The bounds have the best content there is by then: of the misses that are counted, those that fill free slots are
    none. Without that, Belady's choices, the best for the whole trace, could be passed in the part that counts.
    """
    shadow = Shadow(make_policy(name, routing, slots), slots, bypass=name == BYPASS)
    counted_from = int(len(routing.index_TLK) * warm_up)
    hits = misses = 0
    bound = name in (BELADY, BYPASS) and counted_from > 0
    for token, row, experts_N, ahead_2LE in routing.told_calls(shadow.policy.uses_heads):
        if row == 0 and token in routing.starts:
            shadow.policy.begin()
        if ahead_2LE is not None:
            shadow.policy.foresee(ahead_2LE)
        if bound and token < counted_from:
            shadow.policy.use(row, experts_N)
            continue
        free = slots - shadow.held if bound else 0
        missed = shadow.use(row, experts_N)
        missed -= min(missed, free)
        if token >= counted_from:
            misses += missed
            hits += len(experts_N) - missed
    return Replay(name, slots, hits, misses)


def gap_closed(hit_rate: float, lru: float, bound: float) -> float:
    """Which part of the way from LRU to the bound a policy goes; 0 where there is no way to go."""
    return (hit_rate - lru) / (bound - lru) if bound > lru else 0.0


def compare(routing: Routing, budgets: Sequence[float], names: Sequence[str] = POLICIES) -> dict[float, list[Replay]]:
    """Every policy and both bounds at each budget, a share of all experts; one more where heads were recorded."""
    if routing.heads is not None and names == POLICIES:
        names = (*FIXED, FORESEEN, HEDGE)
    total = routing.layers * routing.experts
    wanted = [*dict.fromkeys(("lru", *names, BELADY, BYPASS))]
    slots = {budget: max(round(budget * total), 1) if budget else 0 for budget in budgets}
    return {budget: [replay(routing, name, slots[budget]) for name in wanted] for budget in budgets}


def table(results: dict[float, list[Replay]]) -> str:
    """Hit rates in percent, and in brackets which part of the gap between LRU and Belady with bypass is closed."""
    names = [one.policy for one in next(iter(results.values()))]
    lines = [f"{'policy':<18}" + "".join(f"{f'{budget:.0%} resident':>20}" for budget in results)]
    for i, name in enumerate(names):
        cells = []
        for found in results.values():
            rates = {one.policy: one.hit_rate for one in found}
            gap = gap_closed(found[i].hit_rate, rates["lru"], rates[BYPASS])
            cells.append(f"{100 * found[i].hit_rate:>11.1f} ({gap:>5.2f})")
        lines.append(f"{name:<18}" + "".join(f"{cell:>20}" for cell in cells))
    return "\n".join(lines)
