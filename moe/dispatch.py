"""How tokens reach the ranks that hold their experts, and how the results come back, in six phases.

The phases are named as in Megatron-Core. Payloads leave in ``token_dispatch`` and ``token_combine`` and are waited for
in the phase after, so that other work fits in between that does not need the experts. Deduplicated tokens for experts
without an adapter usually go by :mod:`moe.guests` instead, which sends the same, in a schedule of its own.

Shapes: T tokens, K choices per token, C choices per row (1 or K), W ranks, R rows that are here, H hidden.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from moe.aside import Aside
from moe.assignment import Assignment, assign
from moe.copies import DeduplicatedDraft, Draft, PlainDraft
from moe.exchange import Flight, Headcount, arrive, come_back, send, send_back

Mix = Callable[[Tensor, Tensor, Assignment], Tensor]  # Experts.mix


@dataclass(frozen=True)
class Routed:
    """Tokens and their routing: ``x`` [T,H], ``index`` [T,K] with global expert ids, ``weights`` [T,K]."""

    x_TH: Tensor
    index_TK: Tensor
    weights_TK: Tensor


@dataclass(frozen=True)
class Arrived:
    """What this rank's experts have to do: the arguments of ``Experts.mix``."""

    x_RH: Tensor
    weights_RC: Tensor
    assignment: Assignment


@dataclass
class Trip:
    """One call's way through the six phases."""

    routed: Routed
    flight: Flight | None = None
    sent: tuple[Tensor, Tensor, Tensor] | None = None
    y_RH: Tensor | None = None


class Dispatcher(ABC):
    """Between a gate and the experts."""

    @abstractmethod
    def dispatch_preprocess(self, routed: Routed) -> Trip:
        """Plan where every token goes."""

    @abstractmethod
    def token_dispatch(self, trip: Trip) -> None:
        """Begin to send."""

    @abstractmethod
    def dispatch_postprocess(self, trip: Trip) -> Arrived:
        """Wait for what was sent here, and say what is to be done with it."""

    def combine_preprocess(self, trip: Trip, y_RH: Tensor) -> None:
        """Take the experts' results, a row for each that arrived."""
        trip.y_RH = y_RH

    @abstractmethod
    def token_combine(self, trip: Trip) -> None:
        """Begin to return them."""

    @abstractmethod
    def combine_postprocess(self, trip: Trip) -> Tensor:
        """Wait for what was returned here, and sum it for each token: [T,H]."""


class Local(Dispatcher):
    """All experts are here: nothing is sent, and nothing is read back from a GPU."""

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts

    def dispatch_preprocess(self, routed: Routed) -> Trip:
        return Trip(routed)

    def token_dispatch(self, trip: Trip) -> None:
        pass

    def dispatch_postprocess(self, trip: Trip) -> Arrived:
        routed = trip.routed
        return Arrived(routed.x_TH, routed.weights_TK, assign(routed.index_TK, self.num_experts))

    def token_combine(self, trip: Trip) -> None:
        pass

    def combine_postprocess(self, trip: Trip) -> Tensor:
        assert trip.y_RH is not None
        return trip.y_RH


class AllToAll(Dispatcher):
    """One copy per (token, choice); rank r of the group holds experts [r*L, (r+1)*L).

    Ranks without tokens take part. The host waits once, in ``dispatch_preprocess``, for the numbers of rows.
    """

    def __init__(self, num_experts: int, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        self.num_local = num_experts // self.ranks

    def dispatch_preprocess(self, routed: Routed) -> Trip:
        draft = self._draft(routed.index_TK)
        counts = Headcount(draft.counts_W2, self.rank, self.group, Aside(routed.index_TK.device))
        return Trip(routed, Flight(draft.route(*counts.read()), self.group))

    def _draft(self, index_TK: Tensor) -> Draft:
        return PlainDraft.of(index_TK, self.ranks, self.num_local)

    def token_dispatch(self, trip: Trip) -> None:
        assert trip.flight is not None
        shape = trip.flight.route.weights_shape
        trip.sent = send(trip.flight, trip.routed.x_TH, trip.routed.weights_TK.reshape(shape))

    def dispatch_postprocess(self, trip: Trip) -> Arrived:
        assert trip.flight is not None
        assert trip.sent is not None
        *rows, experts_RC = trip.sent
        trip.sent = None
        x_RH, weights_RC = arrive(trip.flight, *rows)
        return Arrived(x_RH, weights_RC, assign(experts_RC, self.num_local, trip.flight.route.pairs))

    def token_combine(self, trip: Trip) -> None:
        assert trip.flight is not None
        assert trip.y_RH is not None
        trip.y_RH = send_back(trip.flight, trip.y_RH)

    def combine_postprocess(self, trip: Trip) -> Tensor:
        assert trip.flight is not None
        assert trip.y_RH is not None
        return come_back(trip.flight, trip.y_RH)


class Deduplicated(AllToAll):
    """One copy per token and remote rank, whose experts' results come back as one row (as in DeepEP).

    Tokens whose experts are here do not travel. With K choices, W ranks and balanced routing about
    ``K (1 - 1/W) / ((W-1) (1 - (1 - 1/W)^K))`` times fewer rows do: 4.0 for K=8 and W=2.
    """

    def _draft(self, index_TK: Tensor) -> Draft:
        return DeduplicatedDraft.of(index_TK, self.ranks, self.num_local, self.rank)


EXCHANGES = {"all_to_all": AllToAll, "deduplicated": Deduplicated}


def mix_everywhere(
    dispatcher: Dispatcher, mix: Mix, routed: Routed, meanwhile: Callable[[], None] | None = None
) -> Tensor:
    """Every token through its experts, wherever they are: [T,H].

    Args:
        mix: the local experts, :meth:`moe.experts.Experts.mix`.
        meanwhile: what else to do while tokens are on their way.
    """
    trip = dispatcher.dispatch_preprocess(routed)
    dispatcher.token_dispatch(trip)
    if meanwhile is not None:
        meanwhile()
    arrived = dispatcher.dispatch_postprocess(trip)
    dispatcher.combine_preprocess(trip, mix(arrived.x_RH, arrived.weights_RC, arrived.assignment))
    dispatcher.token_combine(trip)
    return dispatcher.combine_postprocess(trip)
