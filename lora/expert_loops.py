"""Experts with low-rank pairs as a loop of dense products: for CPUs, and for what torch's grouped product refuses.

As :mod:`moe.kernels.loops`, with each expert's pair added while its rows are in the cache. The weights are frozen: only
the gradients of x, of the scores and of the factors are made. Whether an expert is folded is settled by its own rows.

Shapes: R rows, K choices per row, L local experts, N sorted pairs, G those of a group of experts, H hidden,
I intermediate, M inputs, O outputs, Q rank, P leading pairs whose pre-activations are kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora.expert_pairs import Pair, PairGradients, Pairs, masked, masks
from lora.fold import Way, fold_back_from, fold_from, folds
from moe.assignment import Assignment
from moe.kernels.activation import scaled, scaled_backward
from moe.kernels.combine import combine, empty_pairs
from moe.kernels.loops import Group, bias_rows, groups
from moe.kernels.stack import Gradients, Stack, gather_scores, spread_scores


class _Linear:
    """One stacked weight [L,O,M] with its pair, unbound once: slicing a tensor per product would cost as much again."""

    def __init__(self, weight_LOM: Tensor, pair: Pair | None, way: Way) -> None:
        experts, outputs, inputs = weight_LOM.shape
        self.weight, self.weight_t = weight_LOM.unbind(0), weight_LOM.transpose(1, 2).unbind(0)
        self.pair, self.way, self.outputs, self.inputs = pair, way, outputs, inputs
        if pair is not None:
            each = experts // pair.a_LRM.shape[0], experts // pair.b_LOR.shape[0]
            self.a, self.b = pair.a_LRM.unbind(0) * each[0], pair.b_LOR.unbind(0) * each[1]
            self.a_t = pair.a_LRM.transpose(1, 2).unbind(0) * each[0]
            self.b_t = pair.b_LOR.transpose(1, 2).unbind(0) * each[1]
            self.buffer = weight_LOM.new_empty(outputs, inputs)

    def _folded(self, expert: int, rows: int, threshold: int) -> Tensor | None:
        """``W + s B A`` [O,M] of one expert, if its rows are worth it; valid until the next call."""
        pair = self.pair
        if pair is None or not folds(self.way, rows, threshold, pair.dropout):
            return None
        return torch.addmm(self.weight[expert], self.b[expert], self.a[expert], alpha=pair.scale, out=self.buffer)

    def forward(self, group: Group, x_GM: Tensor, dropped_GM: Tensor, into_GO: Tensor) -> None:
        """``into[n] = W x[n] + s B A dropped[n]``."""
        threshold = fold_from(self.inputs, self.outputs)
        parts = (t.split(group.sizes) for t in (x_GM, dropped_GM, into_GO))
        for e, x, dropped, into in zip(group.experts, *parts, strict=True):
            folded = self._folded(e, x.shape[0], threshold)
            torch.mm(x, self.weight_t[e] if folded is None else folded.t(), out=into)
            if self.pair is not None and folded is None:
                into.addmm_(dropped.mm(self.a_t[e]), self.b_t[e], alpha=self.pair.scale)

    def backward(self, group: Group, dy_GO: Tensor, mask_GM: Tensor | None, into_GM: Tensor | None) -> list[Tensor]:
        """``into[n] = W.T dy[n] + mask * s A.T B.T dy[n]``; returns ``B.T dy`` [n,Q] of each of the group's experts."""
        threshold = fold_back_from(self.outputs)
        if into_GM is None:
            parts = zip(group.experts, dy_GO.split(group.sizes), strict=True)
            return [] if self.pair is None else [dy.mm(self.b[e]) for e, dy in parts]
        dz: list[Tensor] = []
        for e, dy, into in zip(group.experts, dy_GO.split(group.sizes), into_GM.split(group.sizes), strict=True):
            folded = self._folded(e, dy.shape[0], threshold)
            torch.mm(dy, self.weight[e] if folded is None else folded, out=into)
            if self.pair is None:
                continue
            dz.append(dy.mm(self.b[e]))
            if folded is None and mask_GM is None:
                into.addmm_(dz[-1], self.a[e], alpha=self.pair.scale)
        if self.pair is not None and mask_GM is not None:
            added = [z.mm(self.a[e]) for e, z in zip(group.experts, dz, strict=True)]
            into_GM.addcmul_(torch.cat(added), mask_GM, value=self.pair.scale)
        return dz

    def factor_gradients(
        self, group: Group, dy_GO: Tensor, dz: list[Tensor], dropped_GM: Tensor, into: _Into | None
    ) -> None:
        """Adds ``dy.T (A x)`` and ``dz.T x``; the scale is left to :meth:`_Into.scaled`."""
        if into is None:
            return
        parts = zip(group.experts, dy_GO.split(group.sizes), dz, dropped_GM.split(group.sizes), strict=True)
        for e, dy, d, x in parts:
            into.add(into.b, e, dy.t(), x.mm(self.a_t[e]))
            into.add(into.a, e, d.t(), x)


