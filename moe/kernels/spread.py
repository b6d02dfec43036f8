"""Rows to the places of their pairs.

Shapes: R rows, Q of them, K choices per row, N places, M of those rows' pairs that have one, H hidden.
"""

from __future__ import annotations

from torch import Tensor

from moe.assignment import Assignment, Sorted
from moe.kernels.probe import runs_triton


def may_be_early(x_RH: Tensor) -> bool:
    """Whether :func:`spread` can run before the host knows how many pairs have a place."""
    return runs_triton(x_RH.device)


def spread(x_RH: Tensor, found: Sorted | Assignment, size: int) -> Tensor:
    """The row of each sorted pair, [size,H].

    Args:
        size: as many places as are wanted: rows behind the last pair's are undefined, pairs behind the last place are
            left out.
    """
    if runs_triton(x_RH.device):
        from moe.kernels import elementwise

        out_NH = x_RH.new_empty(size, x_RH.shape[1])
        elementwise.spread(x_RH, found.slot_RK, found.ends_L, out_NH)
        return out_NH
    pair_N = found.pair_S if isinstance(found, Sorted) else found.pair_N
    return x_RH[pair_N[:size] // found.slot_RK.shape[1]]


def spread_into(out_NH: Tensor, x_QH: Tensor, slot_QK: Tensor, pair_M: Tensor, found: Assignment) -> None:
    """The same of some of the rows among others', whose slots and sorted pairs are given."""
    if runs_triton(x_QH.device):
        from moe.kernels import elementwise

        elementwise.spread(x_QH, slot_QK, found.ends_L, out_NH)
    else:
        out_NH[slot_QK.flatten()[pair_M]] = x_QH[pair_M // slot_QK.shape[1]]
