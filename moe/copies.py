"""Which copies of which tokens go to which rank: index arithmetic alone, without an exchange.

Two ways. *Plain*: one copy per (token, choice). *Deduplicated*: one copy per token and remote rank that holds any of
its experts, and the tokens stay as they are for the experts of their own rank. Each copy goes along with the receiver's
expert numbers and the router's weights of its choices, the receiver sums over them, and one row comes back.

All orders are functions of the routing alone, and so is every bit of the result. Nothing here reads from a GPU: what
the host must know (how many rows go where) it is told.

Shapes: T tokens, K choices per token, C choices per copy (1 or K), W ranks, L local experts, S copies sent, R rows that
the local experts see (tokens that stay, then copies received), Q rows of which copies are made, P copies of a row at
most, H features of a row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe.assignment import Sorted, sort_pairs
from moe.kernels.probe import runs_triton

Counts = Sequence[Sequence[int]]  # [W][2]: rows that travel, and (row, choice) pairs that have an expert there


@dataclass(frozen=True)
class Fan:
    """How rows become copies, and copies rows; each is the other's adjoint.

    Attributes:
        source_S: the row of each copy.
        slot_QP: where each row's copies stand; S, one past the end, for each that it has fewer than P.
    """

    source_S: Tensor
    slot_QP: Tensor

    def copies(self, x_QH: Tensor) -> Tensor:
        return x_QH[self.source_S]

    def total(self, y_SH: Tensor) -> Tensor:
        """The sum of each row's copies, [Q,H]; ``y`` has a row of zeros at its end.

        A gather, not an index_add: the order of additions is fixed.
        """
        if self.slot_QP.shape[1] == 1:
            return y_SH[self.slot_QP[:, 0]]
        return y_SH[self.slot_QP.flatten()].view(*self.slot_QP.shape, y_SH.shape[1]).sum(1)


@dataclass(frozen=True)
class Route:
    """One rank's part in an exchange.

    Attributes:
        rows: from tokens [T,...] to copies.
        weights: from the weights, as :attr:`weights_shape` views them, to those of the copies [S,C].
        experts_SC: the receiver's number of each choice's expert; L if it is not the receiver's.
        stay_TC: the same of the tokens that stay, [0,C] if none does.
        sent, received: rows to and from every rank.
        pairs: (row, choice) pairs that have a local expert here, or None if all R*C have.
    """

    rows: Fan
    weights: Fan
    experts_SC: Tensor
    stay_TC: Tensor
    sent: tuple[int, ...]
    received: tuple[int, ...]
    pairs: int | None

    @property
    def stay(self) -> int:
        return self.stay_TC.shape[0]

    @property
    def weights_shape(self) -> tuple[int, int]:
        """[T,K] if a copy takes along all its token's weights, [T*K,1] if it takes one."""
        return (-1, self.experts_SC.shape[1])


@dataclass(frozen=True)
class Draft(ABC):
    """What can be planned before the host knows how many rows travel: on a GPU, while it still waits for that.

    Attributes:
        counts_W2: what this rank sends to every rank: rows that travel, and pairs of a row and a choice.
    """

    counts_W2: Tensor

    @abstractmethod
    def route(self, sent: Counts, received: Counts) -> Route:
        """The whole plan. ``sent`` are :attr:`counts_W2`, ``received`` what every rank has counted for this one."""


@dataclass(frozen=True)
class PlainDraft(Draft):
    """Copies by expert, of one expert by (token, choice)."""

    rows: Fan
    weights: Fan
    experts_S1: Tensor

    @classmethod
    def of(cls, index_TK: Tensor, ranks: int, num_local: int) -> PlainDraft:
        found = sort_pairs(index_TK, ranks * num_local)
        order_S, slot_TK = found.pair_S, found.slot_RK
        pairs_W = found.counts_L.view(ranks, num_local).sum(1)
        return cls(
            torch.stack([pairs_W, pairs_W], 1),
            Fan(order_S // index_TK.shape[1], slot_TK),
            Fan(order_S, slot_TK.reshape(-1, 1)),
            (index_TK.flatten()[order_S] % num_local).to(narrow_type(num_local)).unsqueeze(1),
        )

    def route(self, sent: Counts, received: Counts) -> Route:
        splits = rows_of(sent), rows_of(received)
        return Route(self.rows, self.weights, self.experts_S1, self.experts_S1[:0], *splits, pairs=None)


@dataclass(frozen=True)
class DeduplicatedDraft(Draft):
    """Copies by rank, to one rank by token. All tokens stay, also those that have no expert here.

    Attributes:
        travels: (token, rank) pairs, sorted by rank, of tokens that go there.
        own: (token, choice) pairs whose expert is here, sorted by it.
    """

    index_TK: Tensor
    num_local: int
    rank: int
    travels: Sorted
    own: Sorted

    @classmethod
    def of(cls, index_TK: Tensor, ranks: int, num_local: int, rank: int) -> DeduplicatedDraft:
        first = rank * num_local
        if runs_triton(index_TK.device):
            from moe.kernels import sorting

            own, there, counts_W2 = sorting.sort_choices(index_TK, first, num_local, ranks)
            return cls(counts_W2, index_TK, num_local, rank, Sorted(*there), Sorted(*own))
        rank_W = torch.arange(ranks, device=index_TK.device)
        choices_TW = (index_TK.unsqueeze(-1) // num_local == rank_W).sum(1)
        travels = sort_pairs(torch.where((choices_TW > 0) & (rank_W != rank), rank_W, ranks), ranks)
        counts_W2 = torch.stack([travels.counts_L, choices_TW.sum(0)], 1)
        return cls(counts_W2, index_TK, num_local, rank, travels, sort_pairs(index_TK, num_local, first))

    def fan(self, sent: Counts) -> Fan:
        return Fan(self._copies(sent) // self.counts_W2.shape[0], self.travels.slot_RK)

    def route(self, sent: Counts, received: Counts) -> Route:
        fan = self.fan(sent)
        target_S1 = (self._copies(sent) % self.counts_W2.shape[0]).unsqueeze(1)
        experts_SK = _local_numbers(self.index_TK[fan.source_S], target_S1, self.num_local)
        stay_TK = _local_numbers(self.index_TK, self.rank, self.num_local)
        pairs = sum(pairs for _, pairs in received)
        return Route(fan, fan, experts_SK, stay_TK, rows_of(sent), rows_of(received), pairs)

    def _copies(self, sent: Counts) -> Tensor:
        return self.travels.pair_S[: sum(rows_of(sent))]


def narrow_type(num_local: int) -> torch.dtype:
    """The narrowest type that holds 0..L, in which expert numbers travel."""
    return torch.int16 if num_local < 1 << 15 else torch.int32


def _local_numbers(index: Tensor, rank: Tensor | int, num_local: int) -> Tensor:
    local = index - rank * num_local
    return local.masked_fill((local < 0) | (local >= num_local), num_local).to(narrow_type(num_local))


def rows_of(counts: Counts) -> tuple[int, ...]:
    return tuple(rows for rows, _ in counts)
