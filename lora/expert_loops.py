"""Experts with low-rank pairs as a loop of dense products: for CPUs, and for what torch's grouped product refuses.

As :mod:`moe.kernels.loops`, with each expert's pair added while its rows are in the cache. The weights are frozen: only
the gradients of x, of the scores and of the factors are made. Whether an expert is folded is settled by its own rows.

Shapes: R rows, K choices per row, L local experts, N sorted pairs, G those of a group of experts, H hidden,
I intermediate, M inputs, O outputs, Q rank, P leading pairs whose pre-activations are kept.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from lora.expert_pairs import Kept, Pair, PairGradients, Pairs, masked, masks
from lora.fold import Way, fold_back_from, fold_from, folds
from moe.assignment import Assignment
from moe.kernels.activation import scaled, scaled_backward
from moe.kernels.combine import combine, empty_pairs
from moe.kernels.loops import Group, bias_rows, groups
from moe.kernels.stack import Gradients, Stack, gather_scores, spread_scores


class _Linear:
    """One stacked weight [L,O,M] with its pair. What a pass needs is unbound once, and nothing else: a layer's products
    are so many and so small that slicing a tensor for each would cost as much again."""

    def __init__(self, weight_LOM: Tensor, pair: Pair | None, way: Way) -> None:
        self.weight_LOM, self.pair, self.way = weight_LOM, pair, way
        self.experts, self.outputs, self.inputs = weight_LOM.shape

    @cached_property
    def weight(self) -> tuple[Tensor, ...]:
        return self.weight_LOM.unbind(0)

    @cached_property
    def weight_t(self) -> tuple[Tensor, ...]:
        return self.weight_LOM.transpose(1, 2).unbind(0)

    @cached_property
    def a(self) -> tuple[Tensor, ...]:
        return _each(self._pair.a_LRM, self.experts)

    @cached_property
    def a_t(self) -> tuple[Tensor, ...]:
        return _each(self._pair.a_LRM.transpose(1, 2), self.experts)

    @cached_property
    def b(self) -> tuple[Tensor, ...]:
        return _each(self._b_LQO.transpose(1, 2), self.experts)

    @cached_property
    def b_t(self) -> tuple[Tensor, ...]:
        return _each(self._b_LQO, self.experts)

    @cached_property
    def _b_LQO(self) -> Tensor:
        """With the rank first in memory, as in A: thin products run twice as fast so."""
        return self._pair.b_LOR.transpose(1, 2).contiguous()

    @cached_property
    def _buffer(self) -> Tensor:
        return self.weight_LOM.new_empty(self.outputs, self.inputs)

    @property
    def _pair(self) -> Pair:
        assert self.pair is not None
        return self.pair

    def _folds(self, rows: int, threshold: int) -> bool:
        return self.pair is not None and folds(self.way, rows, threshold, self.pair.dropout)

    def _folded(self, expert: int) -> Tensor:
        """``W + s B A`` [O,M] of one expert; valid until the next call."""
        pair = self._pair
        return torch.addmm(self.weight[expert], self.b[expert], self.a[expert], alpha=pair.scale, out=self._buffer)

    def rank_space(self, rows: int) -> Tensor:
        """Room for ``A x`` of so many rows."""
        return self.weight_LOM.new_empty(rows, 0 if self.pair is None else self.pair.a_LRM.shape[1])

    def forward(self, group: Group, x_GM: Tensor, dropped_GM: Tensor, into_GO: Tensor, z_GQ: Tensor) -> None:
        """``into[n] = W x[n] + s B A dropped[n]``; ``z`` becomes ``A dropped`` of the experts that are not folded."""
        threshold = fold_from(self.inputs, self.outputs)
        parts = (t.split(group.sizes) for t in (x_GM, dropped_GM, into_GO, z_GQ))
        for e, x, dropped, into, z in zip(group.experts, *parts, strict=True):
            if self._folds(x.shape[0], threshold):
                torch.mm(x, self._folded(e).t(), out=into)
                continue
            torch.mm(x, self.weight_t[e], out=into)
            if self.pair is not None:
                into.addmm_(torch.mm(dropped, self.a_t[e], out=z), self.b_t[e], alpha=self.pair.scale)

    def backward(self, group: Group, dy_GO: Tensor, mask_GM: Tensor | None, into_GM: Tensor | None) -> list[Tensor]:
        """``into[n] = W.T dy[n] + mask * s A.T B.T dy[n]``; returns ``B.T dy`` [n,Q] of each of the group's experts."""
        threshold = fold_back_from(self.outputs)
        if into_GM is None:
            parts = zip(group.experts, dy_GO.split(group.sizes), strict=True)
            return [] if self.pair is None else [dy.mm(self.b[e]) for e, dy in parts]
        dz: list[Tensor] = []
        for e, dy, into in zip(group.experts, dy_GO.split(group.sizes), into_GM.split(group.sizes), strict=True):
            folded = self._folds(dy.shape[0], threshold)
            torch.mm(dy, self._folded(e) if folded else self.weight[e], out=into)
            if self.pair is None:
                continue
            dz.append(dy.mm(self.b[e]))
            if not folded and mask_GM is None:
                into.addmm_(dz[-1], self.a[e], alpha=self.pair.scale)
        if self.pair is not None and mask_GM is not None:
            added = [z.mm(self.a[e]) for e, z in zip(group.experts, dz, strict=True)]
            into_GM.addcmul_(torch.cat(added), mask_GM, value=self.pair.scale)
        return dz

    def factor_gradients(
        self,
        group: Group,
        dy_GO: Tensor,
        dz: list[Tensor],
        dropped_GM: Tensor,
        z_GQ: Tensor,
        into: _Into | None,
    ) -> None:
        """Adds ``dy.T (A x)`` and ``dz.T x``, but for the scale. ``z``: as the forward left it."""
        if into is None:
            return
        threshold = fold_from(self.inputs, self.outputs)
        parts = zip(dy_GO.split(group.sizes), dz, dropped_GM.split(group.sizes), z_GQ.split(group.sizes), strict=True)
        for e, (dy, d, x, z) in zip(group.experts, parts, strict=True):
            if self._folds(x.shape[0], threshold):
                z = x.mm(self.a_t[e])
            into.add(e, d, x, z, dy)


