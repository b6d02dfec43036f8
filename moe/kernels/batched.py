"""The minimal layer over torch's grouped product: a few launches whatever the number of experts, nothing read back.

Large buffers are dropped or used again as soon as they may be: what is saved is small, and so should the peak be.

Shapes: R rows, T of them own tokens, K choices per row, L local experts, N sorted pairs (M of one part of the rows),
H hidden, I intermediate, O outputs, M inputs of a product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe.assignment import Assignment
from moe.kernels import activation, probe
from moe.kernels.combine import combine, sum_pairs
from moe.kernels.grouped import room_for_exchange
from moe.kernels.parts import Douts, GiveBack, Parts
from moe.kernels.spread import may_be_early, spread, spread_into
from moe.kernels.stack import Gradients, Needs, Stack, accumulate_dtype, gather_scores, spread_scores

_COLUMNS = 8  # the narrowest operand that the grouped product takes in half precision: 16 bytes


def forward(
    x_RH: Tensor, weights_RK: Tensor, stack: Stack, assignment: Assignment, keep: bool
) -> tuple[Tensor, Tensor | None]:
    if not keep:  # nobody else holds h, so it goes once it is activated
        return down(up(x_RH, stack, assignment), weights_RK, stack, assignment), None
    h_N2I = up(x_RH, stack, assignment)
    return down(h_N2I, weights_RK, stack, assignment), h_N2I


def up(x_RH: Tensor, stack: Stack, assignment: Assignment, rows_NH: Tensor | None = None) -> Tensor:
    if rows_NH is None:
        rows_NH = spread(x_RH, assignment, assignment.pair_N.numel())
    h_N2I = _product(rows_NH, stack.up_L2IH, assignment)
    if stack.up_bias_L2I is not None:
        h_N2I += stack.up_bias_L2I[expert_of(assignment)]
    return h_N2I


def queues_early(x_RH: Tensor) -> bool:
    return may_be_early(x_RH)


def down(h_N2I: Tensor, weights_RK: Tensor, stack: Stack, assignment: Assignment) -> Tensor:
    a_NI = scaled(h_N2I, weights_RK, stack, assignment)
    dtype = h_N2I.dtype
    del h_N2I
    y_NH = _product(a_NI, stack.down_LHI, assignment)
    del a_NI
    if stack.down_bias_LH is not None:
        score_N = spread_scores(weights_RK, assignment, dtype)
        y_NH.addcmul_(score_N[:, None].to(y_NH.dtype), stack.down_bias_LH[expert_of(assignment)])
    return combine(y_NH, assignment)


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
    dy_NH = spread(dout_RH, assignment, assignment.pair_N.numel())
    a_NI = torch.nn.functional.grouped_mm(dy_NH, stack.down_LHI, offs=assignment.ends_L)
    dh_N2I = h_N2I if overwrite else torch.empty_like(h_N2I)
    a_NI, ds_N = scaled_backward(a_NI, h_N2I, weights_RK, stack, assignment, dh_N2I)
    finish_down(found, dy_NH, a_NI, ds_N, weights_RK, stack, assignment, needs)
    del a_NI, dy_NH
    finish(found, dh_N2I, ds_N, x_RH, weights_RK, stack, assignment, needs)
    return found


def backward_parts(parts: Parts, douts: Douts, stack: Stack, needs: Needs, give_back: GiveBack) -> Gradients:
    """What needs no gradient of others' tokens comes before the wait, and what they do not wait for at the end."""
    found, assignment = Gradients(), parts.assignment
    (own_TH, wait), (own_slots, other_slots) = douts, parts.slots
    ends_L, all_pairs = assignment.ends_L, assignment.pair_N.numel()
    x_NH = None
    if needs.up:
        x_NH = own_TH.new_empty(all_pairs, own_TH.shape[1])
        for part in zip(parts.x, parts.slots, parts.pairs, strict=True):
            spread_into(x_NH, *part, assignment)
    dy_NH = own_TH.new_empty(all_pairs, own_TH.shape[1])
    spread_into(dy_NH, own_TH, own_slots, parts.pairs[0], assignment)
    spread_into(dy_NH, wait(), other_slots, parts.pairs[1], assignment)
    a_NI = torch.nn.functional.grouped_mm(dy_NH, stack.down_LHI, offs=ends_L)
    dh_N2I = a_NI.new_empty(all_pairs, 2 * a_NI.shape[1])
    ds_N = a_NI.new_empty(all_pairs, dtype=accumulate_dtype(own_TH.dtype))
    for part in zip(parts.h, parts.weights, parts.pairs, parts.slots, strict=True):
        scaled_backward_placed(a_NI, *part, stack, dh_N2I, ds_N)
    finish_down(found, dy_NH, a_NI, ds_N, parts.weights, stack, assignment, needs)
    del dy_NH, a_NI
    d_own, d_others = gather_scores(ds_N, parts.weights[0], assignment).tensor_split([own_TH.shape[0]])
    dx_NH = None
    if needs.x:
        dx_NH = torch.nn.functional.grouped_mm(dh_N2I, stack.up_L2IH, offs=ends_L)
    give_back(None if dx_NH is None else sum_pairs(dx_NH, other_slots, assignment), d_others if needs.weights else None)
    found.weights = d_own if needs.weights else None
    found.x = None if dx_NH is None else sum_pairs(dx_NH, own_slots, assignment)
    del dx_NH
    if needs.up_bias:
        found.up_bias = column_sums(dh_N2I, None, assignment)
    if x_NH is not None:
        with room_for_exchange(x_NH.device):
            found.up = weight_gradient(dh_N2I, x_NH, assignment, stack.form.transposed)
    return found


