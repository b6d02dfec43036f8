"""Experts with low-rank pairs as a loop of dense products: for CPUs, and for what torch's grouped product refuses.

As :mod:`moe.kernels.loops`, with each expert's pair added while its rows are in the cache. The weights are frozen: only
the gradients of x, of the scores and of the factors are made. Whether an expert is folded is settled by its own rows.

Shapes: R rows, K choices per row, L local experts, N sorted pairs, G those of a group of experts, H hidden,
I intermediate, M inputs, O outputs, Q rank, P leading pairs whose pre-activations are kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from lora.expert_pairs import Kept, Pair, PairGradients, Pairs, masked, masks
from lora.fold import Way, folds_above, folds_back_above
from moe.assignment import Assignment
from moe.kernels.activation import scaled, scaled_backward
from moe.kernels.combine import combine, empty_pairs
from moe.kernels.loops import Group, bias_rows, groups
from moe.kernels.stack import Gradients, Stack, gather_scores, spread_scores


class _Linear:
    """One stacked weight [L,O,M] with its pair. What a pass needs is unbound once, and nothing else: a layer's products
    are so many and so small that slicing a tensor for each would cost as much again."""

    def __init__(self, weight_LOM: Tensor, pair: Pair | None, way: Way) -> None:
        self.weight_LOM, self.pair = weight_LOM, pair
        self.experts, self.outputs, self.inputs = weight_LOM.shape
        dropout = 0.0 if pair is None else pair.dropout
        self.folds_above = math.inf if pair is None else folds_above(way, self.inputs, self.outputs, dropout)
        self.folds_back_above = math.inf if pair is None else folds_back_above(way, self.outputs, dropout)

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
        """``s B`` with the rank first in memory, as in A: thin products run twice as fast so."""
        b_LQO = self._pair.b_LOR.transpose(1, 2)
        return torch.mul(b_LQO, self._pair.scale, out=b_LQO.new_empty(b_LQO.shape))

    @cached_property
    def _buffer(self) -> Tensor:
        return self.weight_LOM.new_empty(self.outputs, self.inputs)

    @property
    def _pair(self) -> Pair:
        assert self.pair is not None
        return self.pair

    def _folded(self, expert: int) -> Tensor:
        """``W + s B A`` [O,M] of one expert; valid until the next call."""
        return torch.addmm(self.weight[expert], self.b[expert], self.a[expert], out=self._buffer)

    def rank_space(self, rows: int) -> Tensor:
        """Room for ``A x`` of so many rows."""
        return self.weight_LOM.new_empty(rows, 0 if self.pair is None else self.pair.a_LRM.shape[1])

    def forward(self, group: Group, x_GM: Tensor, dropped_GM: Tensor, into_GO: Tensor, z_GQ: Tensor) -> None:
        """``into[n] = W x[n] + s B A dropped[n]``; ``z`` becomes ``A dropped`` of the experts that are not folded."""
        sizes = group.sizes
        parts = zip(group.experts, sizes, *(t.split(sizes) for t in (x_GM, dropped_GM, into_GO, z_GQ)), strict=True)
        for e, rows, x, dropped, into, z in parts:
            if self.pair is None:
                torch.mm(x, self.weight_t[e], out=into)
            elif rows > self.folds_above:
                torch.mm(x, self._folded(e).t(), out=into)
            else:
                torch.mm(dropped, self.a_t[e], out=z)
                torch.mm(z, self.b_t[e], out=into)
                into.addmm_(x, self.weight_t[e])

    def backward(self, group: Group, dy_GO: Tensor, mask_GM: Tensor | None, into_GM: Tensor | None) -> Tensor:
        """``into[n] = W.T dy[n] + mask * s A.T B.T dy[n]``; returns ``s B.T dy`` [G,Q]."""
        sizes, dz_GQ = group.sizes, self.rank_space(dy_GO.shape[0])
        parts = list(zip(group.experts, sizes, dy_GO.split(sizes), dz_GQ.split(sizes), strict=True))
        if self.pair is not None:
            for e, _, dy, dz in parts:
                torch.mm(dy, self.b[e], out=dz)
        if into_GM is None:
            return dz_GQ
        for (e, rows, dy, dz), into in zip(parts, into_GM.split(sizes), strict=True):
            if self.pair is None:
                torch.mm(dy, self.weight[e], out=into)
            elif rows > self.folds_back_above:
                torch.mm(dy, self._folded(e), out=into)
            else:
                torch.mm(dz, self.a[e], out=into)
                if mask_GM is None:
                    into.addmm_(dy, self.weight[e])
        if mask_GM is not None and self.pair is not None:
            into_GM.mul_(mask_GM)
            for (e, _, dy, _), into in zip(parts, into_GM.split(sizes), strict=True):
                into.addmm_(dy, self.weight[e])
        return dz_GQ

    def factor_gradients(
        self, group: Group, dy_GO: Tensor, dz_GQ: Tensor, dropped_GM: Tensor, z_GQ: Tensor, into: _Into | None
    ) -> None:
        """Adds ``dz.T x``, and ``(A x).T dy`` without the scale. ``z``: as the forward left it."""
        if into is None:
            return
        sizes, experts = group.sizes, group.experts
        dy, x, z, dz_t, z_t = (
            *(t.split(sizes) for t in (dy_GO, dropped_GM, z_GQ)), *(t.t().split(sizes, 1) for t in (dz_GQ, z_GQ))
        )  # fmt: skip
        for i, rows in enumerate(sizes):
            if rows > self.folds_above:
                torch.mm(x[i], self.a_t[experts[i]], out=z[i])
        into.a.add(experts, dz_t, x)
        into.b_t.add(experts, z_t, dy)


class _Sum:
    """The gradient of one stack of factors: an expert's product is its own, or added to the others' if shared."""

    def __init__(self, like_L: Tensor, counts: Sequence[int]) -> None:
        self.stack_L = like_L.new_empty(like_L.shape)
        self.shared, self.views = like_L.shape[0] < len(counts), self.stack_L.unbind(0)
        if self.shared:
            self.stack_L.zero_()
        else:  # the others are written whole
            for e in (e for e, count in enumerate(counts) if not count):
                self.views[e].zero_()

    def add(self, experts: Sequence[int], left: Sequence[Tensor], right: Sequence[Tensor]) -> None:
        if self.shared:
            for one, other in zip(left, right, strict=True):
                self.views[0].addmm_(one, other)
        else:
            for e, one, other in zip(experts, left, right, strict=True):
                torch.mm(one, other, out=self.views[e])


class _Into:
    """Where the gradients of one pair's factors are added up: A's [L,Q,M], and B's as [L,Q,O], not yet scaled."""

    def __init__(self, pair: Pair, counts: Sequence[int]) -> None:
        self.scale = pair.scale
        self.a, self.b_t = _Sum(pair.a_LRM, counts), _Sum(pair.b_LOR.transpose(1, 2), counts)

    def found(self) -> PairGradients:
        b_LOQ = self.b_t.stack_L.transpose(1, 2)
        return PairGradients(self.a.stack_L, torch.mul(b_LOQ, self.scale, out=b_LOQ.new_empty(b_LOQ.shape)))


