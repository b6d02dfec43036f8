"""Which experts the next layers will want, said before their gates have chosen.

A predictor watches every layer call, as a policy does, and gives experts with chances for the layer calls to come. How
likely the r-th of its guesses is to come true is not assumed but counted while it runs, for each distance, so chances
of all predictors mean the same and can be weighed against the cost of a transfer. The same objects serve the runtime
and the replay of recorded traces. No torch here.

Shapes: L MoE layers, counted from 0 by *row*; E experts of each; N of them used in one call; D layer calls ahead.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from inference.activation import ActivationMatrix, ExpertMap

LEAST_CHANCE = 0.05  # below it nothing is worth looking at


def worth_fetching(chance: float, victim_chance: float, *, fetch_s: float, delay_s: float) -> bool:
    """Whether a prefetch gains more than it costs on average.

    If it is right, a fetch less is waited for. What it evicted, that fetch would have evicted too; so only if it is
    wrong does the loss of the victim count, beside the time that other copies waited for a useless one.

    Args:
        chance: that the expert is wanted.
        victim_chance: that what it takes the slot from is wanted at its layer's next turn; 0 for a free slot.
        fetch_s: of one expert.
        delay_s: for how long a useless copy holds up copies that are wanted.
    """
    return chance * fetch_s > (1 - chance) * (delay_s + victim_chance * fetch_s)


@dataclass(frozen=True)
class Suggestion:
    """Experts that the call of layer ``row``, ``distance`` layer calls from now, may want; the likeliest first.

    ``chance_N`` are probabilities in the same order, never rising.
    """

    row: int
    distance: int
    experts_N: np.ndarray
    chance_N: np.ndarray


class Predictor(ABC):
    """Base of all predictors.

    In each layer call :meth:`observe` comes first, then :meth:`suggest`.

    Args:
        layers, experts, top_k: of the model.
        lead: for how many layer calls ahead it suggests. The one after the last layer is the first layer's, of the
            next token.

    Attributes:
        wanted, found: experts that calls wanted for which there had been suggestions, and how many of them were among
            the first so many suggested; for one call ahead.
    """

    HALF_LIFE = 64  # layer calls of one distance after which what was counted weighs half
    _PRIOR = 8  # layer calls that the first guess weighs

    def __init__(self, layers: int, experts: int, top_k: int, lead: int = 1) -> None:
        assert 1 <= top_k <= experts, (experts, top_k)
        assert lead >= 0, lead
        self.layers, self.experts, self.top_k = layers, experts, top_k
        self.lead = min(lead, layers)
        self.wanted = self.found = 0
        # Before anything is counted: even odds for as many as a token uses, little for the rest.
        start_E = np.where(np.arange(experts) < top_k, 0.5, 0.5 * top_k / experts / 4)
        self._true_DE = np.tile(start_E, (self.lead, 1))
        self._judged_D = np.zeros(self.lead)
        self._pending: dict[tuple[int, int], np.ndarray] = {}
        self._step = 1 - 0.5 ** (1 / self.HALF_LIFE)

    @property
    def recall(self) -> float:
        """Share of the wanted experts that had been suggested, one call ahead; 0 before any was."""
        return self.found / max(self.wanted, 1)

    def begin(self) -> None:
        """A new sequence starts."""
        self._pending.clear()

    def observe(self, row: int, experts_N: Sequence[int] | np.ndarray, ahead_DE: np.ndarray | None = None) -> None:
        """One layer call wants these distinct experts.

        Args:
            ahead_DE: scores of the experts of the next D calls that were computed from this call's input on the
                device, for predictors that use them; larger is likelier.
        """
        experts_N = np.asarray(experts_N, dtype=np.intp)
        self._check(row, experts_N)
        self._note(row, experts_N, ahead_DE)

    def suggest(self, row: int) -> list[Suggestion]:
        """After layer ``row``'s call was observed: nearest calls first, at most one suggestion for each."""
        suggestions = []
        for distance in range(1, self.lead + 1):
            target = (row + distance) % self.layers
            scores_E = self._scores(target, distance)
            if scores_E is None:
                continue
            order_E = np.argsort(-scores_E, kind="stable")
            self._pending[target, distance] = order_E
            # Counted shares may rise here and there by chance; a better guess is never the less likely one.
            chance_E = np.maximum.accumulate(self._true_DE[distance - 1, ::-1])[::-1]
            suggestions.append(Suggestion(target, distance, order_E, chance_E))
        return suggestions

    def _check(self, row: int, experts_N: np.ndarray) -> None:
        """Count how suggestions for this call came out."""
        for distance in range(1, self.lead + 1):
            order_E = self._pending.pop((row, distance), None)
            if order_E is None:
                continue
            used_E = np.zeros(self.experts)
            used_E[experts_N] = 1
            came_E = used_E[order_E]
            self._judged_D[distance - 1] += 1
            step = max(self._step, 1 / (self._judged_D[distance - 1] + self._PRIOR))
            self._true_DE[distance - 1] += step * (came_E - self._true_DE[distance - 1])
            if distance == 1:
                self.wanted += len(experts_N)
                self.found += int(came_E[: len(experts_N)].sum())

    @abstractmethod
    def _note(self, row: int, experts_N: np.ndarray, ahead_DE: np.ndarray | None) -> None:
        """Update what scores are made of."""

    @abstractmethod
    def _scores(self, row: int, distance: int) -> np.ndarray | None:
        """Scores [E] for the call of ``row``, ``distance`` calls from now; None where nothing can be said."""


