"""Which resident experts give up their places when others are needed.

A policy watches every layer call and scores all experts of the model by how much they are worth keeping; those with
the lowest scores go. Scores do not depend on what is resident, so the same object can serve a cache, shadow other
capacities and replay a recorded trace. No torch here.

Shapes: L MoE layers, counted from 0 by *row*; E experts of each; N of them used in one call.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np

_FEW = 8  # minima are found one after the other sooner than all are sorted

Flags = np.ndarray  # bool
Scores = np.ndarray  # float64


class Policy(ABC):
    """Base of all policies.

    Attributes:
        round: passes through the model so far; decoding makes one for each token.
        row: the layer of the newest call, -1 before the first.
        uses_heads: whether :meth:`foresee` makes a difference.
    """

    uses_heads = False

    def __init__(self, layers: int, experts: int) -> None:
        self.layers, self.experts = layers, experts
        self.round, self.row = 0, -1
        turns_LL = (np.arange(layers)[None] - np.arange(layers)[:, None] - 1) % layers
        self._waits: list[np.ndarray] = [(turns_L / layers)[:, None] for turns_L in turns_LL]

    def begin(self) -> None:  # noqa: B027 - most policies do not care
        """A new sequence starts."""

    def foresee(self, ahead_2LE: np.ndarray) -> None:  # noqa: B027 - most policies do not care
        """What lookahead heads say at the layer call that :meth:`use` tells of next.

        Log odds that each expert is used in its layer's next turn, and within its next four
        (:data:`inference.foresight.HORIZONS`). Not called where there are no heads.
        """

    def use(self, row: int, experts_N: Sequence[int] | np.ndarray) -> None:
        """One layer call wants these distinct experts. Layers are called in order; an earlier one begins a round."""
        if row <= self.row:
            self.round += 1
        self.row = row
        self._note(row, np.asarray(experts_N, dtype=np.intp))

    @abstractmethod
    def _note(self, row: int, experts_N: np.ndarray) -> None:
        """Update what scores are made of."""

    @abstractmethod
    def scores(self) -> Scores:
        """How much each expert is worth keeping now, [L,E], finite."""

    @property
    def wait_L1(self) -> np.ndarray:
        """The part of a round until each layer's next turn, 0 for the next layer's."""
        return self._waits[self.row]

    def victims(self, evictable_LE: Flags, count: int) -> np.ndarray:
        """The ``count`` experts to evict, as flat indices into [L,E], all of them evictable; worst first.

        Of equal scores the lower index goes first, so that a replay is repeatable.
        """
        (where,) = evictable_LE.reshape(-1).nonzero()
        assert len(where) >= count, f"{count} victims asked of {len(where)} that may go"
        scores = self.scores().reshape(-1)[where]
        if count > _FEW:
            return np.asarray(where[scores.argsort(kind="stable")[:count]])
        worst = []
        for _ in range(count):
            worst.append(int(scores.argmin()))
            scores[worst[-1]] = np.inf
        return np.asarray(where[worst])


class LRU(Policy):
    """Least recently used: evicts what no call has wanted for the longest time."""

    def __init__(self, layers: int, experts: int) -> None:
        super().__init__(layers, experts)
        self._calls = 0
        self._last_LE = np.zeros((layers, experts))

    def _note(self, row: int, experts_N: np.ndarray) -> None:
        self._calls += 1
        self._last_LE[row][experts_N] = self._calls

    def scores(self) -> Scores:
        return self._last_LE


class PerLayerLRU(LRU):
    """LRU in which each layer has an even share of the slots.

    The layer that is furthest above its share gives up first; so a layer that is called takes from itself, once the
    shares are even. (Mixtral-offloading keeps such a group for each layer.)
    """

    def victims(self, evictable_LE: Flags, count: int) -> np.ndarray:
        held_L = evictable_LE.sum(1)
        rank_LE = np.where(evictable_LE, self._last_LE, np.inf).argsort(1, kind="stable").argsort(1, kind="stable")
        # How many of its layer would be left once this one and all older ones are gone: the fuller layer pays first.
        left_LE = held_L[:, None] - 1 - rank_LE
        where = np.flatnonzero(evictable_LE)
        order = np.lexsort((self._last_LE.reshape(-1)[where], -left_LE.reshape(-1)[where]))
        return where[order[:count]]


class LayeredLRU(LRU):
    """Recency in rounds; of equally recent ones the expert whose layer's next turn is farthest away goes first.

    Layers take turns, so plain LRU evicts what is needed next (arXiv 2509.02408, which calls it LLRU).
    """

    def _note(self, row: int, experts_N: np.ndarray) -> None:
        self._last_LE[row][experts_N] = self.round + 1

    def scores(self) -> Scores:
        return np.asarray(self._last_LE - self.wait_L1)


class LRFU(Policy):
    """Recency and frequency combined: each use counts 1, and halves every ``half_life`` rounds.

    (Lee et al., IEEE Trans. Computers 50(12), 2001, with F(x) = 2^(-x / half_life).) A short half-life comes close to
    LRU, a long one to LFU.
    """

    def __init__(self, layers: int, experts: int, half_life: float = 8.0) -> None:
        super().__init__(layers, experts)
        self.half_life = half_life
        self._count_LE = np.zeros((layers, experts))
        self._scale = 1.0  # what a use is worth now: it grows, instead of all counts shrinking in each round
        self._scaled_round = 0

    def _note(self, row: int, experts_N: np.ndarray) -> None:
        if self.round != self._scaled_round:
            self._scale *= 2.0 ** ((self.round - self._scaled_round) / self.half_life)
            self._scaled_round = self.round
            if self._scale > 1e100:
                self._count_LE /= self._scale
                self._scale = 1.0
        count_E = self._count_LE[row]  # an index of one axis takes a third of the time of one of two
        count_E[experts_N] += self._scale

    def scores(self) -> Scores:
        return self._count_LE


class AgedLFU(LRFU):
    """Least frequently used, with counts that halve every 512 rounds so that old habits are forgotten."""

    def __init__(self, layers: int, experts: int, half_life: float = 512.0) -> None:
        super().__init__(layers, experts, half_life)
