"""Triton kernels for what lies between the products of plain silu experts. One pass over memory each, no atomics.

A row's sum is added up by one program in one order, so results are the same bits every time.

Shapes: R rows, K choices per row, N sorted pairs, M of them, H hidden, I intermediate.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS = 4  # of one program


@triton.jit
def silu_parts(gate, up):
    """silu(gate) * up, silu(gate), and silu's derivative, in fp32."""
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    acted = gate * sigmoid
    return acted * up, acted, sigmoid * (1.0 + gate * (1.0 - sigmoid))


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
        block = min(1024, triton.next_power_of_2(hidden))
        grid = (rows, triton.cdiv(hidden, block))
        sources = (y_NH.contiguous(), slot_RK.contiguous(), base_RH)
        _gather_sum[grid](*sources, out_RH, rows, pairs, hidden, choices, block)
    return out_RH


@triton.jit
def _spread(
    x, wide, slot, counts, stride, out, hidden, keys, choices: tl.constexpr, block: tl.constexpr, most: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * block + tl.arange(0, block)
    key = tl.arange(0, most)
    places = tl.sum(tl.load(counts + key * stride, mask=key < keys, other=0), 0)
    value = tl.load(x + row * wide + column, mask=column < hidden)
    for k in range(choices):
        at = tl.load(slot + row * choices + k).to(tl.int64)
        tl.store(out + at * hidden + column, value, mask=(column < hidden) & (at < places))


def spread(x_RH: Tensor, slot_RK: Tensor, counts_L: Tensor, out_NH: Tensor) -> None:
    """``out[slot[r,k]] = x[r]`` where the slot is below the sum of ``counts``: each row is read once.

    Args:
        x_RH: may be columns of something wider.
    """
    if x_RH.stride(1) != 1:
        x_RH = x_RH.contiguous()
    (rows, choices), hidden, keys = slot_RK.shape, x_RH.shape[1], counts_L.numel()
    if not rows:
        return
    block = min(2048, triton.next_power_of_2(hidden))
    grid = (rows, triton.cdiv(hidden, block))
    _spread[grid](
        x_RH, x_RH.stride(0), slot_RK.contiguous(), counts_L, counts_L.stride(0), out_NH, hidden, keys, choices,
        block, triton.next_power_of_2(keys), num_warps=4 if block >= 1024 else 1,
    )  # fmt: skip


@triton.jit
def _scaled(h, score, a, pairs, inner, rows: tl.constexpr, block: tl.constexpr):
    pair = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)
    column = tl.program_id(1) * block + tl.arange(0, block)
    here = (pair < pairs)[:, None] & (column < inner)[None, :]
    at = pair[:, None] * (2 * inner) + column[None, :]
    gate = tl.load(h + at, mask=here, other=0.0).to(tl.float32)
    up = tl.load(h + at + inner, mask=here, other=0.0).to(tl.float32)
    value, _, _ = silu_parts(gate, up)
    s = tl.load(score + pair, mask=pair < pairs, other=0.0).to(tl.float32)
    tl.store(a + pair[:, None] * inner + column[None, :], (value * s[:, None]).to(a.dtype.element_ty), mask=here)


def scaled(h_N2I: Tensor, score_N: Tensor) -> Tensor:
    """``score * silu(gate) * up`` [N,I]."""
    pairs, inner = h_N2I.shape[0], h_N2I.shape[1] // 2
    a_NI = h_N2I.new_empty(pairs, inner)
    block = min(512, triton.next_power_of_2(inner))
    grid = (triton.cdiv(pairs, _ROWS), triton.cdiv(inner, block))
    _scaled[grid](h_N2I, score_N, a_NI, pairs, inner, _ROWS, block)
    return a_NI


@triton.jit
def _scaled_backward(da, h, score, dh, ds, place, pairs, inner, rows: tl.constexpr, block: tl.constexpr):
    pair = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)
    at_h = pair
    if place is not None:
        pair = tl.load(place + pair, mask=pair < pairs, other=0)
    s = tl.load(score + pair, mask=at_h < pairs, other=0.0).to(tl.float32)[:, None]
    total = tl.zeros((rows,), dtype=tl.float32)
    for start in range(0, inner, block):
        column = start + tl.arange(0, block)
        here = (at_h < pairs)[:, None] & (column < inner)[None, :]
        at = at_h[:, None] * (2 * inner) + column[None, :]
        gate = tl.load(h + at, mask=here, other=0.0).to(tl.float32)
        up = tl.load(h + at + inner, mask=here, other=0.0).to(tl.float32)
        value, acted, slope = silu_parts(gate, up)
        d_at = da + pair[:, None] * inner + column[None, :]
        d = tl.load(d_at, mask=here, other=0.0).to(tl.float32)
        total += tl.sum(d * value, 1)
        d = d * s
        at = pair[:, None] * (2 * inner) + column[None, :]
        tl.store(dh + at, (d * up * slope).to(dh.dtype.element_ty), mask=here)
        tl.store(dh + at + inner, (d * acted).to(dh.dtype.element_ty), mask=here)
        tl.store(d_at, (value * s).to(da.dtype.element_ty), mask=here)
    tl.store(ds + pair, total, mask=at_h < pairs)


def scaled_backward(da_NI: Tensor, h_N2I: Tensor, score_N: Tensor, dh_N2I: Tensor) -> tuple[Tensor, Tensor]:
    """See :func:`moe.kernels.activation.scaled_backward`: da becomes the scaled activation; dh may be h."""
    ds_N = torch.empty_like(score_N, dtype=torch.float32)
    scaled_backward_placed(da_NI, h_N2I, score_N, dh_N2I, ds_N, None)
    return da_NI, ds_N


def scaled_backward_placed(
    da_NI: Tensor, h_M2I: Tensor, score_N: Tensor, dh_N2I: Tensor, ds_N: Tensor, place_M: Tensor | None
) -> None:
    """The same for M of the N pairs: h's row m belongs to pair ``place[m]`` of all others, which are written."""
    pairs, inner = h_M2I.shape[0], da_NI.shape[1]
    block = min(256, triton.next_power_of_2(inner))
    if pairs:
        grid = (triton.cdiv(pairs, _ROWS),)
        _scaled_backward[grid](da_NI, h_M2I, score_N, dh_N2I, ds_N, place_M, pairs, inner, _ROWS, block)