def _each(stack_L: Tensor, experts: int) -> tuple[Tensor, ...]:
    """A view for each expert; the same one for all where they share it."""
    return stack_L.unbind(0) * (experts // stack_L.shape[0])


def _linears(stack: Stack, pairs: Pairs) -> tuple[_Linear, _Linear]:
    return _Linear(stack.up_L2IH, pairs.up, pairs.way), _Linear(stack.down_LHI, pairs.down, pairs.way)


def forward(
    x_RH: Tensor, weights_RK: Tensor, stack: Stack, assignment: Assignment, pairs: Pairs, keep: int,
    learns: bool,
) -> tuple[Tensor, Kept]:  # fmt: skip
    """Returns out [R,H], and what the backward wants: of the pre-activations the first pairs', at most ``keep``.

    ``learns``: there will be one; bits do not depend on it.
    """
    row_N = assignment.row_N
    score_N = spread_scores(weights_RK, assignment, x_RH.dtype)
    y_NH = empty_pairs(x_RH, x_RH.shape[1], assignment)
    up, down = _linears(stack, pairs)
    drop_up, drop_down = masks(pairs.up, pairs.seed, x_RH), masks(pairs.down, pairs.seed + 1, x_RH)
    parts = list(groups(assignment, keep))
    kept = max((group.pairs.stop for group in parts if group.pairs.stop <= keep), default=0) if learns else 0
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
    row_N, counts = assignment.row_N, assignment.counts_L.tolist()
    score_N = spread_scores(weights_RK, assignment, x_RH.dtype)
    ds_N = torch.empty_like(score_N)
    dx_NH = empty_pairs(x_RH, x_RH.shape[1], assignment) if needs_x else None
    up, down = _linears(stack, pairs)
    into_up, into_down = (None if pair is None else _Into(pair, counts) for pair in (pairs.up, pairs.down))
    drop_up, drop_down = masks(pairs.up, pairs.seed, x_RH), masks(pairs.down, pairs.seed + 1, x_RH)
    # Written to for folded experts, and where h is computed again.
    z_up_NQ, z_down_NQ = (z if overwrite else z.clone() for z in (kept.z_up_NQ, kept.z_down_NQ))
    for group in groups(assignment, keep):
        at = group.pairs
        rows, z_up = row_N[at], z_up_NQ[at]
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
        down.factor_gradients(group, dy, dz, masked(a, mask_down), z_down_NQ[at], into_down)
        if stack.down_bias_LH is not None:
            ds_N[at] += (dy * bias_rows(stack.down_bias_LH, group)).sum(-1).to(ds_N.dtype)
        dz = up.backward(group, dh, mask_up, None if dx_NH is None else dx_NH[at])
        up.factor_gradients(group, dh, dz, masked(x, mask_up), z_up, into_up)
    found = Gradients(weights=gather_scores(ds_N, weights_RK, assignment))
    if dx_NH is not None:
        found.x = combine(dx_NH, assignment)
    return found, into_up and into_up.found(), into_down and into_down.found()
