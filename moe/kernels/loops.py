"""The minimal layer as a loop of dense products: for CPUs, and for what torch's grouped product refuses.

Some experts' rows are gathered, multiplied and activated while they are in the cache; whole are only h, y and dx.

Shapes: R rows, K choices per row, L local experts, N sorted pairs, H hidden, I intermediate, G pairs
of a group of experts, O outputs, M inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from moe.assignment import Assignment
from moe.kernels.activation import scaled, scaled_backward
from moe.kernels.combine import combine, empty_pairs
from moe.kernels.parts import Douts, GiveBack, Parts
from moe.kernels.stack import Gradients, Needs, Stack, gather_scores, spread_scores

_ROWS = 1024  # of experts that share their elementwise work: fewer calls, and they still fit the cache


@dataclass(frozen=True)
class Group:
    """Consecutive experts that have pairs: where their pairs lie, and each one's number of them."""

    pairs: slice
    experts: list[int]
    sizes: list[int]


def groups(assignment: Assignment, cut: int = 0) -> Iterator[Group]:
    """Reads the counts back: no pass for a GPU that must not wait. A group that would reach past ``cut`` ends there."""
    start = end = 0
    experts: list[int] = []
    sizes: list[int] = []
    for expert, count in enumerate(assignment.counts_L.tolist()):
        if not count:
            continue
        if experts and (end + count - start > _ROWS or end <= cut < end + count):
            yield Group(slice(start, end), experts, sizes)
            start, experts, sizes = end, [], []
        experts.append(expert)
        sizes.append(count)
        end += count
    if experts:
        yield Group(slice(start, end), experts, sizes)


def _products(group: Group, left_GM: Tensor, right_L: tuple[Tensor, ...], into_GO: Tensor) -> None:
    """``into[n] = left[n] @ right[expert(n)]``."""
    parts = zip(group.experts, left_GM.split(group.sizes), into_GO.split(group.sizes), strict=True)
    for expert, left, into in parts:
        torch.mm(left, right_L[expert], out=into)


def _weight_gradients(
    group: Group, left_GO: Tensor, right_GM: Tensor, transposed: bool, into: tuple[Tensor, ...] | None
) -> None:
    """Each expert's weight gradient ``left.T @ right``, [O,M], or transposed, as its weight is stored."""
    if into is None:
        return
    if transposed:
        left_GO, right_GM = right_GM, left_GO
    parts = zip(group.experts, left_GO.split(group.sizes), right_GM.split(group.sizes), strict=True)
    for expert, left, right in parts:
        torch.mm(left.T, right, out=into[expert])


def forward(
    x_RH: Tensor, weights_RK: Tensor, stack: Stack, assignment: Assignment, keep: bool
) -> tuple[Tensor, Tensor | None]:
    row_N = assignment.row_N
    score_N = spread_scores(weights_RK, assignment, x_RH.dtype)
    y_NH = empty_pairs(x_RH, x_RH.shape[1], assignment)
    two_inner = stack.up_L2IH.shape[1]
    h_N2I = x_RH.new_empty(row_N.numel(), two_inner) if keep else None
    up_L, down_L = _experts(stack.up_L2IH), _experts(stack.down_LHI)
    for group in groups(assignment):
        pairs = group.pairs
        h = x_RH.new_empty(sum(group.sizes), two_inner) if h_N2I is None else h_N2I[pairs]
        _into_hidden(group, x_RH, row_N, stack, up_L, h)
        _out_of_hidden(group, h, score_N, stack, down_L, y_NH)
    return combine(y_NH, assignment), h_N2I


def up(x_RH: Tensor, stack: Stack, assignment: Assignment, rows_NH: None = None) -> Tensor:
    h_N2I, row_N = x_RH.new_empty(assignment.pair_N.numel(), stack.up_L2IH.shape[1]), assignment.row_N
    up_L = _experts(stack.up_L2IH)
    for group in groups(assignment):
        _into_hidden(group, x_RH, row_N, stack, up_L, h_N2I[group.pairs])
    return h_N2I


def queues_early(x_RH: Tensor) -> bool:
    return False  # rows are gathered a group at a time


def down(h_N2I: Tensor, weights_RK: Tensor, stack: Stack, assignment: Assignment) -> Tensor:
    score_N = spread_scores(weights_RK, assignment, h_N2I.dtype)
    y_NH = empty_pairs(h_N2I, stack.down_LHI.shape[1], assignment)
    down_L = _experts(stack.down_LHI)
    for group in groups(assignment):
        _out_of_hidden(group, h_N2I[group.pairs], score_N, stack, down_L, y_NH)
    return combine(y_NH, assignment)


