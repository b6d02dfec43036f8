"""Rows to (row, choice) pairs and back, each other's derivative: neither needs an atomic addition or an index_put.

For assignments in which every choice has an expert. Shapes: T rows, K choices of each, N = T*K pairs sorted by expert.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe.assignment import Assignment


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TM: Tensor, assignment: Assignment) -> Tensor:
        ctx.assignment = assignment
        return x_TM.index_select(0, assignment.row_N)

    @staticmethod
    def backward(ctx: Any, d_NM: Tensor) -> tuple[Tensor, None]:
        return _Collect.apply(d_NM, ctx.assignment), None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_NM: Tensor, assignment: Assignment) -> Tensor:
        ctx.assignment = assignment
        return assignment.combine(y_NM)

    @staticmethod
    def backward(ctx: Any, d_TM: Tensor) -> tuple[Tensor, None]:
        return _Spread.apply(d_TM, ctx.assignment), None


def spread_rows(x_TM: Tensor, assignment: Assignment) -> Tensor:
    """Each pair's row, [N,M]."""
    assert assignment.complete
    return _Spread.apply(x_TM, assignment)


def collect_rows(y_NM: Tensor, assignment: Assignment) -> Tensor:
    """The sum over each row's pairs, [T,M]."""
    assert assignment.complete
    return _Collect.apply(y_NM, assignment)
