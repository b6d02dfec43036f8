"""Which experts are fetched before they are wanted: those whose chance is worth a slot and the link's time.

Shapes: L MoE layers, counted from 0 by *row*; E experts of each; D layer calls ahead.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from inference.cache import ExpertCache
from inference.predictors import LEAST_CHANCE, Predictor, Suggestion, worth_fetching
from inference.transfer import Transfer, TransferEngine, Urgency
from moe.refs import ExpertRef


class AbsentChances:
    """Corrects a predictor's chances for experts that are not resident.

    What a predictor is surest of is mostly resident already, so of the others fewer come true than of all. How many do
    is counted by their place among the absent ones, for each distance.

    Shapes: D distances, J places.
    """

    HALF_LIFE = 64  # layer calls
    _PRIOR = 2.0  # experts that the predictor's own word weighs

    def __init__(self, distances: int, places: int) -> None:
        self.places = places
        self._said_DJ = np.zeros((distances, places))
        self._came_DJ = np.zeros((distances, places))
        self._keep = 0.5 ** (1 / self.HALF_LIFE)
        self._open: dict[int, list[tuple[int, int, list[int], np.ndarray]]] = {}

    def chances(self, distance: int, chance_J: np.ndarray) -> np.ndarray:
        """Of the first absent experts, the predictor's chances for which are given."""
        said_J, came_J = self._said_DJ[distance - 1], self._came_DJ[distance - 1]
        factor_J = (came_J + self._PRIOR) / (said_J + self._PRIOR)
        return np.minimum(chance_J * factor_J[: len(chance_J)], 1.0)

    def ask(self, call: int, row: int, distance: int, experts: list[int], chance_J: np.ndarray) -> None:
        """These were absent, and may be wanted in the call of that number."""
        self._open.setdefault(call, []).append((row, distance, experts, chance_J))

    def answer(self, call: int, row: int, wanted: Sequence[int]) -> None:
        """What the call of that number wanted."""
        for asked_row, distance, experts, chance_J in self._open.pop(call, []):
            if asked_row == row and experts:
                said_J, came_J = self._said_DJ[distance - 1], self._came_DJ[distance - 1]
                said_J *= self._keep
                came_J *= self._keep
                said_J[: len(experts)] += chance_J
                came_J[: len(experts)] += np.isin(experts, wanted)


class Prefetcher:
    """Turns a predictor's suggestions into transfers.

    Args:
        predictor: says what may be wanted.
        window_share: which part of an expert's fetch a demand may have to wait for, see TransferEngine's window.

    Attributes:
        coming: experts on their way into a slot that was reserved for them ahead.
    """

    def __init__(
        self, predictor: Predictor, cache: ExpertCache, transfers: TransferEngine, window_share: float = 1.0
    ) -> None:
        self.predictor, self.cache, self.transfers = predictor, cache, transfers
        self.coming: dict[ExpertRef, Transfer] = {}
        self._target: dict[ExpertRef, int] = {}  # number of the call that a prefetch is for
        self._calls = 0
        self._window_share = min(window_share, 1.0)
        # How often each expert is used at its layer's turn, of late; and how often a call demands anything.
        self._rate_LE = np.zeros((predictor.layers, predictor.experts))
        self._keep = 0.5 ** (1 / 16)
        self._demanding = 1.0
        self._displaced = self._regretted = 0.0
        self._noted = (0, 0)
        self._forget_share = 0.5 ** (1 / 256)
        self._absent = AbsentChances(max(predictor.lead, 1), 2 * predictor.top_k)

    @property
    def most(self) -> int:
        """So many slots at most are reserved ahead: the others serve what is wanted now."""
        return self.cache.slots // 4

    def settle(self) -> None:
        """Have what has arrived resident."""
        for ref in [ref for ref, transfer in self.coming.items() if self.transfers.arrived(transfer)]:
            self._forget(ref)
            self.cache.commit(ref)

    def take(self, ref: ExpertRef) -> Transfer:
        """An expert on its way is wanted now: the caller waits for it and commits it."""
        return self._forget(ref)

    def _forget(self, ref: ExpertRef) -> Transfer:
        del self._target[ref]
        return self.coming.pop(ref)

    def after(self, row: int, experts: Sequence[int], demanded: bool, ahead_DE: np.ndarray | None) -> None:
        """The call of ``row`` is known: drop prefetches whose call has passed, and queue new ones."""
        self._calls += 1
        self._rate_LE[row] *= self._keep
        self._rate_LE[row, list(experts)] += 1 - self._keep
        self._demanding += (float(demanded) - self._demanding) / 64
        self._note_regret()
        self._absent.answer(self._calls, row, experts)
        self.predictor.observe(row, experts, ahead_DE)
        self._cancel_stale()
        for suggestion in self.predictor.suggest(row):
            self._follow(suggestion)
        self.transfers.pump()

    def _note_regret(self) -> None:
        """How many were displaced of late, and regretted: old ones are forgotten, so that it is tried again."""
        counts, (displaced, regretted) = self.cache.counts, self._noted
        self._displaced = self._displaced * self._forget_share + counts.displaced - displaced
        self._regretted = self._regretted * self._forget_share + counts.regretted - regretted
        self._noted = (counts.displaced, counts.regretted)

    def _cancel_stale(self) -> None:
        for ref in [ref for ref, call in self._target.items() if call <= self._calls]:
            if self.transfers.cancel(self.coming[ref]):
                self._forget(ref)
                self.cache.abandon(ref)
            else:
                self._target[ref] = self._calls + 1  # it has begun: let it arrive

    def _follow(self, suggestion: Suggestion) -> None:
        row, distance = suggestion.row, suggestion.distance
        layer, absent_N = self.cache.store.layers[row], self.cache.slot_LE[row, suggestion.experts_N] < 0
        absent_N &= suggestion.chance_N >= LEAST_CHANCE
        first_J = np.flatnonzero(absent_N)[: self._absent.places]
        experts, chance_J = suggestion.experts_N[first_J].tolist(), suggestion.chance_N[first_J]
        self._absent.ask(self._calls + distance, row, distance, experts, chance_J)
        if (room := min(len(experts), self.most - len(self.coming))) <= 0:
            return
        chances = self._absent.chances(distance, chance_J).tolist()
        takes: list[tuple[int, int] | None] = [None] * self.cache.free
        takes += self.cache.victims(room - len(takes))
        taken = 0
        for expert, chance, victim in zip(experts[:room], chances, takes, strict=False):
            if not self._worth(chance, victim):
                break  # the next expert is less likely, and what it would take is worth more
            ref = ExpertRef(layer, expert)
            self.cache.reserve_ahead(ref, victim)
            urgency = Urgency.NEXT if distance == 1 else Urgency.LATER
            self.coming[ref] = self.transfers.prefetch(ref, self.cache.block(ref), urgency)
            self._target[ref] = self._calls + distance
            taken += 1
        if taken:
            self.transfers.link.fence()

    def _worth(self, chance: float, victim: tuple[int, int] | None) -> bool:
        """In units of one fetch. Victims are wanted at least as often as those that made way of late were."""
        loss = 0.0 if victim is None else max(float(self._rate_LE[victim]), self._regretted / max(self._displaced, 8.0))
        return worth_fetching(chance, loss, fetch_s=1.0, delay_s=self._demanding * self._window_share)
