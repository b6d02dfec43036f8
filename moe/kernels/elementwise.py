"""Triton kernels for what lies between the products of plain silu experts. One pass over memory each, no atomics.

A row's sum is added up by one program in one order, so results are the same bits every time.

Shapes: R rows, K choices per row, N sorted pairs, H hidden, I intermediate.
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
def _gather_sum(y, slot, out, rows, pairs, hidden, choices: tl.constexpr, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * block + tl.arange(0, block)
    total = tl.zeros((block,), dtype=tl.float32)
    for k in range(choices):
        at = tl.load(slot + row * choices + k).to(tl.int64)
        here = (column < hidden) & (at < pairs)
        total += tl.load(y + at * hidden + column, mask=here, other=0.0).to(tl.float32)
    tl.store(out + row * hidden + column, total.to(out.dtype.element_ty), mask=column < hidden)


def gather_sum(y_NH: Tensor, slot_RK: Tensor, pairs: int) -> Tensor:
    """Sum over each row's choices in fp32: [N,H] -> [R,H]. A slot from ``pairs`` on adds nothing."""
    (rows, choices), hidden = slot_RK.shape, y_NH.shape[1]
    out_RH = y_NH.new_empty(rows, hidden)
    if rows:
        block = min(1024, triton.next_power_of_2(hidden))
        grid = (rows, triton.cdiv(hidden, block))
        _gather_sum[grid](y_NH.contiguous(), slot_RK.contiguous(), out_RH, rows, pairs, hidden, choices, block)
    return out_RH


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
def _scaled_backward(da, h, score, dh, ds, pairs, inner, rows: tl.constexpr, block: tl.constexpr):
    pair = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)
    s = tl.load(score + pair, mask=pair < pairs, other=0.0).to(tl.float32)[:, None]
    total = tl.zeros((rows,), dtype=tl.float32)
    for start in range(0, inner, block):
        column = start + tl.arange(0, block)
        here = (pair < pairs)[:, None] & (column < inner)[None, :]
        at = pair[:, None] * (2 * inner) + column[None, :]
        gate = tl.load(h + at, mask=here, other=0.0).to(tl.float32)
        up = tl.load(h + at + inner, mask=here, other=0.0).to(tl.float32)
        value, acted, slope = silu_parts(gate, up)
        d_at = da + pair[:, None] * inner + column[None, :]
        d = tl.load(d_at, mask=here, other=0.0).to(tl.float32)
        total += tl.sum(d * value, 1)
        d = d * s
        tl.store(dh + at, (d * up * slope).to(dh.dtype.element_ty), mask=here)
        tl.store(dh + at + inner, (d * acted).to(dh.dtype.element_ty), mask=here)
        tl.store(d_at, (value * s).to(da.dtype.element_ty), mask=here)
    tl.store(ds + pair, total, mask=pair < pairs)


def scaled_backward(da_NI: Tensor, h_N2I: Tensor, score_N: Tensor, dh_N2I: Tensor) -> tuple[Tensor, Tensor]:
    """See :func:`moe.kernels.activation.scaled_backward`: da becomes the scaled activation; dh may be h."""
    pairs, inner = da_NI.shape
    ds_N = torch.empty_like(score_N, dtype=torch.float32)
    block = min(256, triton.next_power_of_2(inner))
    grid = (triton.cdiv(pairs, _ROWS),)
    _scaled_backward[grid](da_NI, h_N2I, score_N, dh_N2I, ds_N, pairs, inner, _ROWS, block)
    return da_NI, ds_N
