"""The minimal layer as a loop of dense products: for CPUs, and for what torch's grouped product refuses.

One expert's rows are gathered, multiplied and activated while they are in the cache; whole are only h, y and dx.

Shapes: R rows, K choices per row, L local experts, N sorted pairs, H hidden, I intermediate.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from moe.assignment import Assignment
from moe.kernels.activation import scaled, scaled_backward
from moe.kernels.combine import combine, empty_pairs
from moe.kernels.stack import Gradients, Needs, Stack, gather_scores, spread_scores


def _spans(assignment: Assignment) -> Iterator[tuple[int, slice]]:
    """Each expert that has pairs, and where they lie. Reads the counts back: no pass for a GPU that must not wait."""
    start = 0
    for expert, count in enumerate(assignment.counts_L.tolist()):
        if count:
            yield expert, slice(start, start + count)
        start += count


def forward(
    x_RH: Tensor, weights_RK: Tensor, stack: Stack, assignment: Assignment, keep: bool
) -> tuple[Tensor, Tensor | None]:
    row_N = assignment.row_N
    score_N = spread_scores(weights_RK, assignment, x_RH.dtype)
    y_NH = empty_pairs(x_RH, x_RH.shape[1], assignment)
    h_N2I = x_RH.new_empty(row_N.numel(), stack.up_L2IH.shape[1]) if keep else None
    up, down = stack.up_L2IH.unbind(0), stack.down_LHI.unbind(0)
    for e, pairs in _spans(assignment):
        h = torch.mm(x_RH.index_select(0, row_N[pairs]), up[e].T, out=None if h_N2I is None else h_N2I[pairs])
        if stack.up_bias_L2I is not None:
            h += stack.up_bias_L2I[e]
        torch.mm(scaled(h, score_N[pairs], stack.form), down[e].T, out=y_NH[pairs])
        if stack.down_bias_LH is not None:
            y_NH[pairs] += (score_N[pairs, None] * stack.down_bias_LH[e]).to(y_NH.dtype)
    return combine(y_NH, assignment), h_N2I


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
    row_N = assignment.row_N
    score_N = spread_scores(weights_RK, assignment, x_RH.dtype)
    ds_N = torch.empty_like(score_N)
    dx_NH = empty_pairs(x_RH, x_RH.shape[1], assignment) if needs.x else None
    found = _zero_gradients(stack, assignment, needs)
    up, down = stack.up_L2IH.unbind(0), stack.down_LHI.unbind(0)
    for e, pairs in _spans(assignment):
        dy, h, score = dout_RH.index_select(0, row_N[pairs]), h_N2I[pairs], score_N[pairs]
        dh = torch.empty_like(h)
        a, ds_N[pairs] = scaled_backward(dy @ down[e], h, score, stack.form, dh)
        _multiply(dy, a, stack.form.transposed, found.down, e)
        if found.down_bias is not None:
            found.down_bias[e] = score.to(dy.dtype) @ dy
        if needs.weights and stack.down_bias_LH is not None:
            ds_N[pairs] += (dy @ stack.down_bias_LH[e]).to(ds_N.dtype)
        if found.up_bias is not None:
            torch.sum(dh, 0, out=found.up_bias[e])
        if dx_NH is not None:
            torch.mm(dh, up[e], out=dx_NH[pairs])
        if found.up is not None:
            _multiply(dh, x_RH.index_select(0, row_N[pairs]), stack.form.transposed, found.up, e)
    found.x = None if dx_NH is None else combine(dx_NH, assignment)
    found.weights = gather_scores(ds_N, weights_RK, assignment) if needs.weights else None
    return found


def _multiply(left_NO: Tensor, right_NM: Tensor, transposed: bool, into_L: Tensor | None, expert: int) -> None:
    """Write one expert's weight gradient, [O,M] or transposed, as its weight is stored."""
    if into_L is None:
        return
    if transposed:
        torch.mm(right_NM.T, left_NO, out=into_L[expert])
    else:
        torch.mm(left_NO.T, right_NM, out=into_L[expert])


def _zero_gradients(stack: Stack, assignment: Assignment, needs: Needs) -> Gradients:
    """Wanted weight gradients, zero for experts without pairs; the rest is written by the loop."""
    empty_L = (assignment.counts_L == 0).nonzero().flatten().tolist()

    def fresh(like_L: Tensor | None, wanted: bool) -> Tensor | None:
        if like_L is None or not wanted:
            return None
        out_L = torch.empty(like_L.shape, dtype=like_L.dtype, device=like_L.device)
        for expert in empty_L:
            out_L[expert].zero_()
        return out_L

    return Gradients(
        up=fresh(stack.up_L, needs.up),
        down=fresh(stack.down_L, needs.down),
        up_bias=fresh(stack.up_bias_L2I, needs.up_bias),
        down_bias=fresh(stack.down_bias_LH, needs.down_bias),
    )
