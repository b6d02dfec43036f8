"""Caches that hold keys only: what a policy would have hit, and which policy would hit most.

Shapes: L MoE layers, E experts of each, N of them used in one call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from inference.activation import ExpertMap
from inference.foresight import ForeseenReuse
from inference.policies import LRFU, AgedLFU, Flags, LayeredLRU, Policy, Scores
from inference.reuse import ExpectedReuse

PolicyClass = Callable[[int, int], Policy]
CANDIDATES: dict[str, PolicyClass] = {
    "expected_reuse": ExpectedReuse,
    "layered_lru": LayeredLRU,
    "lrfu": LRFU,
    "aged_lfu": AgedLFU,
    "expert_map": ExpertMap,
}
WITH_HEADS: dict[str, PolicyClass] = {"foreseen_reuse": ForeseenReuse, **CANDIDATES}


class Shadow:
    """A cache of ``slots`` experts under ``policy``, without their weights.

    Args:
        bypass: a missed expert need not be kept: it goes at once if it scores lowest. (One that the CPU computes, or
            that passes through a staging slot, takes no place.)
    """

    def __init__(self, policy: Policy, slots: int, *, bypass: bool = False) -> None:
        self.policy, self.slots, self.bypass = policy, slots, bypass
        self.resident_LE: Flags = np.zeros((policy.layers, policy.experts), dtype=bool)
        self.held = 0

    def use(self, row: int, experts_N: Sequence[int] | np.ndarray) -> int:
        """One layer call; how many of its experts were missing."""
        self.policy.use(row, experts_N)
        return self.admit(row, np.asarray(experts_N, dtype=np.intp))

    def admit(self, row: int, experts_N: np.ndarray) -> int:
        """The same, where the policy has been told of the call already."""
        resident_E = self.resident_LE[row]
        missed = len(experts_N) - int(np.count_nonzero(resident_E[experts_N]))
        if not missed or not self.slots:
            return missed
        resident_E[experts_N] = True
        self.held += missed
        if (surplus := self.held - self.slots) > 0:
            self._evict(row, experts_N, surplus)
        return missed

    def _evict(self, row: int, experts_N: np.ndarray, surplus: int) -> None:
        evictable_LE = self.resident_LE
        if not self.bypass:
            evictable_LE = evictable_LE.copy()
            evictable_LE[row][experts_N] = False
            if (spare := self.held - len(experts_N)) < surplus:
                # A call that wants more experts than there are slots: the last of them pass through.
                self.resident_LE[row][experts_N[: surplus - spare]] = False
                self.held -= surplus - spare
                surplus = spare
        self.resident_LE.reshape(-1)[self.policy.victims(evictable_LE, surplus)] = False
        self.held -= surplus


SAMPLED = 4  # stride of a hedge whose bookkeeping others wait for


class Hedge(Policy):
    """Does as that policy which would have missed least of late.

    No policy is best everywhere: frequency wins where few experts are popular, recency where a text stays with its
    experts. Each candidate runs a :class:`Shadow` of the cache's own size; misses count half after ``half_life``
    rounds. The leader changes only when another is better by ``margin``, since a change empties nothing but turns the
    order of eviction around.

    Args:
        slots: of the cache that asks.
        candidates: by name.
        stride: only every so many-th layer is shadowed, in a share of the slots (set sampling, Qureshi et al., ISCA
            2006): layers are alike enough to tell which policy is best, and watching costs that much less.
    """

    def __init__(
        self,
        layers: int,
        experts: int,
        slots: int,
        candidates: Mapping[str, PolicyClass] | None = None,
        half_life: float = 64.0,
        margin: float = 0.01,
        stride: int = 1,
    ) -> None:
        super().__init__(layers, experts)
        chosen = candidates or CANDIDATES
        self._stride = stride
        share = max(round(slots * len(range(0, layers, stride)) / layers), 1) if slots else 0
        self.shadows = {name: Shadow(make(layers, experts), share) for name, make in chosen.items()}
        self.misses = dict.fromkeys(self.shadows, 0.0)
        self.leader = next(iter(self.shadows))
        self._decay, self._margin, self._counted = 0.5 ** (1 / half_life), margin, 0

    @property
    def uses_heads(self) -> bool:  # type: ignore[override]
        return any(shadow.policy.uses_heads for shadow in self.shadows.values())

    def begin(self) -> None:
        for shadow in self.shadows.values():
            shadow.policy.begin()

    def foresee(self, ahead_2LE: np.ndarray) -> None:
        for shadow in self.shadows.values():
            shadow.policy.foresee(ahead_2LE)

    def _note(self, row: int, experts_N: np.ndarray) -> None:
        if self.round != self._counted:
            self._counted = self.round
            for name in self.misses:
                self.misses[name] *= self._decay
            best = min(self.misses, key=self.misses.__getitem__)
            if self.misses[best] < (1 - self._margin) * self.misses[self.leader]:
                self.leader = best
        for name, shadow in self.shadows.items():
            if row % self._stride:
                shadow.policy.use(row, experts_N)
            else:
                self.misses[name] += shadow.use(row, experts_N)

    def scores(self) -> Scores:
        return self.shadows[self.leader].policy.scores()

    def victims(self, evictable_LE: Flags, count: int) -> np.ndarray:
        return self.shadows[self.leader].policy.victims(evictable_LE, count)
