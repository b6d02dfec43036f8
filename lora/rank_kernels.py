"""Triton kernels of low-rank products over rows sorted by expert: one launch and one pass over memory each.

A rank of 8 or 16 leaves a matrix unit idle in a general grouped product, and what such a product costs at these sizes
is its reading and its launch. Sums are in fp32 and in one order, without atomics: two runs give the same bits.

Shapes: R rows, N sorted pairs, L local experts, M inputs, O outputs, Q rank, W one of the wide axes, S parts of a sum.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora.sorted_rows import SortedRows, blocks, power_of_two

_DEPTH = 128


def rank_block(rank: int) -> int:
    """The rank as a matrix unit takes it."""
    return max(16, power_of_two(rank))


@triton.jit
def _to_rank(x, pair, copy, factor, z, table, tiles, pairs, inputs, rank, to_expert, to_rank, to_input,
             CHOICES: tl.constexpr, COPY: tl.constexpr, PARTS: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
             Q: tl.constexpr):  # fmt: skip
    tile = tl.program_id(0)
    part = tl.program_id(1)
    expert = tl.load(table + tile)
    if expert >= 0:
        line = tl.load(table + tiles + tile) + tl.arange(0, BM)
        here = line < tl.load(table + 2 * tiles + tile)
        line = line.to(tl.int64)
        source = line
        if CHOICES > 0:
            source = tl.load(pair + line, mask=here, other=0) // CHOICES
        q = tl.arange(0, Q)
        factor += expert.to(tl.int64) * to_expert
        total = tl.zeros((BM, Q), dtype=tl.float32)
        chunk = tl.cdiv(tl.cdiv(inputs, BK), PARTS) * BK
        for start in range(part * chunk, tl.minimum((part + 1) * chunk, inputs), BK):
            k = start + tl.arange(0, BK)
            inside = here[:, None] & (k < inputs)[None, :]
            left = tl.load(x + source[:, None] * inputs + k[None, :], mask=inside, other=0.0)
            if COPY:
                tl.store(copy + line[:, None] * inputs + k[None, :], left, mask=inside)
            at = k[:, None] * to_input + q[None, :] * to_rank
            right = tl.load(factor + at, mask=(k < inputs)[:, None] & (q < rank)[None, :], other=0.0)
            total = tl.dot(left, right, total, input_precision="ieee")
        at = (part.to(tl.int64) * pairs + line)[:, None] * rank + q[None, :]
        tl.store(z + at, total.to(z.dtype.element_ty), mask=here[:, None] & (q < rank)[None, :])


def to_rank(x: Tensor, factor_LQM: Tensor, sorted_by: SortedRows, gather: bool) -> Tensor:
    """``factor[expert(n)] @ x[n]`` [N,Q]. ``gather``: x has R rows, and each pair takes its own; else N of them."""
    return _down(x, factor_LQM, sorted_by, gather, copy=False)[0]


def gather_to_rank(x_RM: Tensor, factor_LQM: Tensor, sorted_by: SortedRows) -> tuple[Tensor, Tensor]:
    """The gathered rows [N,M], and :func:`to_rank` of them."""
    z_NQ, x_NM = _down(x_RM, factor_LQM, sorted_by, gather=True, copy=True)
    return x_NM, z_NQ


def _down(x: Tensor, factor_LQM: Tensor, by: SortedRows, gather: bool, copy: bool) -> tuple[Tensor, Tensor]:
    rank, inputs = factor_LQM.shape[1:]
    parts = by.parts(blocks(inputs, _DEPTH))
    z = part_buffer(x, parts, by.pairs, rank)
    x_NM = x.new_empty(by.pairs, inputs) if copy else x
    _to_rank[(by.tiles, parts)](
        x.contiguous(), by.table_X if by.pair_N is None else by.pair_N, x_NM, factor_LQM, z, by.table_X, by.tiles,
        by.pairs, inputs, rank, *strides(factor_LQM), by.choices if gather and by.pair_N is not None else 0, copy,
        parts, by.rows, _DEPTH, rank_block(rank),
    )  # fmt: skip
    return added(z, x.dtype), x_NM


@triton.jit
def _from_rank(y, z, factor, table, tiles, outputs, rank, z_row, to_expert, to_rank, to_output, scale,
               ADD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, Q: tl.constexpr):  # fmt: skip
    tile = tl.program_id(0)
    expert = tl.load(table + tile)
    if expert >= 0:
        line = tl.load(table + tiles + tile) + tl.arange(0, BM)
        here = line < tl.load(table + 2 * tiles + tile)
        line = line.to(tl.int64)
        column = tl.program_id(1) * BN + tl.arange(0, BN)
        inside = here[:, None] & (column < outputs)[None, :]
        at = y + line[:, None] * outputs + column[None, :]
        q = tl.arange(0, Q)
        left = tl.load(z + line[:, None] * z_row + q[None, :], mask=here[:, None] & (q < rank)[None, :], other=0.0)
        f = factor + expert.to(tl.int64) * to_expert + q[:, None] * to_rank + column[None, :] * to_output
        right = tl.load(f, mask=(q < rank)[:, None] & (column < outputs)[None, :], other=0.0)
        value = tl.dot(left, right, input_precision="ieee") * scale
        if ADD:
            value += tl.load(at, mask=inside, other=0.0).to(tl.float32)
        tl.store(at, value.to(y.dtype.element_ty), mask=inside)


def from_rank(
    z_NQ: Tensor, factor_LQO: Tensor, scale: float, sorted_by: SortedRows, onto: Tensor | None = None
) -> Tensor:
    """``scale * z[n] @ factor[expert(n)]`` [N,O]; added to ``onto`` in place, if it is given."""
    rank, outputs = factor_LQO.shape[1:]
    y_NO = z_NQ.new_empty(sorted_by.pairs, outputs) if onto is None else onto
    columns = min(128, max(16, power_of_two(outputs)))
    _from_rank[(sorted_by.tiles, blocks(outputs, columns))](
        y_NO, z_NQ, factor_LQO, sorted_by.table_X, sorted_by.tiles, outputs, rank, z_NQ.stride(0),
        *strides(factor_LQO), scale, onto is not None, sorted_by.rows, columns, rank_block(rank),
    )  # fmt: skip
    return y_NO


@triton.jit
def _factor_gradient(left, pair, z, out, ends, width, rank, left_row, z_row, to_expert, to_rank, to_width, scale,
                     CHOICES: tl.constexpr, BW: tl.constexpr, BR: tl.constexpr, Q: tl.constexpr):  # fmt: skip
    expert = tl.program_id(0)
    w = tl.program_id(1) * BW + tl.arange(0, BW)
    q = tl.arange(0, Q)
    end = tl.load(ends + expert)
    first = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    total = tl.zeros((Q, BW), dtype=tl.float32)
    for start in range(first, end, BR):
        line = start + tl.arange(0, BR)
        here = line < end
        line = line.to(tl.int64)
        source = line
        if CHOICES > 0:
            source = tl.load(pair + line, mask=here, other=0) // CHOICES
        a = tl.load(z + line[None, :] * z_row + q[:, None], mask=here[None, :] & (q < rank)[:, None], other=0.0)
        b = tl.load(
            left + source[:, None] * left_row + w[None, :], mask=here[:, None] & (w < width)[None, :], other=0.0
        )
        total = tl.dot(a, b, total, input_precision="ieee")
    at = out + expert.to(tl.int64) * to_expert + q[:, None] * to_rank + w[None, :] * to_width
    tl.store(at, (total * scale).to(out.dtype.element_ty), mask=(q < rank)[:, None] & (w < width)[None, :])


def factor_gradient(
    wide: Tensor, z_NQ: Tensor, scale: float, sorted_by: SortedRows, like: Tensor, rank_first: bool, gather: bool
) -> Tensor:
    """``scale`` times the sum of ``z[n]`` x ``wide[n]`` over each expert's rows: the gradient of one factor.

    Args:
        wide: [N,W], or [R,W] with ``gather``; columns side by side, rows any distance apart.
        like: the factor: [L,Q,W] with ``rank_first``, else [L,W,Q]; with 1 for L it is shared by all experts.
    """
    experts, shared = sorted_by.experts, like.shape[0] < sorted_by.experts
    out = like.new_empty(experts, *like.shape[1:], dtype=torch.float32 if shared else like.dtype)
    to_expert, to_rank, to_width = out.stride() if rank_first else (out.stride(0), out.stride(2), out.stride(1))
    rank, width = z_NQ.shape[1], wide.shape[1]
    columns = min(128, max(16, power_of_two(width)))
    _factor_gradient[(experts, blocks(width, columns))](
        wide, sorted_by.table_X if sorted_by.pair_N is None else sorted_by.pair_N, z_NQ, out, sorted_by.ends_L, width,
        rank, wide.stride(0), z_NQ.stride(0), to_expert, to_rank, to_width, scale,
        sorted_by.choices if gather and sorted_by.pair_N is not None else 0, columns, 128, rank_block(rank),
    )  # fmt: skip
    return out.sum(0, keepdim=True).to(like.dtype) if shared else out


def strides(factor_LXY: Tensor) -> tuple[int, int, int]:
    """With 0 for the expert's where one matrix serves all experts."""
    to_expert, first, second = factor_LXY.stride()
    return (to_expert if factor_LXY.shape[0] > 1 else 0), first, second


def part_buffer(like: Tensor, parts: int, rows: int, width: int) -> Tensor:
    """Where the parts of a split sum go, [S, rows, width] fp32; a whole sum goes to [1, ...] in like's dtype."""
    return like.new_empty(parts, rows, width, dtype=like.dtype if parts == 1 else torch.float32)


@triton.jit
def _added(parts, out, size, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for part in range(PARTS):
        total += tl.load(parts + part * size + at, mask=at < size, other=0.0)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=at < size)


def added(parts_SXY: Tensor, dtype: torch.dtype) -> Tensor:
    """The parts of a split sum added up, in their order, [X,Y]."""
    parts = parts_SXY.shape[0]
    if parts == 1:
        return parts_SXY[0] if parts_SXY.dtype == dtype else parts_SXY[0].to(dtype)
    out = parts_SXY.new_empty(parts_SXY.shape[1:], dtype=dtype)
    _added[(blocks(out.numel(), 1024),)](parts_SXY, out, out.numel(), parts, 1024)
    return out
