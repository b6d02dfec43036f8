"""Rotary position embedding (Su et al., arXiv 2104.09864) of queries and keys in one Triton kernel, and the way back.

transformers' function takes ten operations, and autograd thirty for their gradients, each over all queries or keys.
Every product is rounded as theirs is, so the results are the same bits.

Shapes: S positions, T tokens, N heads of queries, M of keys, D numbers of a head, each in a plane with one D/2 further.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from moe.kernels.launching import Quick, ceil_div, power_of_two

_HEADS = 64  # of one program, queries' and keys', of one token after another


@triton.jit
def _rounded(x, y):
    """Their product as a tensor of x's type holds it, in fp32."""
    return (x.to(tl.float32) * y.to(tl.float32)).to(x.dtype).to(tl.float32)


@Quick
@triton.jit(do_not_specialize=["rows", "positions"])
def _rotate(
    q, k, cos, sin, q_out, k_out, rows, positions,
    queries: tl.constexpr, keys: tl.constexpr, half: tl.constexpr, back: tl.constexpr,
    block: tl.constexpr, width: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    token, head = row // (queries + keys), (row % (queries + keys)).to(tl.int32)
    column = tl.arange(0, width)[None, :]
    here = (row < rows)[:, None] & (column < half)
    of_query = here & (head < queries)[:, None]
    of_key = here & (head >= queries)[:, None]
    at_query = ((token * queries + head) * (2 * half))[:, None] + column
    at_key = ((token * keys + head - queries) * (2 * half))[:, None] + column
    low = tl.where(of_query, tl.load(q + at_query, of_query), tl.load(k + at_key, of_key))
    high = tl.where(of_query, tl.load(q + at_query + half, of_query), tl.load(k + at_key + half, of_key))
    angle = ((token % positions) * (2 * half))[:, None] + column
    cos_low, cos_high = tl.load(cos + angle, here), tl.load(cos + angle + half, here)
    sin_low, sin_high = tl.load(sin + angle, here), tl.load(sin + angle + half, here)
    if back:
        low_out = _rounded(low, cos_low) + _rounded(high, sin_high)
        high_out = _rounded(high, cos_high) - _rounded(low, sin_low)
    else:
        low_out = _rounded(low, cos_low) - _rounded(high, sin_low)
        high_out = _rounded(high, cos_high) + _rounded(low, sin_high)
    tl.store(q_out + at_query, low_out.to(q.dtype.element_ty), of_query)
    tl.store(q_out + at_query + half, high_out.to(q.dtype.element_ty), of_query)
    tl.store(k_out + at_key, low_out.to(q.dtype.element_ty), of_key)
    tl.store(k_out + at_key + half, high_out.to(q.dtype.element_ty), of_key)


def rotate(q_TND: Tensor, k_TMD: Tensor, cos_SD: Tensor, sin_SD: Tensor, back: bool) -> tuple[Tensor, Tensor]:
    """Both turned by their positions' angles, or gradients ``back``. All of one 16-bit type, and contiguous.

    Args:
        cos_SD: of each position, or of each token of a batch.
    """
    (tokens, queries, size), keys = q_TND.shape, k_TMD.shape[1]
    out = q_TND.new_empty(q_TND.shape), k_TMD.new_empty(k_TMD.shape)
    rows = tokens * (queries + keys)
    if rows:
        sizes = (rows, cos_SD.shape[0], queries, keys, size // 2, back, _HEADS, power_of_two(size // 2))
        # A product and a sum made into one operation would be rounded once.
        _rotate[(ceil_div(rows, _HEADS),)](q_TND, k_TMD, cos_SD, sin_SD, *out, *sizes, enable_fp_fusion=False)
    return out