class _Into:
    """Where the gradients of one pair's factors are added up."""

    def __init__(self, pair: Pair, experts: int) -> None:
        self.found, self.scale = PairGradients.zeros(pair), pair.scale
        self.a = self._each(self.found.a_LRM, experts)
        self.b = self._each(self.found.b_LOR, experts)

    @staticmethod
    def _each(stack_L: Tensor, experts: int) -> tuple[tuple[Tensor, ...], bool]:
        """A view for each expert, and whether they are all the same one."""
        return stack_L.unbind(0) * (experts // stack_L.shape[0]), stack_L.shape[0] < experts

    @staticmethod
    def add(stack: tuple[tuple[Tensor, ...], bool], expert: int, left: Tensor, right: Tensor) -> None:
        views, shared = stack
        if shared:
            views[expert].addmm_(left, right)
        else:
            torch.mm(left, right, out=views[expert])

    def scaled(self) -> PairGradients:
        self.found.a_LRM.mul_(self.scale)
        self.found.b_LOR.mul_(self.scale)
        return self.found


def forward(
    x_RH: Tensor, weights_RK: Tensor, stack: Stack, assignment: Assignment, pairs: Pairs, keep: int
) -> tuple[Tensor, Tensor | None]:
    """Returns (out [R,H], pre-activations [P,2I] of the first pairs, at most ``keep``; None for 0)."""
    row_N = assignment.row_N
    score_N = spread_scores(weights_RK, assignment, x_RH.dtype)
    y_NH = empty_pairs(x_RH, x_RH.shape[1], assignment)
    up, down = _Linear(stack.up_L2IH, pairs.up, pairs.way), _Linear(stack.down_LHI, pairs.down, pairs.way)
    drop_up, drop_down = masks(pairs.up, pairs.seed, x_RH), masks(pairs.down, pairs.seed + 1, x_RH)
    parts = list(groups(assignment, keep))
    kept = max((group.pairs.stop for group in parts if group.pairs.stop <= keep), default=0)
    h_P2I = x_RH.new_empty(kept, up.outputs)
    for group in parts:
        at = group.pairs
        h = h_P2I[at] if at.stop <= kept else x_RH.new_empty(sum(group.sizes), up.outputs)
        _up(group, x_RH.index_select(0, row_N[at]), drop_up(h.shape[0], up.inputs), up, stack, h)
        a = scaled(h, score_N[at], stack.form)
        down.forward(group, a, masked(a, drop_down(*a.shape)), y_NH[at])
        if stack.down_bias_LH is not None:
            y_NH[at] += (score_N[at, None] * bias_rows(stack.down_bias_LH, group)).to(y_NH.dtype)
    return combine(y_NH, assignment), h_P2I if kept else None


def _up(group: Group, x_GH: Tensor, mask_GH: Tensor | None, up: _Linear, stack: Stack, h_G2I: Tensor) -> None:
    up.forward(group, x_GH, masked(x_GH, mask_GH), h_G2I)
    if stack.up_bias_L2I is not None:
        h_G2I += bias_rows(stack.up_bias_L2I, group)


def backward(
    dout_RH: Tensor,
    x_RH: Tensor,
    weights_RK: Tensor,
    h_P2I: Tensor | None,
    stack: Stack,
    assignment: Assignment,
    pairs: Pairs,
    keep: int,
    needs_x: bool,
    overwrite: bool,
) -> tuple[Gradients, PairGradients | None, PairGradients | None]:
    """Gradients of x, of the scores, and of both pairs' factors. ``keep`` as in the forward; ``overwrite``: h may go."""
    row_N, local = assignment.row_N, stack.up_L.shape[0]
    score_N = spread_scores(weights_RK, assignment, x_RH.dtype)
    ds_N = torch.empty_like(score_N)
    dx_NH = empty_pairs(x_RH, x_RH.shape[1], assignment) if needs_x else None
    up, down = _Linear(stack.up_L2IH, pairs.up, pairs.way), _Linear(stack.down_LHI, pairs.down, pairs.way)
    into_up, into_down = (None if pair is None else _Into(pair, local) for pair in (pairs.up, pairs.down))
    drop_up, drop_down = masks(pairs.up, pairs.seed, x_RH), masks(pairs.down, pairs.seed + 1, x_RH)
    kept = 0 if h_P2I is None else h_P2I.shape[0]
    for group in groups(assignment, keep):
        at = group.pairs
        rows = row_N[at]
        dy, x, score = dout_RH.index_select(0, rows), x_RH.index_select(0, rows), score_N[at]
        mask_up = drop_up(*x.shape)
        if at.stop <= kept:
            assert h_P2I is not None
            h = h_P2I[at]
            dh = h if overwrite else torch.empty_like(h)
        else:
            h = dh = x.new_empty(x.shape[0], up.outputs)
            _up(group, x, mask_up, up, stack, h)
        mask_down = drop_down(x.shape[0], down.inputs)
        da = x.new_empty(x.shape[0], down.inputs)
        dz = down.backward(group, dy, mask_down, da)
        a, ds_N[at] = scaled_backward(da, h, score, stack.form, dh)
        down.factor_gradients(group, dy, dz, masked(a, mask_down), into_down)
        if stack.down_bias_LH is not None:
            ds_N[at] += (dy * bias_rows(stack.down_bias_LH, group)).sum(-1).to(ds_N.dtype)
        dz = up.backward(group, dh, mask_up, None if dx_NH is None else dx_NH[at])
        up.factor_gradients(group, dh, dz, masked(x, mask_up), into_up)
    found = Gradients(weights=gather_scores(ds_N, weights_RK, assignment))
    if dx_NH is not None:
        found.x = combine(dx_NH, assignment)
    return found, into_up and into_up.scaled(), into_down and into_down.scaled()
