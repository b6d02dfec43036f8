"""Experts with low-rank pairs on a GPU: torch's grouped product for the weights, Triton for everything beside it.

Split, always: ``s B (A x)`` is added where its neighbour is read or written anyway, which costs less than building
``W + s B A`` however many rows an expert has. One kernel gathers the rows and multiplies them by A; one adds B's part
of the pre-activations, activates them and multiplies by the next A; one adds to the output. What is kept of the
pre-activations is the frozen product's, and the pair's part is added again in the backward.

Shapes: R rows, K choices per row, L local experts, N sorted pairs, H hidden, I intermediate, Q rank, P leading pairs
whose pre-activations are kept.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lora.activation_kernels import Between, activate, activate_backward
from lora.expert_pairs import Kept, Pair, PairGradients, Pairs
from lora.rank_kernels import factor_gradient, from_rank, gather_to_rank
from lora.sorted_rows import SortedRows, sorted_again, sorted_rows
from moe.assignment import Assignment
from moe.kernels.combine import combine
from moe.kernels.stack import Gradients, Stack


def forward(
    x_RH: Tensor, weights_RK: Tensor, stack: Stack, assignment: Assignment, pairs: Pairs, keep: int,
    learns: bool,
) -> tuple[Tensor, Kept]:  # fmt: skip
    """As :func:`lora.expert_grouped.forward`."""
    by = sorted_rows(assignment)
    if pairs.up is None:
        x_NH, z_up_NQ = x_RH[assignment.row_N], None
    else:
        x_NH, z_up_NQ = gather_to_rank(x_RH, pairs.up.a_LRM, by)
    h_N2I = F.grouped_mm(x_NH, stack.up_L2IH.transpose(1, 2), offs=by.ends_L)
    del x_NH
    a_NI, z_down_NQ = activate(_between(h_N2I, weights_RK, z_up_NQ, pairs), by)
    if not learns:
        h_N2I = h_N2I.new_empty(0, h_N2I.shape[1])
    elif keep < h_N2I.shape[0]:
        h_N2I = h_N2I[:keep].clone()  # a view would keep the rest, too
    y_NH = F.grouped_mm(a_NI, stack.down_LHI.transpose(1, 2), offs=by.ends_L)
    del a_NI
    if pairs.down is not None and z_down_NQ is not None:
        from_rank(z_down_NQ, pairs.down.b_LOR.transpose(1, 2), pairs.down.scale, by, onto=y_NH)
    nothing = h_N2I.new_empty(0)
    kept = Kept(h_N2I, *(nothing if z is None else z for z in (z_up_NQ, z_down_NQ)), by.table_X)
    return combine(y_NH, assignment), kept


def _between(h_N2I: Tensor, weights_RK: Tensor, z_up_NQ: Tensor | None, pairs: Pairs) -> Between:
    inner, up, down = h_N2I.shape[1] // 2, pairs.up, pairs.down
    return Between(
        h_N2I[:, :inner], h_N2I[:, inner:], weights_RK.contiguous(), z_up_NQ,
        None if up is None else up.b_LOR[:, :inner], None if up is None else up.b_LOR[:, inner:],
        None if down is None else down.a_LRM, None, 1.0 if up is None else up.scale,
        1.0 if down is None else down.scale, own=False, gather=False,
    )  # fmt: skip


def backward(
    dout_RH: Tensor, x_RH: Tensor, weights_RK: Tensor, kept: Kept, stack: Stack, assignment: Assignment, pairs: Pairs,
    keep: int, needs_x: bool, overwrite: bool,
) -> tuple[Gradients, PairGradients | None, PairGradients | None]:  # fmt: skip
    """As :func:`lora.expert_grouped.backward`."""
    by, up, down = sorted_again(kept.table_X, assignment), pairs.up, pairs.down
    h_N2I = _all_h(kept.h_P2I, x_RH, stack, assignment, by)
    if down is None:
        dy_NH, dw_NQ = dout_RH[assignment.row_N], None
    else:
        dy_NH, dw_NQ = gather_to_rank(dout_RH, down.b_LOR.transpose(1, 2), by)
    da_NI = F.grouped_mm(dy_NH, stack.down_LHI, offs=by.ends_L)
    dh_N2I = h_N2I if overwrite or h_N2I is not kept.h_P2I else torch.empty_like(h_N2I)
    z_up_NQ = None if up is None else kept.z_up_NQ
    found = activate_backward(
        da_NI, dw_NQ, _between(h_N2I, weights_RK, z_up_NQ, pairs), by, dh_N2I, assignment.complete
    )
    # Gathered anew where that can be: R rows are in the cache, N are not.
    of_down = _gradients(down, (found.a, False), dw_NQ, (dout_RH, True), kept.z_down_NQ, by)
    del da_NI, dy_NH
    of_up = _gradients(up, (x_RH, True), found.dz, (dh_N2I, False), z_up_NQ, by)
    gradients = Gradients(weights=found.score)
    if needs_x:
        dx_NH = F.grouped_mm(dh_N2I, stack.up_L2IH, offs=by.ends_L)
        if up is not None and found.dz is not None:
            from_rank(found.dz, up.a_LRM, up.scale, by, onto=dx_NH)
        gradients.x = combine(dx_NH, assignment)
    return gradients, of_up, of_down


def _all_h(h_P2I: Tensor, x_RH: Tensor, stack: Stack, assignment: Assignment, by: SortedRows) -> Tensor:
    """The kept pre-activations, and the others computed again."""
    kept = h_P2I.shape[0]
    if kept == by.pairs:
        return h_P2I
    rest_NH = x_RH[assignment.row_N[kept:]]
    ends_L = (by.ends_L - kept).clamp(min=0)
    return torch.cat([h_P2I, F.grouped_mm(rest_NH, stack.up_L2IH.transpose(1, 2), offs=ends_L)])


def _gradients(
    pair: Pair | None, into: tuple[Tensor, bool], dz_NQ: Tensor | None, back: tuple[Tensor, bool], z_NQ: Tensor | None,
    by: SortedRows,
) -> PairGradients | None:  # fmt: skip
    """``into``, ``back``: the pair's input and its output's gradient, each of N rows, or of R and gathered (True)."""
    if pair is None or dz_NQ is None or z_NQ is None:
        return None
    return PairGradients(
        factor_gradient(into[0], dz_NQ, pair.scale, by, pair.a_LRM, True, into[1]),
        factor_gradient(back[0], z_NQ, pair.scale, by, pair.b_LOR, False, back[1]),
    )
