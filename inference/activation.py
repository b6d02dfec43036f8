"""Policies that recognise what a text is about by the experts it has used.

Shapes: L MoE layers, E experts of each, N of them used in one call, M remembered patterns.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from inference.native import opened
from inference.policies import Policy, Scores

_EPSILON = 1e-3


class ActivationMatrix(Policy):
    """MoE-Infinity's replacement (arXiv 2401.14361): how often this sequence, and the one most like it, used an expert.

    A sequence's activation matrix counts [L,E] uses. Finished ones are remembered, at most ``memory`` of them; the
    newest replaces the one it resembles most. Likeness is the mean over layers of the cosine of matching rows. An
    expert's score is its share of its layer's uses, in this sequence and in the matched one, times ``1 - l / L``:
    early layers are the ones whose fetch nothing hides.
    """

    def __init__(self, layers: int, experts: int, memory: int = 64) -> None:
        super().__init__(layers, experts)
        self.memory = memory
        self._now_LE = np.zeros((layers, experts))
        self._known_MLE = np.zeros((0, layers, experts))  # rows of unit length
        self._match_LE = np.zeros((layers, experts))
        self._matched_round = -1
        self._early_L1 = (1 - np.arange(layers) / layers)[:, None]

    def begin(self) -> None:
        """Remember the sequence that ended."""
        if self._now_LE.any():
            pattern_LE = _unit_rows(self._now_LE)
            if len(self._known_MLE) < self.memory:
                self._known_MLE = np.concatenate([self._known_MLE, pattern_LE[None]])
            else:
                self._known_MLE[self._likeness_M(pattern_LE).argmax()] = pattern_LE
        self._now_LE[:] = 0
        self._match_LE[:] = 0

    def _likeness_M(self, pattern_LE: np.ndarray) -> np.ndarray:
        return np.asarray(np.einsum("mle,le->m", self._known_MLE, pattern_LE))

    def _note(self, row: int, experts_N: np.ndarray) -> None:
        self._now_LE[row, experts_N] += 1
        if self.round != self._matched_round and len(self._known_MLE):
            self._matched_round = self.round
            best_LE = self._known_MLE[self._likeness_M(_unit_rows(self._now_LE)).argmax()]
            self._match_LE = best_LE / np.maximum(best_LE.sum(1, keepdims=True), 1e-12)

    @property
    def likely_LE(self) -> np.ndarray:
        """Shares of their layer's uses in this sequence plus those in the matched one."""
        share_LE = self._now_LE / np.maximum(self._now_LE.sum(1, keepdims=True), 1)
        return np.asarray(share_LE + self._match_LE)

    def scores(self) -> Scores:
        return np.asarray((self.likely_LE + _EPSILON) * self._early_L1)


class ExpertMap(Policy):
    """FineMoE's (EuroSys'26, first called fMoE) replacement: what followed when the layers so far looked like this.

    A map is one round's experts [L,E]. After each layer the remembered map is found whose rows up to here have the
    largest cosine with this round's; for the layers still to come it says how likely each expert is. The score is that
    likelihood plus how often the expert was used, both as shares. Of a full memory the map that resembles the new one
    most is replaced.
    """

    def __init__(self, layers: int, experts: int, memory: int = 256) -> None:
        super().__init__(layers, experts)
        self.memory = memory
        # Maps twice: as flags side by side, which one product compares with a call, and as flat indices into [L,E].
        self._flags_LEM = np.zeros((layers, experts, memory), dtype=np.float32)
        self._maps: list[np.ndarray] = []
        self._now: list[np.ndarray] = []  # of this round, call by call
        self._dots_M = np.zeros(memory, dtype=np.float32)
        self._flags_at = [flags_EM.ctypes.data for flags_EM in self._flags_LEM]
        self._dots_at = self._dots_M.ctypes.data
        self._uses_LE = np.zeros((layers, experts))
        self._total_L1 = np.full((layers, 1), 1e-12)
        self._worth = 1.0  # of a use now: it grows, instead of all counts shrinking at each call
        self._match = -1

    def use(self, row: int, experts_N: Sequence[int] | np.ndarray) -> None:
        if row <= self.row:
            self._remember()
        super().use(row, experts_N)

    def _remember(self) -> None:
        now, flags_XM = np.concatenate(self._now), self._flags_LEM.reshape(-1, self.memory)
        if len(self._maps) < self.memory:
            slot = len(self._maps)
            self._maps.append(now)
        else:
            slot = int(self._dots_M.argmax())
            flags_XM[self._maps[slot], slot] = 0
            self._maps[slot] = now
        flags_XM[now, slot] = 1
        self._now.clear()
        self._dots_M[:] = 0

    def _note(self, row: int, experts_N: np.ndarray) -> None:
        self._now.append(experts_N + row * self.experts)
        self._worth *= 2.0 ** (1 / (64 * self.layers))
        if self._worth > 1e100:
            self._uses_LE /= self._worth
            self._total_L1 /= self._worth
            self._worth = 1.0
        uses_E = self._uses_LE[row]
        uses_E[experts_N] += self._worth
        self._total_L1[row] += self._worth * len(experts_N)
        known = len(self._maps)
        if not known:
            return
        # Every map has as many ones in a row as the model has choices, so dot products order as cosines do.
        if isinstance(routines := opened(), str):
            self._dots_M += np.add.reduce(self._flags_LEM[row].take(experts_N, 0))
            self._match = int(self._dots_M[:known].argmax())
        else:
            named_N = np.ascontiguousarray(experts_N)
            of_call = (known, len(named_N), named_N.ctypes.data)
            self._match = routines.map_match(self._flags_at[row], self.memory, self._dots_at, *of_call)

    @property
    def likely_LE(self) -> np.ndarray:
        """What the matched map names for layers ahead, plus the shares of all uses."""
        return self.scores()

    def scores(self) -> Scores:
        likely_LE = self._uses_LE / self._total_L1
        if self._match >= 0:
            map_X = self._maps[self._match]
            ahead = map_X.searchsorted((self.row + 1) * self.experts)
            likely_LE.reshape(-1)[map_X[ahead:]] += 1
        return np.asarray(likely_LE)


def _unit_rows(counts_LE: np.ndarray) -> np.ndarray:
    return np.asarray(counts_LE / np.maximum(np.linalg.norm(counts_LE, axis=1, keepdims=True), 1e-12))
