"""Rows to the places of their pairs.

Shapes: R rows, Q of them, K choices per row, N places, M of those rows' pairs that have one, H hidden.
"""

from __future__ import annotations

from torch import Tensor

from moe.assignment import Assignment, Sorted
from moe.kernels.probe import has_triton


def spread(x_RH: Tensor, found: Sorted | Assignment, size: int) -> Tensor:
    """The row of each sorted pair, [size,H].

    Args:
        size: how many pairs have a place. On a GPU, where the host need not know that yet, also more: the rows behind
            them are undefined.
    """
    if x_RH.is_cuda and has_triton():
        out_NH = x_RH.new_empty(size, x_RH.shape[1])
        spread_into(out_NH, x_RH, found.slot_RK, found)
        return out_NH
    pair_N = found.pair_S if isinstance(found, Sorted) else found.pair_N
    return x_RH[pair_N[:size] // found.slot_RK.shape[1]]


def spread_into(out_NH: Tensor, x_QH: Tensor, slot_QK: Tensor, pair_M: Tensor, found: Assignment) -> None:
    """The same of some of the rows among others', whose slots and sorted pairs are given."""
    if x_QH.is_cuda and has_triton():
        from moe.kernels import elementwise

        elementwise.spread(x_QH, slot_QK, found.counts_L, out_NH)
    else:
        out_NH[slot_QK.flatten()[pair_M]] = x_QH[pair_M // slot_QK.shape[1]]