class NoPrediction(Predictor):
    """Suggests nothing: every expert is fetched when it is wanted."""

    def __init__(self, layers: int, experts: int, top_k: int, lead: int = 0) -> None:
        super().__init__(layers, experts, top_k, 0)

    def _note(self, row: int, experts_N: np.ndarray, ahead_DE: np.ndarray | None) -> None:
        pass

    def _scores(self, row: int, distance: int) -> np.ndarray | None:
        return None


class SameAsLast(Predictor):
    """A layer will want what it wanted at the last token; after those, what it wanted at the tokens before."""

    def __init__(self, layers: int, experts: int, top_k: int, lead: int = 1) -> None:
        super().__init__(layers, experts, top_k, lead)
        self._recent_LE = np.zeros((layers, experts))

    def begin(self) -> None:
        super().begin()
        self._recent_LE[:] = 0

    def _note(self, row: int, experts_N: np.ndarray, ahead_DE: np.ndarray | None) -> None:
        self._recent_LE[row] *= 0.5
        self._recent_LE[row, experts_N] += 1

    def _scores(self, row: int, distance: int) -> np.ndarray | None:
        return self._recent_LE[row] if self._recent_LE[row].any() else None


class TraceMatch(Predictor):
    """MoE-Infinity's (arXiv 2401.14361): what sequences that used experts as this one does used in the layers ahead.

    The remembered activation matrix nearest to this sequence's says how likely each expert is, and so does this
    sequence itself; both as shares of their layer's uses.
    """

    def __init__(self, layers: int, experts: int, top_k: int, lead: int = 1) -> None:
        super().__init__(layers, experts, top_k, lead)
        self._matrix = ActivationMatrix(layers, experts)

    def begin(self) -> None:
        super().begin()
        self._matrix.begin()

    def _note(self, row: int, experts_N: np.ndarray, ahead_DE: np.ndarray | None) -> None:
        self._matrix.use(row, experts_N)

    def _scores(self, row: int, distance: int) -> np.ndarray | None:
        likely_E = self._matrix.likely_LE[row]
        return likely_E if likely_E.any() else None


class MapMatch(Predictor):
    """FineMoE's trajectory search (EuroSys'26): what followed when the layers so far looked as at this token.

    Experts that the matched map does not name are ordered by how often they were used. Its search among embeddings of
    the prompt, for the first layers, is left out: there :class:`SameAsLast` has an answer.
    """

    def __init__(self, layers: int, experts: int, top_k: int, lead: int = 1) -> None:
        super().__init__(layers, experts, top_k, lead)
        self._map = ExpertMap(layers, experts)

    def _note(self, row: int, experts_N: np.ndarray, ahead_DE: np.ndarray | None) -> None:
        self._map.use(row, experts_N)

    def _scores(self, row: int, distance: int) -> np.ndarray | None:
        likely_LE = self._map.likely_LE
        # Past the last layer another token begins, which has no trajectory yet.
        return likely_LE[row] if likely_LE[row].any() else None


class Lookahead(Predictor):
    """What was computed from this layer's input: the next layers' own gates applied to it, or trained heads.

    Those run on the device, and :attr:`device_part` tells the runtime which function to call with a layer's row and
    input [T,H] for the scores [D,E], which :meth:`observe` then gets. A replay hands over recorded ones.
    """

    def __init__(
        self, layers: int, experts: int, top_k: int, lead: int = 1, device_part: Callable[..., Any] | None = None
    ) -> None:
        super().__init__(layers, experts, top_k, lead)
        self.device_part = device_part
        self._ahead_DE: np.ndarray | None = None

    def begin(self) -> None:
        super().begin()
        self._ahead_DE = None

    def _note(self, row: int, experts_N: np.ndarray, ahead_DE: np.ndarray | None) -> None:
        self._ahead_DE = ahead_DE

    def _scores(self, row: int, distance: int) -> np.ndarray | None:
        if self._ahead_DE is None or distance > len(self._ahead_DE):
            return None
        scores_E = self._ahead_DE[distance - 1]
        return scores_E if np.isfinite(scores_E).all() else None


PREDICTORS: dict[str, Callable[..., Predictor]] = {
    "none": NoPrediction,
    "same_as_last": SameAsLast,
    "trace_match": TraceMatch,
    "map_match": MapMatch,
    "next_gate": Lookahead,
    "heads": Lookahead,
}
