"""Experts with low-rank pairs over torch's grouped product: few launches, nothing read back from the GPU.

Split, a pair is three thin products beside each of the weight's. Folded, ``W + s B A`` is built for all experts in one
transient buffer. Which of the two is settled by the mean rows of an expert, which the host knows. The rank is padded to
a multiple of 8, as the grouped product wants its operands aligned; the padding is zero and adds nothing.

Shapes: R rows, K choices per row, L local experts, N sorted pairs, H hidden, I intermediate, M inputs, O outputs,
Q rank, P leading pairs whose pre-activations are kept.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lora.expert_pairs import Kept, Pair, PairGradients, Pairs, masked, masks
from lora.fold import Way, folds_above, folds_back_above
from moe.assignment import Assignment
from moe.kernels.batched import expert_of, scaled, scaled_backward
from moe.kernels.combine import combine
from moe.kernels.grouped import group_ends
from moe.kernels.stack import Gradients, Stack, gather_scores, spread_scores

_ALIGNED = 8


class _Linear:
    """One stacked weight [L,O,M] with its pair; ``ends_L``: where each expert's rows end."""

    def __init__(self, weight_LOM: Tensor, pair: Pair | None, way: Way, rows: float) -> None:
        self.weight_LOM, self.pair = weight_LOM, pair
        _, self.outputs, self.inputs = weight_LOM.shape
        if pair is None:
            return
        lacking = -pair.a_LRM.shape[1] % _ALIGNED
        self.a_LQM, self.b_LOQ = F.pad(pair.a_LRM, (0, 0, 0, lacking)), F.pad(pair.b_LOR, (0, lacking))
        self.folds = rows > folds_above(way, self.inputs, self.outputs, pair.dropout)
        self.folds_back = rows > folds_back_above(way, self.outputs, pair.dropout)

    def _folded(self) -> Tensor:
        """``W + s B A`` [L,O,M]."""
        assert self.pair is not None
        local = self.weight_LOM.shape[0]
        b, a = (t.expand(local, -1, -1) for t in (self.b_LOQ, self.a_LQM))
        return torch.baddbmm(self.weight_LOM, b, a, alpha=self.pair.scale)

    def forward(self, x_NM: Tensor, mask_NM: Tensor | None, ends_L: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (y [N,O], ``A x`` [N,Q]; [N,0] without a pair, or where it is folded)."""
        weight_LOM = self._folded() if self.pair is not None and self.folds else self.weight_LOM
        y_NO = _product(x_NM, weight_LOM.transpose(1, 2), ends_L)
        if self.pair is None or self.folds:
            return y_NO, x_NM.new_empty(x_NM.shape[0], 0)
        z_NQ = self._down_to_rank(masked(x_NM, mask_NM), ends_L)
        return y_NO.add_(_product(z_NQ, self.b_LOQ.transpose(1, 2), ends_L), alpha=self.pair.scale), z_NQ

    def _down_to_rank(self, dropped_NM: Tensor, ends_L: Tensor) -> Tensor:
        return _product(dropped_NM, self.a_LQM.transpose(1, 2), ends_L)

    def rank_space(self, dy_NO: Tensor, ends_L: Tensor) -> Tensor | None:
        """``B.T dy`` [N,Q]."""
        return None if self.pair is None else _product(dy_NO, self.b_LOQ, ends_L)

    def backward(self, dy_NO: Tensor, dz_NQ: Tensor | None, mask_NM: Tensor | None, ends_L: Tensor) -> Tensor:
        if self.pair is None or dz_NQ is None:
            return _product(dy_NO, self.weight_LOM, ends_L)
        if self.folds_back:
            return _product(dy_NO, self._folded(), ends_L)
        dx_NM = _product(dy_NO, self.weight_LOM, ends_L)
        added_NM = _product(dz_NQ, self.a_LQM, ends_L)
        if mask_NM is not None:
            added_NM.mul_(mask_NM)
        return dx_NM.add_(added_NM, alpha=self.pair.scale)

    def factor_gradients(
        self, dy_NO: Tensor, dz_NQ: Tensor | None, dropped_NM: Tensor, z_NQ: Tensor, ends_L: Tensor
    ) -> PairGradients | None:
        if self.pair is None or dz_NQ is None:
            return None
        rank = self.pair.a_LRM.shape[1]
        if self.folds:
            z_NQ = self._down_to_rank(dropped_NM, ends_L)
        db_LOQ = _gradient(dy_NO, z_NQ, self.b_LOQ.shape[0], ends_L)
        da_LQM = _gradient(dz_NQ, dropped_NM, self.a_LQM.shape[0], ends_L)
        # The factors' own shapes, without the padding, which may be all there is.
        return PairGradients(da_LQM[:, :rank].mul(self.pair.scale), db_LOQ[..., :rank].mul(self.pair.scale))


def _product(left_NM: Tensor, right_LMO: Tensor, ends_L: Tensor) -> Tensor:
    """``left[n] @ right[expert(n)]``, or one matrix for all experts."""
    if right_LMO.shape[0] < ends_L.shape[0]:
        return left_NM @ right_LMO[0]
    return F.grouped_mm(left_NM, right_LMO, offs=ends_L)


def _gradient(left_NO: Tensor, right_NM: Tensor, stacked: int, ends_L: Tensor) -> Tensor:
    """Per expert ``left.T @ right``, zero for no rows; over all rows if one matrix serves all experts."""
    if stacked < ends_L.shape[0]:
        return (left_NO.T @ right_NM)[None]
    return F.grouped_mm(left_NO.T, right_NM, offs=ends_L)


def _linears(stack: Stack, pairs: Pairs, assignment: Assignment) -> tuple[_Linear, _Linear]:
    rows = assignment.pair_N.numel() / stack.up_L.shape[0]
    return (
        _Linear(stack.up_L2IH, pairs.up, pairs.way, rows),
        _Linear(stack.down_LHI, pairs.down, pairs.way, rows),
    )


def _up(
    up: _Linear, x_NH: Tensor, mask_NH: Tensor | None, ends_L: Tensor, bias_N2I: Tensor | None
) -> tuple[Tensor, Tensor]:
    h_N2I, z_NQ = up.forward(x_NH, mask_NH, ends_L)
    return h_N2I if bias_N2I is None else h_N2I.add_(bias_N2I), z_NQ


def _biases(stack: Stack, assignment: Assignment) -> tuple[Tensor | None, Tensor | None]:
    """Those of each pair, [N,2I] and [N,H]."""
    if stack.up_bias_L2I is None or stack.down_bias_LH is None:
        return None, None
    experts_N = expert_of(assignment)
    return stack.up_bias_L2I[experts_N], stack.down_bias_LH[experts_N]


def forward(
    x_RH: Tensor, weights_RK: Tensor, stack: Stack, assignment: Assignment, pairs: Pairs, keep: int,
    learns: bool,
) -> tuple[Tensor, Kept]:  # fmt: skip
    """Returns out [R,H], and what the backward wants: of the pre-activations those of the first ``keep`` pairs."""
    ends_L = group_ends(assignment.counts_L)
    up, down = _linears(stack, pairs, assignment)
    bias_N2I, bias_NH = _biases(stack, assignment)
    x_NH = x_RH[assignment.row_N]
    mask_NH = masks(pairs.up, pairs.seed, x_NH)(*x_NH.shape)
    h_N2I, z_up_NQ = _up(up, x_NH, mask_NH, ends_L, bias_N2I)
    del x_NH, mask_NH, bias_N2I
    a_NI = scaled(h_N2I, weights_RK, stack, assignment)
    if not learns:
        h_N2I = h_N2I.new_empty(0, up.outputs)
    elif keep < h_N2I.shape[0]:
        h_N2I = h_N2I[:keep].clone()  # a view would keep the rest, too
    y_NH, z_down_NQ = down.forward(a_NI, masks(pairs.down, pairs.seed + 1, a_NI)(*a_NI.shape), ends_L)
    del a_NI
    if bias_NH is not None:
        y_NH.addcmul_(spread_scores(weights_RK, assignment, y_NH.dtype)[:, None].to(y_NH.dtype), bias_NH)
    return combine(y_NH, assignment), Kept(h_N2I, z_up_NQ, z_down_NQ)


def _all_h(up: _Linear, h_P2I: Tensor, x_NH: Tensor, mask_NH: Tensor | None, ends_L: Tensor,
           bias_N2I: Tensor | None) -> Tensor:  # fmt: skip
    """The kept pre-activations, and the others computed again."""
    kept = h_P2I.shape[0]
    if kept == x_NH.shape[0]:
        return h_P2I
    mask_NH, bias_N2I = (None if t is None else t[kept:] for t in (mask_NH, bias_N2I))
    rest_N2I, _ = _up(up, x_NH[kept:], mask_NH, (ends_L - kept).clamp(min=0), bias_N2I)
    return torch.cat([h_P2I, rest_N2I])


def backward(
    dout_RH: Tensor, x_RH: Tensor, weights_RK: Tensor, kept: Kept, stack: Stack, assignment: Assignment, pairs: Pairs,
    keep: int, needs_x: bool, overwrite: bool,
) -> tuple[Gradients, PairGradients | None, PairGradients | None]:  # fmt: skip
    """Gradients of x, of the scores, and of both pairs' factors. ``overwrite``: h is not needed again."""
    ends_L = group_ends(assignment.counts_L)
    up, down = _linears(stack, pairs, assignment)
    bias_N2I, bias_NH = _biases(stack, assignment)
    x_NH = x_RH[assignment.row_N]
    mask_NH = masks(pairs.up, pairs.seed, x_NH)(*x_NH.shape)
    h_N2I = _all_h(up, kept.h_P2I, x_NH, mask_NH, ends_L, bias_N2I)
    dropped_NH = masked(x_NH, mask_NH)
    del x_NH, bias_N2I
    dy_NH = dout_RH[assignment.row_N]
    mask_NI = masks(pairs.down, pairs.seed + 1, dy_NH)(dy_NH.shape[0], down.inputs)
    dz_NQ = down.rank_space(dy_NH, ends_L)
    da_NI = down.backward(dy_NH, dz_NQ, mask_NI, ends_L)
    dh_N2I = h_N2I if overwrite or h_N2I is not kept.h_P2I else torch.empty_like(h_N2I)
    a_NI, ds_N = scaled_backward(da_NI, h_N2I, weights_RK, stack, assignment, dh_N2I)
    of_down = down.factor_gradients(dy_NH, dz_NQ, masked(a_NI, mask_NI), kept.z_down_NQ, ends_L)
    del da_NI, a_NI, mask_NI
    if bias_NH is not None:
        ds_N += torch.linalg.vecdot(dy_NH, bias_NH).to(ds_N.dtype)
    del dy_NH
    dz_NQ = up.rank_space(dh_N2I, ends_L)
    of_up = up.factor_gradients(dh_N2I, dz_NQ, dropped_NH, kept.z_up_NQ, ends_L)
    del dropped_NH
    found = Gradients(weights=gather_scores(ds_N, weights_RK, assignment))
    if needs_x:
        found.x = combine(up.backward(dh_N2I, dz_NQ, mask_NH, ends_L), assignment)
    return found, of_up, of_down
