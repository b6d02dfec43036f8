"""The minimal layer with gather, activation and scores inside Triton's products: no copy of rows, no pass of its own.

Plain silu experts only. What needs neither gather nor epilogue runs in torch's grouped product where that can.

Shapes: R rows, K choices per row, L local experts, N sorted pairs, H hidden, I intermediate.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe.assignment import Assignment
from moe.kernels import products
from moe.kernels.elementwise import gather_sum
from moe.kernels.grouped import group_ends
from moe.kernels.probe import refuses_grouped
from moe.kernels.stack import Gradients, Needs, Stack, gather_scores, spread_scores


def forward(
    x_RH: Tensor, weights_RK: Tensor, stack: Stack, assignment: Assignment, keep: bool
) -> tuple[Tensor, Tensor | None]:
    score_N = spread_scores(weights_RK, assignment, torch.float32)
    counts_L = assignment.counts_L
    x_RH = x_RH.contiguous()
    h_N2I, a_NI = products.up_projection(x_RH, assignment.row_N, stack.up_L, score_N, counts_L)
    kept = h_N2I if keep else None
    del h_N2I
    y_NH = _product(a_NI, stack.down_L.transpose(1, 2), counts_L)
    del a_NI
    return gather_sum(y_NH, assignment.slot_RK, assignment.pair_N.numel()), kept


def backward(
    dout_RH: Tensor,
    x_RH: Tensor,
    weights_RK: Tensor,
    h_N2I: Tensor,
    stack: Stack,
    assignment: Assignment,
    needs: Needs,
    overwrite: bool,
) -> Gradients:
    found = Gradients()
    score_N = spread_scores(weights_RK, assignment, torch.float32)
    counts_L, row_N = assignment.counts_L, assignment.row_N
    dh_N2I = h_N2I if overwrite else torch.empty_like(h_N2I)
    a_NI, ds_N = products.down_backward(dout_RH, row_N, stack.down_L, score_N, h_N2I, dh_N2I, counts_L)
    if needs.down:
        found.down = products.weight_gradient(dout_RH, a_NI, row_N, counts_L, gather="left")
    del a_NI
    if needs.weights:
        found.weights = gather_scores(ds_N, weights_RK, assignment)
    if needs.x:
        dx_NH = _product(dh_N2I, stack.up_L, counts_L)
        found.x = gather_sum(dx_NH, assignment.slot_RK, row_N.numel())
        del dx_NH
    if needs.up:
        found.up = products.weight_gradient(dh_N2I, x_RH.contiguous(), row_N, counts_L, gather="right")
    return found


def _product(x_NM: Tensor, weight_LMO: Tensor, counts_L: Tensor) -> Tensor:
    if refuses_grouped(x_NM.device, x_NM.dtype, *weight_LMO.shape[1:]):
        return products.product(x_NM, weight_LMO, counts_L)
    return torch.nn.functional.grouped_mm(x_NM, weight_LMO, offs=group_ends(counts_L))
