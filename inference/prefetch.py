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

    @property
    def most(self) -> int:
        """So many slots at most are reserved ahead: the others serve what is wanted now."""
        return self.cache.slots // 4

    def settle(self) -> None:
        """Have what has arrived resident."""
        for ref in [ref for ref, transfer in self.coming.items() if self.transfers.arrived(transfer)]:
            self._forget(ref)
            self.cache.commit(ref)

    def finish(self) -> None:
        """Drop what has not begun, and have the rest arrive and be resident."""
        for ref in [ref for ref, transfer in self.coming.items() if self.transfers.cancel(transfer)]:
            self._forget(ref)
            self.cache.abandon(ref)
        self.transfers.wait(list(self.coming.values()))
        for ref in list(self.coming):
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
        layer = self.cache.store.layers[suggestion.row]
        room = self.most - len(self.coming)
        likely = suggestion.experts_N[suggestion.chance_N >= LEAST_CHANCE]
        new = [int(e) for e in likely if self.cache.slot_LE[suggestion.row, e] < 0][: max(room, 0)]
        if not new:
            return
        chance = dict(zip(suggestion.experts_N.tolist(), suggestion.chance_N.tolist(), strict=True))
        takes: list[tuple[int, int] | None] = [None] * self.cache.free
        takes += self.cache.victims(len(new) - len(takes))
        taken = 0
        for expert, victim in zip(new, takes, strict=False):
            if not self._worth(chance[expert], victim):
                break  # the next expert is less likely, and what it would take is worth more
            ref = ExpertRef(layer, expert)
            self.cache.reserve_ahead(ref, victim)
            urgency = Urgency.NEXT if suggestion.distance == 1 else Urgency.LATER
            self.coming[ref] = self.transfers.prefetch(ref, self.cache.block(ref), urgency)
            self._target[ref] = self._calls + suggestion.distance
            taken += 1
        if taken:
            self.transfers.link.fence()

    def _worth(self, chance: float, victim: tuple[int, int] | None) -> bool:
        """In units of one fetch. Victims are wanted at least as often as those that made way of late were."""
        loss = 0.0 if victim is None else max(float(self._rate_LE[victim]), self._regretted / max(self._displaced, 8.0))
        return worth_fetching(chance, loss, fetch_s=1.0, delay_s=self._demanding * self._window_share)
