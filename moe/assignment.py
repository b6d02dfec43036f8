"""Which rows go to which local expert: (row, choice) pairs sorted by expert.

The sort is stable, so the order of pairs, and with it every bit of the result, is a function of the routing alone.

Shapes: R rows, K choices per row, L local experts, S = R*K pairs, N of them that have a local expert.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from moe.kernels.probe import runs_triton
from moe.stats import expert_counts


@dataclass(frozen=True)
class Assignment:
    """Made by :func:`assign`.

    Attributes:
        pair_N: which of the R*K flattened (row, choice) pairs stands at each sorted position.
        slot_RK: the sorted position of each pair; N (one past the end) for a choice that has no local expert.
        counts_L: pairs per local expert; the first ``counts_L[0]`` of the N belong to expert 0, and so on.
        complete: whether every choice has a local expert, so that N = R*K.
        ends: :attr:`ends_L`, where the sort has found it.
    """

    pair_N: Tensor
    slot_RK: Tensor
    counts_L: Tensor
    complete: bool
    ends: Tensor | None = None

    @property
    def row_N(self) -> Tensor:
        """The row of each sorted pair."""
        return self.pair_N // self.slot_RK.shape[1]

    @functools.cached_property
    def ends_L(self) -> Tensor:
        """Where each expert's pairs end, as torch's grouped product wants it; nothing is read back."""
        return self.counts_L.cumsum(0).to(torch.int32) if self.ends is None else self.ends

    def spread(self, weights_RK: Tensor) -> Tensor:
        """Values of (row, choice) pairs in sorted order, [N]."""
        return weights_RK.flatten()[self.pair_N]

    def combine(self, y_NH: Tensor) -> Tensor:
        """Sum over each row's choices: [N,H] -> [R,H]. A gather, not an index_add: the order of additions is fixed."""
        if not self.complete:
            y_NH = torch.cat([y_NH, y_NH.new_zeros(1, y_NH.shape[1])])
        return y_NH[self.slot_RK.flatten()].view(*self.slot_RK.shape, y_NH.shape[1]).sum(1)


class Sorted(NamedTuple):
    """What a device has sorted before the host knows how many pairs have an expert.

    Attributes:
        pair_S: as :attr:`Assignment.pair_N`; what stands behind the first N is undefined.
        ends_L: as :attr:`Assignment.ends_L`.
    """

    pair_S: Tensor
    slot_RK: Tensor
    counts_L: Tensor
    ends_L: Tensor

    def assignment(self, pairs: int) -> Assignment:
        """``pairs``: N, known to the host."""
        complete = pairs == self.pair_S.numel()
        return Assignment(self.pair_S[:pairs], self.slot_RK, self.counts_L, complete, self.ends_L)

    def early(self, size: int) -> Assignment:
        """The first ``size`` places, before the host knows whether there are so many or more."""
        return Assignment(self.pair_S[:size], self.slot_RK, self.counts_L, False, self.ends_L.clamp(max=size))


def sort_pairs(index_RK: Tensor, num_local: int, first: int = 0) -> Sorted:
    """Sort the pairs by expert, of those numbered from ``first`` on; others have none here. Reads nothing back."""
    if runs_triton(index_RK.device):
        from moe.kernels import sorting

        pair_S, slot_S, counts_L, ends_L = sorting.sort_pairs(index_RK, first, num_local)
        return Sorted(pair_S, slot_S.view(index_RK.shape), counts_L, ends_L)
    local_S = index_RK.flatten() - first
    local_S = local_S.masked_fill((local_S < 0) | (local_S >= num_local), num_local)
    pair_S = torch.argsort(local_S, stable=True)
    slot_S = torch.empty_like(pair_S)
    slot_S[pair_S] = torch.arange(pair_S.numel(), device=pair_S.device)
    counts_L = expert_counts(local_S, num_local + 1)[:num_local]
    ends_L = counts_L.cumsum(0)
    return Sorted(pair_S, torch.minimum(slot_S, counts_L.sum()).view_as(index_RK), counts_L, ends_L.to(torch.int32))


def join(first: Assignment, second: Assignment) -> Assignment:
    """The assignment of both parts' rows, the second's behind the first's: what sorting all of them would find.

    A pair moves by as many as the other part has before it: pairs of smaller experts, and of its own if it is of the
    second part.
    """
    if runs_triton(first.pair_N.device):
        from moe.kernels import sorting

        pair_N, slot_S, counts_L, ends_L = sorting.join(
            *((part.pair_N, part.slot_RK, part.ends_L) for part in (first, second))
        )
    else:
        counts_L, ends_L = first.counts_L + second.counts_L, first.ends_L + second.ends_L
        moves = second.ends_L - second.counts_L, first.ends_L
        pair_N = first.pair_N.new_empty(first.pair_N.numel() + second.pair_N.numel())
        slot_S = torch.full_like(torch.cat([first.slot_RK, second.slot_RK]).flatten(), pair_N.numel())
        before = 0
        for part, move_L in zip((first, second), moves, strict=True):
            position_N = torch.arange(part.pair_N.numel(), device=pair_N.device)
            place_N = position_N + move_L[torch.searchsorted(part.ends_L, position_N, right=True)]
            pair_N[place_N], slot_S[part.pair_N + before] = part.pair_N + before, place_N
            before += part.slot_RK.numel()
    slot_RK = slot_S.view(-1, first.slot_RK.shape[1])
    return Assignment(pair_N, slot_RK, counts_L, first.complete and second.complete, ends_L)


def assign(index_RK: Tensor, num_local: int, pairs: int | None = None) -> Assignment:
    """Sort the pairs by local expert.

    Args:
        index_RK: local expert of each choice; ``num_local`` for a choice that has none.
        pairs: how many choices have one, if not all have: the host must know it, and nothing is read back from a GPU.
    """
    return sort_pairs(index_RK, num_local).assignment(index_RK.numel() if pairs is None else pairs)