def finish_down(
    found: Gradients,
    dy_NH: Tensor,
    a_NI: Tensor,
    ds_N: Tensor,
    weights: Tensor | tuple[Tensor, Tensor],
    stack: Stack,
    assignment: Assignment,
    needs: Needs,
) -> None:
    """The down projection's gradients, and what its bias adds to those of the scores. ``weights``: [R,K], or of two
    parts of the rows."""
    if needs.down:
        found.down = weight_gradient(dy_NH, a_NI, assignment, stack.form.transposed)
    if stack.down_bias_LH is not None and needs.weights:
        ds_N += torch.linalg.vecdot(dy_NH, stack.down_bias_LH[expert_of(assignment)]).to(ds_N.dtype)
    if needs.down_bias:
        weights_RK = weights if isinstance(weights, Tensor) else torch.cat(weights)
        found.down_bias = column_sums(dy_NH, spread_scores(weights_RK, assignment, dy_NH.dtype), assignment)


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
        ends_L = assignment.ends_L
        found.x = combine(torch.nn.functional.grouped_mm(dh_N2I, stack.up_L2IH, offs=ends_L), assignment)
    if needs.up_bias:
        found.up_bias = column_sums(dh_N2I, None, assignment)
    if needs.up:
        x_NH = spread(x_RH, assignment, assignment.pair_N.numel())
        found.up = weight_gradient(dh_N2I, x_NH, assignment, stack.form.transposed)


def scaled(h_N2I: Tensor, weights_RK: Tensor, stack: Stack, assignment: Assignment) -> Tensor:
    """:func:`moe.kernels.activation.scaled`, in one kernel where there is one."""
    if probe.fuses_elementwise(h_N2I, stack.form):
        from moe.kernels import elementwise

        return elementwise.scaled(h_N2I, weights_RK, assignment.pair_N)
    return activation.scaled(h_N2I, spread_scores(weights_RK, assignment, h_N2I.dtype), stack.form)


def scaled_backward(
    da_NI: Tensor, h_N2I: Tensor, weights_RK: Tensor, stack: Stack, assignment: Assignment, dh_N2I: Tensor
) -> tuple[Tensor, Tensor]:
    """:func:`moe.kernels.activation.scaled_backward`, in one kernel where there is one."""
    if probe.fuses_elementwise(h_N2I, stack.form):
        from moe.kernels import elementwise

        ds_N = h_N2I.new_empty(h_N2I.shape[0], dtype=torch.float32)
        elementwise.scaled_backward(da_NI, h_N2I, weights_RK, assignment.pair_N, dh_N2I, ds_N)
        return da_NI, ds_N
    score_N = spread_scores(weights_RK, assignment, h_N2I.dtype)
    return activation.scaled_backward(da_NI, h_N2I, score_N, stack.form, dh_N2I)


def scaled_backward_placed(
    a_NI: Tensor,
    h_M2I: Tensor,
    weights_QK: Tensor,
    pair_M: Tensor,
    slot_QK: Tensor,
    stack: Stack,
    dh_N2I: Tensor,
    ds_N: Tensor,
) -> None:
    """:func:`scaled_backward` of some of the rows: of their pairs, in whose order h is given, among all others'."""
    if probe.fuses_elementwise(h_M2I, stack.form):
        from moe.kernels import elementwise

        elementwise.scaled_backward(a_NI, h_M2I, weights_QK, pair_M, dh_N2I, ds_N, slot_QK)
        return
    place_M, dh_M2I = slot_QK.flatten()[pair_M], torch.empty_like(h_M2I)
    score_M = weights_QK.flatten()[pair_M].to(ds_N.dtype)
    a_NI[place_M], ds_N[place_M] = activation.scaled_backward(a_NI[place_M], h_M2I, score_M, stack.form, dh_M2I)
    dh_N2I[place_M] = dh_M2I


def _product(x_NM: Tensor, weight_LOM: Tensor, assignment: Assignment) -> Tensor:
    return torch.nn.functional.grouped_mm(x_NM, weight_LOM.transpose(1, 2), offs=assignment.ends_L)


def weight_gradient(dy_NO: Tensor, x_NM: Tensor, assignment: Assignment, transposed: bool) -> Tensor:
    """Per expert ``dy.T @ x``, [L,O,M], or its transpose if the weight is stored so. Zero for no rows."""
    left, right = (x_NM, dy_NO) if transposed else (dy_NO, x_NM)
    return torch.nn.functional.grouped_mm(left.T, right, offs=assignment.ends_L)


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
