"""The minimal layer over torch's grouped product: a few launches whatever the number of experts, nothing read back.

Large buffers are dropped or used again as soon as they may be: what is saved is small, and so should the peak be.

Shapes: R rows, K choices per row, L local experts, N sorted pairs, H hidden, I intermediate, O outputs, M inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe.assignment import Assignment
from moe.kernels import activation, probe
from moe.kernels.combine import combine
from moe.kernels.grouped import group_ends
from moe.kernels.stack import Gradients, Needs, Stack, gather_scores, spread_scores

_COLUMNS = 8  # the narrowest operand that the grouped product takes in half precision: 16 bytes


def forward(
    x_RH: Tensor, weights_RK: Tensor, stack: Stack, assignment: Assignment, keep: bool
) -> tuple[Tensor, Tensor | None]:
    score_N = spread_scores(weights_RK, assignment, x_RH.dtype)
    h_N2I = _product(x_RH[assignment.row_N], stack.up_L2IH, assignment)
    if stack.up_bias_L2I is not None:
        h_N2I += stack.up_bias_L2I[expert_of(assignment)]
    a_NI = scaled(h_N2I, score_N, stack)
    kept = h_N2I if keep else None
    del h_N2I
    y_NH = _product(a_NI, stack.down_LHI, assignment)
    del a_NI
    if stack.down_bias_LH is not None:
        y_NH.addcmul_(score_N[:, None].to(y_NH.dtype), stack.down_bias_LH[expert_of(assignment)])
    return combine(y_NH, assignment), kept


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
    score_N = spread_scores(weights_RK, assignment, x_RH.dtype)
    dy_NH = dout_RH[assignment.row_N]
    a_NI = torch.nn.functional.grouped_mm(dy_NH, stack.down_LHI, offs=group_ends(assignment.counts_L))
    dh_N2I = h_N2I if overwrite else torch.empty_like(h_N2I)
    a_NI, ds_N = scaled_backward(a_NI, h_N2I, score_N, stack, dh_N2I)
    if needs.down:
        found.down = weight_gradient(dy_NH, a_NI, assignment, stack.form.transposed)
    del a_NI
    if stack.down_bias_LH is not None and needs.weights:
        bias_NH = stack.down_bias_LH[expert_of(assignment)]
        ds_N += torch.linalg.vecdot(dy_NH, bias_NH).to(ds_N.dtype)
        del bias_NH
    if needs.down_bias:
        found.down_bias = column_sums(dy_NH, score_N, assignment)
    del dy_NH
    finish(found, dh_N2I, ds_N, x_RH, weights_RK, stack, assignment, needs)
    return found


def finish(
    found: Gradients,
    dh_N2I: Tensor,
    ds_N: Tensor,
    x_RH: Tensor,
    weights_RK: Tensor,
    stack: Stack,
    assignment: Assignment,
    needs: Needs,
) -> None:
    """From the gradient of h to those of x, the scores and the up projection. dx first: its rows go before dW comes."""
    if needs.weights:
        found.weights = gather_scores(ds_N, weights_RK, assignment)
    if needs.x:
        ends_L = group_ends(assignment.counts_L)
        found.x = combine(torch.nn.functional.grouped_mm(dh_N2I, stack.up_L2IH, offs=ends_L), assignment)
    if needs.up_bias:
        found.up_bias = column_sums(dh_N2I, None, assignment)
    if needs.up:
        found.up = weight_gradient(dh_N2I, x_RH[assignment.row_N], assignment, stack.form.transposed)


def scaled(h_N2I: Tensor, score_N: Tensor, stack: Stack) -> Tensor:
    """:func:`moe.kernels.activation.scaled`, in one kernel where there is one."""
    if probe.fuses_elementwise(h_N2I, stack.form):
        from moe.kernels import elementwise

        return elementwise.scaled(h_N2I, score_N)
    return activation.scaled(h_N2I, score_N, stack.form)


def scaled_backward(
    da_NI: Tensor, h_N2I: Tensor, score_N: Tensor, stack: Stack, dh_N2I: Tensor
) -> tuple[Tensor, Tensor]:
    """:func:`moe.kernels.activation.scaled_backward`, in one kernel where there is one."""
    if probe.fuses_elementwise(h_N2I, stack.form):
        from moe.kernels import elementwise

        return elementwise.scaled_backward(da_NI, h_N2I, score_N, dh_N2I)
    return activation.scaled_backward(da_NI, h_N2I, score_N, stack.form, dh_N2I)


def _product(x_NM: Tensor, weight_LOM: Tensor, assignment: Assignment) -> Tensor:
    return torch.nn.functional.grouped_mm(x_NM, weight_LOM.transpose(1, 2), offs=group_ends(assignment.counts_L))


def weight_gradient(dy_NO: Tensor, x_NM: Tensor, assignment: Assignment, transposed: bool) -> Tensor:
    """Per expert ``dy.T @ x``, [L,O,M], or its transpose if the weight is stored so. Zero for no rows."""
    left, right = (x_NM, dy_NO) if transposed else (dy_NO, x_NM)
    return torch.nn.functional.grouped_mm(left.T, right, offs=group_ends(assignment.counts_L))


def column_sums(d_NO: Tensor, score_N: Tensor | None, assignment: Assignment) -> Tensor:
    """Per expert the sum of its rows, each times its score, [L,O]: a product, for its order of additions is fixed."""
    ones_NC = d_NO.new_ones(d_NO.shape[0], _COLUMNS)
    if score_N is not None:
        ones_NC.mul_(score_N[:, None].to(d_NO.dtype))
    return weight_gradient(d_NO, ones_NC, assignment, transposed=False)[..., 0].contiguous()


def expert_of(assignment: Assignment) -> Tensor:
    """The local expert of each sorted pair, [N]."""
    local_L = torch.arange(assignment.counts_L.numel(), device=assignment.counts_L.device)
    return local_L.repeat_interleave(assignment.counts_L, output_size=assignment.pair_N.numel())
