"""Triton kernels for what lies between the products of plain silu experts. One pass over memory each, no atomics.

A row's sum is added up by one program in one order, so results are the same bits every time.

Shapes: R rows, K choices per row, N sorted pairs, M of them, H hidden, I intermediate.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from moe.kernels.launching import Quick, ceil_div, power_of_two

_ROWS = 4  # of one program


@triton.jit
def silu_parts(gate, up):
    """silu(gate) * up, silu(gate), and silu's derivative, in fp32."""
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    acted = gate * sigmoid
    return acted * up, acted, sigmoid * (1.0 + gate * (1.0 - sigmoid))


@Quick
@triton.jit
def _gather_sum(y, slot, base, out, rows, pairs, hidden, choices: tl.constexpr, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * block + tl.arange(0, block)
    total = tl.zeros((block,), dtype=tl.float32)
    for k in range(choices):
        at = tl.load(slot + row * choices + k).to(tl.int64)
        here = (column < hidden) & (at < pairs)
        total += tl.load(y + at * hidden + column, mask=here, other=0.0).to(tl.float32)
    if base is not None:
        total += tl.load(base + row * hidden + column, mask=column < hidden, other=0.0).to(tl.float32)
    tl.store(out + row * hidden + column, total.to(out.dtype.element_ty), mask=column < hidden)


def gather_sum(y_NH: Tensor, slot_RK: Tensor, pairs: int, base_RH: Tensor | None = None) -> Tensor:
    """Sum over each row's choices and ``base``, in fp32: [N,H] -> [R,H]. A slot from ``pairs`` on adds nothing."""
    (rows, choices), hidden = slot_RK.shape, y_NH.shape[1]
    out_RH = y_NH.new_empty(rows, hidden)
    if rows:
        block = min(1024, power_of_two(hidden))
        grid = (rows, ceil_div(hidden, block))
        sources = (y_NH.contiguous(), slot_RK.contiguous(), base_RH)
        _gather_sum[grid](*sources, out_RH, rows, pairs, hidden, choices, block)
    return out_RH


def _in_rows(x_RH: Tensor) -> Tensor:
    """Each row in one piece, but not all of them side by side."""
    return x_RH if x_RH.stride(1) == 1 else x_RH.contiguous()


@Quick
@triton.jit
def _spread(x, wide, slot, ends, keys, out, size, hidden, choices: tl.constexpr, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * block + tl.arange(0, block)
    places = tl.minimum(tl.load(ends + keys - 1), size)
    value = tl.load(x + row * wide + column, mask=column < hidden)
    for k in range(choices):
        at = tl.load(slot + row * choices + k).to(tl.int64)
        tl.store(out + at * hidden + column, value, mask=(column < hidden) & (at < places))


def spread(x_RH: Tensor, slot_RK: Tensor, ends_L: Tensor, out_NH: Tensor) -> None:
    """``out[slot[r,k]] = x[r]`` where the slot is below the last of ``ends`` and in ``out``: each row is read once.

    Args:
        x_RH: may be columns of something wider.
    """
    x_RH = _in_rows(x_RH)
    (rows, choices), hidden = slot_RK.shape, x_RH.shape[1]
    if not rows:
        return
    block = min(2048, power_of_two(hidden))
    places = (slot_RK.contiguous(), ends_L, ends_L.numel(), out_NH, out_NH.shape[0])
    _spread[(rows, ceil_div(hidden, block))](
        x_RH, x_RH.stride(0), *places, hidden, choices, block,
        num_warps=4 if block >= 1024 else 1,
    )  # fmt: skip


@Quick
@triton.jit
def _spread_together(
    x, weight, number, slot, ends, keys, out_x, out_weight, out_number, to_x, to_weight, to_number, size, hidden, top_k,
    choices: tl.constexpr, columns: tl.constexpr, block: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * block + tl.arange(0, block)
    places = tl.minimum(tl.load(ends + keys - 1), size)
    value = tl.load(x + row * hidden + column, mask=column < hidden)
    narrow = tl.arange(0, columns)
    first = (narrow < top_k) & (tl.program_id(1) == 0)
    weights = tl.load(weight + row * top_k + narrow, mask=first)
    numbers = tl.load(number + row * top_k + narrow, mask=first).to(out_number.dtype.element_ty)
    for k in range(choices):
        at = tl.load(slot + row * choices + k).to(tl.int64)
        tl.store(out_x + at * to_x + column, value, mask=(column < hidden) & (at < places))
        tl.store(out_weight + at * to_weight + narrow, weights, mask=first & (at < places))
        tl.store(out_number + at * to_number + narrow, numbers, mask=first & (at < places))


def spread_together(
    rows: tuple[Tensor, Tensor, Tensor], slot_RC: Tensor, ends_W: Tensor, out: tuple[Tensor, Tensor, Tensor]
) -> None:
    """:func:`spread` of x [R,H], weights and numbers [R,K] at once, whose outputs may be columns of something wider."""
    x_RH, weights_RK, index_RK = (part.contiguous() for part in rows)
    (count, choices), hidden, top_k = slot_RC.shape, x_RH.shape[1], index_RK.shape[1]
    if not count:
        return
    block = min(2048, power_of_two(hidden))
    _spread_together[(count, ceil_div(hidden, block))](
        x_RH, weights_RK, index_RK, slot_RC.contiguous(), ends_W, ends_W.numel(), *out,
        *(part.stride(0) for part in out), out[0].shape[0], hidden, top_k, choices, power_of_two(top_k), block,
        num_warps=4 if block >= 1024 else 1,
    )  # fmt: skip


@triton.jit
def _scores(weight, wide, which, here, top_k: tl.constexpr):
    """Of (row, choice) pairs, in fp32."""
    return tl.load(weight + which // top_k * wide + which % top_k, mask=here, other=0.0).to(tl.float32)


@Quick
@triton.jit
def _scaled(h, weight, wide, which, a, pairs, inner, top_k: tl.constexpr, rows: tl.constexpr, block: tl.constexpr):
    pair = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)
    column = tl.program_id(1) * block + tl.arange(0, block)
    here = (pair < pairs)[:, None] & (column < inner)[None, :]
    at = pair[:, None] * (2 * inner) + column[None, :]
    gate = tl.load(h + at, mask=here, other=0.0)
    up = tl.load(h + at + inner, mask=here, other=0.0)
    value, _, _ = silu_parts(gate.to(tl.float32), up.to(tl.float32))
    s = _scores(weight, wide, tl.load(which + pair, mask=pair < pairs, other=0), pair < pairs, top_k)
    tl.store(a + pair[:, None] * inner + column[None, :], (value * s[:, None]).to(a.dtype.element_ty), mask=here)


def scaled(h_N2I: Tensor, weights_RK: Tensor, pair_N: Tensor) -> Tensor:
    """``score * silu(gate) * up`` [N,I].

    Args:
        weights_RK: has the score of pair n at ``flatten()[pair[n]]``; may be columns of something wider.
    """
    weights_RK = _in_rows(weights_RK)
    pairs, inner = h_N2I.shape[0], h_N2I.shape[1] // 2
    a_NI = h_N2I.new_empty(pairs, inner)
    block = min(512, power_of_two(inner))
    grid = (ceil_div(pairs, _ROWS), ceil_div(inner, block))
    scores = (weights_RK, weights_RK.stride(0), pair_N)
    _scaled[grid](h_N2I, *scores, a_NI, pairs, inner, weights_RK.shape[1], _ROWS, block)
    return a_NI


@Quick
@triton.jit
def _scaled_backward(
    da, h, weight, wide, which, slot, dh, ds, pairs, inner,
    top_k: tl.constexpr, rows: tl.constexpr, block: tl.constexpr
):  # fmt: skip
    at_h = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)
    pair = tl.load(which + at_h, mask=at_h < pairs, other=0)
    s = _scores(weight, wide, pair, at_h < pairs, top_k)[:, None]
    place = at_h
    if slot is not None:
        place = tl.load(slot + pair, mask=at_h < pairs, other=0)
    total = tl.zeros((rows,), dtype=tl.float32)
    for start in range(0, inner, block):
        column = start + tl.arange(0, block)
        here = (at_h < pairs)[:, None] & (column < inner)[None, :]
        at = at_h[:, None] * (2 * inner) + column[None, :]
        gate = tl.load(h + at, mask=here, other=0.0).to(tl.float32)
        up = tl.load(h + at + inner, mask=here, other=0.0).to(tl.float32)
        value, acted, slope = silu_parts(gate, up)
        d_at = da + place[:, None] * inner + column[None, :]
        d = tl.load(d_at, mask=here, other=0.0).to(tl.float32)
        total += tl.sum(d * value, 1)
        d = d * s
        at = place[:, None] * (2 * inner) + column[None, :]
        tl.store(dh + at, (d * up * slope).to(dh.dtype.element_ty), mask=here)
        tl.store(dh + at + inner, (d * acted).to(dh.dtype.element_ty), mask=here)
        tl.store(d_at, (value * s).to(da.dtype.element_ty), mask=here)
    tl.store(ds + place, total, mask=at_h < pairs)


def scaled_backward(
    da_NI: Tensor,
    h_M2I: Tensor,
    weights_QK: Tensor,
    pair_M: Tensor,
    dh_N2I: Tensor,
    ds_N: Tensor,
    slot_QK: Tensor | None = None,
) -> None:
    """See :func:`moe.kernels.activation.scaled_backward`: da becomes the scaled activation; dh may be h, and ds gets
    the scores' gradient.

    Args:
        weights_QK: as for :func:`scaled`.
        slot_QK: where each of these M pairs stands among all N, if they are not all.
    """
    pairs, inner, weights_QK = h_M2I.shape[0], da_NI.shape[1], _in_rows(weights_QK)
    block = min(256, power_of_two(inner))
    if pairs:
        grid = (ceil_div(pairs, _ROWS),)
        which = (weights_QK, weights_QK.stride(0), pair_M, slot_QK)
        _scaled_backward[grid](da_NI, h_M2I, *which, dh_N2I, ds_N, pairs, inner, weights_QK.shape[1], _ROWS, block)