def _experts(weight_LOM: Tensor) -> tuple[Tensor, ...]:
    """Each expert's weight, as products from the left take it."""
    return weight_LOM.transpose(1, 2).unbind(0)


def _into_hidden(
    group: Group, x_RH: Tensor, row_N: Tensor, stack: Stack, up_L: tuple[Tensor, ...], h_G2I: Tensor
) -> None:
    _products(group, x_RH.index_select(0, row_N[group.pairs]), up_L, h_G2I)
    if stack.up_bias_L2I is not None:
        h_G2I += bias_rows(stack.up_bias_L2I, group)


def _out_of_hidden(
    group: Group, h_G2I: Tensor, score_N: Tensor, stack: Stack, down_L: tuple[Tensor, ...], y_NH: Tensor
) -> None:
    pairs, score_G = group.pairs, score_N[group.pairs]
    _products(group, scaled(h_G2I, score_G, stack.form), down_L, y_NH[pairs])
    if stack.down_bias_LH is not None:
        y_NH[pairs] += (score_G[:, None] * bias_rows(stack.down_bias_LH, group)).to(y_NH.dtype)


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
    row_N, transposed = assignment.row_N, stack.form.transposed
    score_N = spread_scores(weights_RK, assignment, x_RH.dtype)
    ds_N = torch.empty_like(score_N)
    dx_NH = empty_pairs(x_RH, x_RH.shape[1], assignment) if needs.x else None
    found = _unwritten(stack, assignment, needs)
    d_up, d_down = (None if d is None else d.unbind(0) for d in (found.up, found.down))
    up, down = stack.up_L2IH.unbind(0), stack.down_LHI.unbind(0)
    for group in groups(assignment):
        pairs = group.pairs
        dy, h, score = dout_RH.index_select(0, row_N[pairs]), h_N2I[pairs], score_N[pairs]
        da, dh = dy.new_empty(dy.shape[0], h.shape[1] // 2), torch.empty_like(h)
        _products(group, dy, down, da)
        a, ds_N[pairs] = scaled_backward(da, h, score, stack.form, dh)
        _weight_gradients(group, dy, a, transposed, d_down)
        if stack.down_bias_LH is not None and needs.weights:
            ds_N[pairs] += (dy * bias_rows(stack.down_bias_LH, group)).sum(-1).to(ds_N.dtype)
        _bias_gradients(group, dy * score[:, None].to(dy.dtype) if needs.down_bias else None, found.down_bias)
        _bias_gradients(group, dh, found.up_bias)
        if dx_NH is not None:
            _products(group, dh, up, dx_NH[pairs])
        if d_up is not None:
            _weight_gradients(group, dh, x_RH.index_select(0, row_N[pairs]), transposed, d_up)
    found.x = None if dx_NH is None else combine(dx_NH, assignment)
    found.weights = gather_scores(ds_N, weights_RK, assignment) if needs.weights else None
    return found


def backward_parts(parts: Parts, douts: Douts, stack: Stack, needs: Needs, give_back: GiveBack) -> Gradients:
    """One pass over the pairs of both: what is given back is complete at its end only."""
    own_TH, wait = douts
    dout_RH, x_RH, weights_RK = torch.cat([own_TH, wait()]), torch.cat(parts.x), torch.cat(parts.weights)
    h_N2I = parts.x[0].new_empty(parts.assignment.pair_N.numel(), parts.h[0].shape[1])
    for h_M2I, place_M in zip(parts.h, parts.places, strict=True):
        h_N2I[place_M] = h_M2I
    found = backward(dout_RH, x_RH, weights_RK, h_N2I, stack, parts.assignment, needs, overwrite=True)
    tokens = own_TH.shape[0]
    give_back(None if found.x is None else found.x[tokens:], None if found.weights is None else found.weights[tokens:])
    found.x = None if found.x is None else found.x[:tokens]
    found.weights = None if found.weights is None else found.weights[:tokens]
    return found


def bias_rows(bias_LO: Tensor, group: Group) -> Tensor:
    """The bias of each of the group's pairs."""
    sizes = torch.tensor(group.sizes, device=bias_LO.device)
    return bias_LO[group.experts].repeat_interleave(sizes, 0)


def _bias_gradients(group: Group, d_GO: Tensor | None, into_LO: Tensor | None) -> None:
    if d_GO is None or into_LO is None:
        return
    for expert, d in zip(group.experts, d_GO.split(group.sizes), strict=True):
        torch.sum(d, 0, out=into_LO[expert])


def _unwritten(stack: Stack, assignment: Assignment, needs: Needs) -> Gradients:
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