class _Into:
    """Where the gradients of one pair's factors are added up: A's [L,Q,M], and B's as [L,Q,O]."""

    def __init__(self, pair: Pair, experts: int) -> None:
        self.scale = pair.scale
        self.a_LQM, self.b_LQO = (t.new_zeros(t.shape) for t in (pair.a_LRM, pair.b_LOR.transpose(1, 2)))
        self.a, self.b_t = _each(self.a_LQM, experts), _each(self.b_LQO, experts)

    def add(self, expert: int, dz_nQ: Tensor, x_nM: Tensor, z_nQ: Tensor, dy_nO: Tensor) -> None:
        """``dz.T x`` and ``z.T dy``: of an expert of its own the only rows, of a shared factor some of them."""
        for into, stack_L, left, right in ((self.a, self.a_LQM, dz_nQ, x_nM), (self.b_t, self.b_LQO, z_nQ, dy_nO)):
            if stack_L.shape[0] < len(into):
                into[expert].addmm_(left.t(), right)
            else:
                torch.mm(left.t(), right, out=into[expert])

    def scaled(self) -> PairGradients:
        return PairGradients(self.a_LQM.mul_(self.scale), self.b_LQO.transpose(1, 2).contiguous().mul_(self.scale))


def _each(stack_L: Tensor, experts: int) -> tuple[Tensor, ...]:
    """A view for each expert; the same one for all where they share it."""
    return stack_L.unbind(0) * (experts // stack_L.shape[0])


def _linears(stack: Stack, pairs: Pairs) -> tuple[_Linear, _Linear]:
    return _Linear(stack.up_L2IH, pairs.up, pairs.way), _Linear(stack.down_LHI, pairs.down, pairs.way)


def forward(
    x_RH: Tensor, weights_RK: Tensor, stack: Stack, assignment: Assignment, pairs: Pairs, keep: int
) -> tuple[Tensor, Kept]:
    """Returns out [R,H], and what the backward wants: of the pre-activations the first pairs', at most ``keep``."""
    row_N = assignment.row_N
    score_N = spread_scores(weights_RK, assignment, x_RH.dtype)
    y_NH = empty_pairs(x_RH, x_RH.shape[1], assignment)
    up, down = _linears(stack, pairs)
    drop_up, drop_down = masks(pairs.up, pairs.seed, x_RH), masks(pairs.down, pairs.seed + 1, x_RH)
    parts = list(groups(assignment, keep))
    kept = max((group.pairs.stop for group in parts if group.pairs.stop <= keep), default=0)
    h_P2I, z_up, z_down = x_RH.new_empty(kept, up.outputs), *(side.rank_space(row_N.numel()) for side in (up, down))
    for group in parts:
        at = group.pairs
        h = h_P2I[at] if at.stop <= kept else x_RH.new_empty(sum(group.sizes), up.outputs)
        _up(group, x_RH.index_select(0, row_N[at]), drop_up(h.shape[0], up.inputs), up, stack, h, z_up[at])
        a = scaled(h, score_N[at], stack.form)
        down.forward(group, a, masked(a, drop_down(*a.shape)), y_NH[at], z_down[at])
        if stack.down_bias_LH is not None:
            y_NH[at] += (score_N[at, None] * bias_rows(stack.down_bias_LH, group)).to(y_NH.dtype)
    return combine(y_NH, assignment), Kept(h_P2I, z_up, z_down)


def _up(
    group: Group, x_GH: Tensor, mask_GH: Tensor | None, up: _Linear, stack: Stack, h_G2I: Tensor, z_GQ: Tensor
) -> None:
    up.forward(group, x_GH, masked(x_GH, mask_GH), h_G2I, z_GQ)
    if stack.up_bias_L2I is not None:
        h_G2I += bias_rows(stack.up_bias_L2I, group)


def backward(
    dout_RH: Tensor, x_RH: Tensor, weights_RK: Tensor, kept: Kept, stack: Stack, assignment: Assignment, pairs: Pairs,
    keep: int, needs_x: bool, overwrite: bool,
) -> tuple[Gradients, PairGradients | None, PairGradients | None]:  # fmt: skip
    """Gradients of x, of the scores, and of both pairs. ``keep`` as in the forward; ``overwrite``: h may go."""
    row_N, local = assignment.row_N, stack.up_L.shape[0]
    score_N = spread_scores(weights_RK, assignment, x_RH.dtype)
    ds_N = torch.empty_like(score_N)
    dx_NH = empty_pairs(x_RH, x_RH.shape[1], assignment) if needs_x else None
    up, down = _linears(stack, pairs)
    into_up, into_down = (None if pair is None else _Into(pair, local) for pair in (pairs.up, pairs.down))
    drop_up, drop_down = masks(pairs.up, pairs.seed, x_RH), masks(pairs.down, pairs.seed + 1, x_RH)
    for group in groups(assignment, keep):
        at = group.pairs
        rows, z_up = row_N[at], kept.z_up_NQ[at]
        dy, x, score = dout_RH.index_select(0, rows), x_RH.index_select(0, rows), score_N[at]
        mask_up = drop_up(*x.shape)
        if at.stop <= kept.h_P2I.shape[0]:
            h = kept.h_P2I[at]
            dh = h if overwrite else torch.empty_like(h)
        else:
            h = dh = x.new_empty(x.shape[0], up.outputs)
            _up(group, x, mask_up, up, stack, h, z_up)
        mask_down = drop_down(x.shape[0], down.inputs)
        da = x.new_empty(x.shape[0], down.inputs)
        dz = down.backward(group, dy, mask_down, da)
        a, ds_N[at] = scaled_backward(da, h, score, stack.form, dh)
        down.factor_gradients(group, dy, dz, masked(a, mask_down), kept.z_down_NQ[at], into_down)
        if stack.down_bias_LH is not None:
            ds_N[at] += (dy * bias_rows(stack.down_bias_LH, group)).sum(-1).to(ds_N.dtype)
        dz = up.backward(group, dh, mask_up, None if dx_NH is None else dx_NH[at])
        up.factor_gradients(group, dh, dz, masked(x, mask_up), z_up, into_up)
    found = Gradients(weights=gather_scores(ds_N, weights_RK, assignment))
    if dx_NH is not None:
        found.x = combine(dx_NH, assignment)
    return found, into_up and into_up.scaled(), into_down and into_down.scaled()
