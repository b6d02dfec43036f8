"""Triton kernels of a linear layer's soft bank: router, softmax, ``A x`` and gates in one pass over the input.

Shapes: T tokens, M inputs, E experts, R rank, X = E*R, F*R rows of A (F = E, or 1 where experts share it); Y is X
filled up to a multiple of 8, as fast products want it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora.sorted_rows import blocks, power_of_two

_ROWS, _DEPTH = 16, 128


def filled(width: int) -> int:
    return width + -width % 8


def _block(width: int) -> int:
    return max(16, power_of_two(width))


@triton.jit
def _forward(x, a, w, u, gate, z, tokens, inputs, experts, rank, rows_of_a, width, scale,
             BM: tl.constexpr, BK: tl.constexpr, X: tl.constexpr, E: tl.constexpr):  # fmt: skip
    row = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    here = row < tokens
    c = tl.arange(0, X)
    e = tl.arange(0, E)
    total = tl.zeros((BM, X), dtype=tl.float32)
    logit = tl.zeros((BM, E), dtype=tl.float32)
    for start in range(0, inputs, BK):
        k = start + tl.arange(0, BK)
        left = tl.load(x + row[:, None] * inputs + k[None, :], mask=here[:, None] & (k < inputs)[None, :], other=0.0)
        inside = (k < inputs)[:, None] & (c < experts * rank)[None, :]
        right = tl.load(a + (c % rows_of_a)[None, :] * inputs + k[:, None], mask=inside, other=0.0)
        total = tl.dot(left, right, total, input_precision="ieee")
        inside = (k < inputs)[:, None] & (e < experts)[None, :]
        right = tl.load(w + e[None, :] * inputs + k[:, None], mask=inside, other=0.0)
        logit = tl.dot(left, right, logit, input_precision="ieee")
    logit = tl.where((e < experts)[None, :], logit, float("-inf"))
    power = tl.exp(logit - tl.max(logit, 1)[:, None])
    share = power / tl.sum(power, 1)[:, None]
    tl.store(gate + row[:, None] * experts + e[None, :], share, mask=here[:, None] & (e < experts)[None, :])
    value = total.to(u.dtype.element_ty)
    tl.store(u + row[:, None] * rows_of_a + c[None, :], value, mask=here[:, None] & (c < rows_of_a)[None, :])
    spread = ((c // rank)[None, :] == e[:, None]).to(tl.float32)
    value = value.to(tl.float32) * (tl.dot(share, spread, input_precision="ieee") * scale)
    tl.store(
        z + row[:, None] * width + c[None, :], value.to(z.dtype.element_ty), mask=here[:, None] & (c < width)[None, :]
    )


def soft_forward(x_TM: Tensor, a_FRM: Tensor, w_EM: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """(``A x`` [T,F*R], the softmax of ``W x`` [T,E] fp32, ``scale * gate * A x`` [T,Y])."""
    (tokens, inputs), (own, rank, _), experts = x_TM.shape, a_FRM.shape, w_EM.shape[0]
    width = filled(experts * rank)
    u, gate = x_TM.new_empty(tokens, own * rank), x_TM.new_empty(tokens, experts, dtype=torch.float32)
    z = x_TM.new_empty(tokens, width)
    _forward[(blocks(tokens, _ROWS),)](
        x_TM, a_FRM, w_EM, u, gate, z, tokens, inputs, experts, rank, own * rank, width, scale, _ROWS, _DEPTH,
        _block(width), _block(experts),
    )  # fmt: skip
    return u, gate, z


@triton.jit
def _backward(dz, u, gate, z, d, tokens, experts, rank, rows_of_a, width, d_width, scale,
              SHARED: tl.constexpr, BM: tl.constexpr, X: tl.constexpr, E: tl.constexpr, R: tl.constexpr):  # fmt: skip
    row = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    here = row < tokens
    c = tl.arange(0, X)
    e = tl.arange(0, E)
    used = here[:, None] & (c < experts * rank)[None, :]
    up = tl.load(dz + row[:, None] * width + c[None, :], mask=used, other=0.0).to(tl.float32)
    down = tl.load(u + row[:, None] * rows_of_a + (c % rows_of_a)[None, :], mask=used, other=0.0).to(tl.float32)
    share = tl.load(gate + row[:, None] * experts + e[None, :], mask=here[:, None] & (e < experts)[None, :], other=0.0)
    belongs = (c // rank)[None, :] == e[:, None]
    weight = tl.dot(share, belongs.to(tl.float32), input_precision="ieee") * scale
    tl.store(
        z + row[:, None] * width + c[None, :], (down * weight).to(z.dtype.element_ty),
        mask=here[:, None] & (c < width)[None, :],
    )  # fmt: skip
    of_expert = ((c // rank)[:, None] == e[None, :]).to(tl.float32)
    to_gate = tl.dot(up * down, of_expert, input_precision="ieee") * scale
    to_logit = share * (to_gate - tl.sum(share * to_gate, 1)[:, None])
    # Two halves of an fp32 number, so that a product of narrow ones does not round it.
    high = to_logit.to(d.dtype.element_ty)
    low = (to_logit - high.to(tl.float32)).to(d.dtype.element_ty)
    at = d + row[:, None] * d_width + rows_of_a
    tl.store(at + e[None, :], high, mask=here[:, None] & (e < experts)[None, :])
    tl.store(at + experts + e[None, :], low, mask=here[:, None] & (e < experts)[None, :])
    fill = 2 * experts + e
    tl.store(
        at + fill[None, :], tl.zeros((BM, E), dtype=d.dtype.element_ty),
        mask=here[:, None] & (rows_of_a + fill < d_width)[None, :],
    )  # fmt: skip
    value = up * weight
    if SHARED:
        r = tl.arange(0, R)
        same = ((c % rank)[:, None] == r[None, :]) & (c < experts * rank)[:, None]
        value = tl.dot(value, same.to(tl.float32), input_precision="ieee")
        tl.store(d + row[:, None] * d_width + r[None, :], value.to(d.dtype.element_ty),
                 mask=here[:, None] & (r < rank)[None, :])  # fmt: skip
    else:
        tl.store(d + row[:, None] * d_width + c[None, :], value.to(d.dtype.element_ty), mask=used)


def soft_backward(dz_TY: Tensor, u: Tensor, gate_TE: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """From the gradient of z over the bank's outputs.

    Returns z once more [T,Y], and side by side the gradient of ``A x`` [T,F*R] and that of the logits in two halves
    [T,2E], filled up with zeros to a multiple of 8 columns.
    """
    (tokens, width), experts, rows_of_a = dz_TY.shape, gate_TE.shape[1], u.shape[1]
    z, d = torch.empty_like(dz_TY), dz_TY.new_empty(tokens, filled(rows_of_a + 2 * experts))
    _backward[(blocks(tokens, _ROWS),)](
        dz_TY, u, gate_TE, z, d, tokens, experts, rank, rows_of_a, width, d.shape[1], scale,
        rows_of_a < experts * rank, _ROWS, _block(width), _block(experts), _block(rank),
    )  # fmt: skip
    return z, d
