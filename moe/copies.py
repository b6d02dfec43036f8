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

Counts = Sequence[Sequence[int]]  # [W][2]: rows that travel, and (row, choice) pairs that have an expert there


@dataclass(frozen=True)
class Fan:
    """How rows become copies, and copies rows; each is the other's adjoint.

    Attributes:
        source_S: the row of each copy.
        slot_QP: where each row's copies stand; -1 for each that it has fewer than P.
    """

    source_S: Tensor
    slot_QP: Tensor

    def copies(self, x_QH: Tensor) -> Tensor:
        return x_QH[self.source_S]

    def total(self, y_SH: Tensor) -> Tensor:
        """The sum of each row's copies, [Q,H]; ``y`` has a row of zeros at its end, for -1.

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
        flat_S = index_TK.flatten()
        order_S = torch.argsort(flat_S, stable=True)
        slot_S = torch.empty_like(order_S)
        slot_S[order_S] = torch.arange(order_S.numel(), device=order_S.device)
        pairs_W = _choices_per_rank(index_TK, ranks, num_local).sum(0)
        return cls(
            torch.stack([pairs_W, pairs_W], 1),
            Fan(order_S // index_TK.shape[1], slot_S.view_as(index_TK)),
            Fan(order_S, slot_S.unsqueeze(1)),
            (flat_S[order_S] % num_local).to(narrow_type(num_local)).unsqueeze(1),
        )

    def route(self, sent: Counts, received: Counts) -> Route:
        splits = _rows(sent), _rows(received)
        return Route(self.rows, self.weights, self.experts_S1, self.experts_S1[:0], *splits, pairs=None)


@dataclass(frozen=True)
class DeduplicatedDraft(Draft):
    """Copies by rank, to one rank by token. All tokens stay, also those that have no expert here.

    Attributes:
        ends_WT: how many copies are sent up to and with that of token t to rank w, in that order.
        slot_TP: of the token's copy to every other rank.
    """

    index_TK: Tensor
    num_local: int
    ends_WT: Tensor
    slot_TP: Tensor
    stay_TK: Tensor

    @classmethod
    def of(cls, index_TK: Tensor, ranks: int, num_local: int, rank: int) -> DeduplicatedDraft:
        choices_TW = _choices_per_rank(index_TK, ranks, num_local)
        remote_W = torch.arange(ranks, device=index_TK.device) != rank
        travels_WT = (choices_TW > 0).T & remote_W.unsqueeze(1)
        ends_WT = travels_WT.flatten().cumsum(0).view_as(travels_WT)
        slot_WT = torch.where(travels_WT, ends_WT - 1, -1)
        return cls(
            torch.stack([travels_WT.sum(1), choices_TW.sum(0)], 1),
            index_TK,
            num_local,
            ends_WT,
            torch.cat([slot_WT[:rank], slot_WT[rank + 1 :]]).T.contiguous(),
            _local_numbers(index_TK, rank, num_local),
        )

    def route(self, sent: Counts, received: Counts) -> Route:
        number_S = torch.arange(1, sum(_rows(sent)) + 1, device=self.index_TK.device)
        # Where the count reaches each number; nonzero would wait for a GPU to learn how many there are.
        place_S = torch.searchsorted(self.ends_WT.flatten(), number_S)
        num_tokens = max(self.index_TK.shape[0], 1)
        token_S, target_S1 = place_S % num_tokens, (place_S // num_tokens).unsqueeze(1)
        fan = Fan(token_S, self.slot_TP)
        experts_SK = _local_numbers(self.index_TK[token_S], target_S1, self.num_local)
        pairs = sum(pairs for _, pairs in received)
        return Route(fan, fan, experts_SK, self.stay_TK, _rows(sent), _rows(received), pairs)


def narrow_type(num_local: int) -> torch.dtype:
    """The narrowest type that holds 0..L, in which expert numbers travel."""
    return torch.int16 if num_local < 1 << 15 else torch.int32


def _choices_per_rank(index_TK: Tensor, ranks: int, num_local: int) -> Tensor:
    """How many of a token's choices each rank holds, [T,W]."""
    rank_W = torch.arange(ranks, device=index_TK.device)
    return (index_TK.unsqueeze(-1) // num_local == rank_W).sum(1)


def _local_numbers(index: Tensor, rank: Tensor | int, num_local: int) -> Tensor:
    local = index - rank * num_local
    return local.masked_fill((local < 0) | (local >= num_local), num_local).to(narrow_type(num_local))


def _rows(counts: Counts) -> tuple[int, ...]:
    return tuple(rows for rows, _ in counts)
