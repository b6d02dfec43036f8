"""Triton kernels of what stands between an expert's projections, with the low-rank terms on both sides of it.

The up projection's pair is added while the frozen products are read, and the down projection's ``A a`` summed while the
activation is written: neither costs a pass over memory. The backward does the same the other way round.

    gate = u + s z1 B1        up = v + s z2 B2        a = score * silu(gate) * up        w = A (keep * a)

Shapes: N sorted pairs, T rows, K choices, I intermediate, Q rank, S parts of a sum.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora.rank_kernels import added, part_buffer, rank_block, strides
from lora.sorted_rows import SortedRows, blocks
from moe.kernels.elementwise import silu_parts

_COLUMNS = 64


@dataclass(frozen=True)
class Between:
    """What the activation stands between.

    Attributes:
        gate, up: frozen products, [N,I] or with ``gather`` [T,I]; rows equally far apart in both.
        score: weight of each (row, choice) pair, contiguous.
        z: ``A x`` of the up side, [N,Q]; with ``own`` [N,2Q], gate's and up's side by side. None without a pair.
        b_gate, b_up: [L,I,Q] with the same strides.
        a_down: [L,Q,I], or None.
        keep: [N,I] bool, where dropout leaves the down side's pair its input; or None.
    """

    gate: Tensor
    up: Tensor
    score: Tensor
    z: Tensor | None
    b_gate: Tensor | None
    b_up: Tensor | None
    a_down: Tensor | None
    keep: Tensor | None
    scale: float
    scale_down: float
    own: bool
    gather: bool

    @property
    def inner(self) -> int:
        return self.gate.shape[1]

    @property
    def rank(self) -> int:
        return 1 if self.b_gate is None else self.b_gate.shape[2]

    @property
    def down_rank(self) -> int:
        return 1 if self.a_down is None else self.a_down.shape[1]


@triton.jit
def _low_rank(left, factor, column, q, inner, rank, to_out, to_rank):
    """``left [BM,Q] @ B.T [Q,BN]`` of one expert's B."""
    at = factor + column[None, :] * to_out + q[:, None] * to_rank
    right = tl.load(at, mask=(column < inner)[None, :] & (q < rank)[:, None], other=0.0)
    return tl.dot(left, right, input_precision="ieee")


@triton.jit
def _with_pair(at, inside, left, factor, column, q, inner, rank, to_out, to_rank, scale, PAIR: tl.constexpr):
    """A tile of a frozen product in fp32, and ``scale * left @ B.T`` on it."""
    value = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    if PAIR:
        value += scale * _low_rank(left, factor, column, q, inner, rank, to_out, to_rank)
    return value


@triton.jit
def _kept(at, inside, DROPS: tl.constexpr):
    """1 where dropout leaves an entry, 0 where not."""
    value = 1.0
    if DROPS:
        value = (tl.load(at, mask=inside, other=0) != 0).to(tl.float32)
    return value


@triton.jit
def _rows_of(z, line, here, q, rank, z_row):
    return tl.load(z + line[:, None] * z_row + q[None, :], mask=here[:, None] & (q < rank)[None, :], other=0.0)


@triton.jit
def _back_to_rank(d, factor, column, q, inner, rank, to_out, to_rank, total):
    """``total + d [BM,BN] @ B [BN,Q]`` of one expert's B."""
    at = factor + column[:, None] * to_out + q[None, :] * to_rank
    right = tl.load(at, mask=(column < inner)[:, None] & (q < rank)[None, :], other=0.0)
    return tl.dot(d, right, total, input_precision="ieee")


@triton.jit
def _activate(gate, up, row_step, pair, score, z, z_row, z_up, b_gate, b_up, b_expert, b_out, b_rank, a_down, a_expert,
              a_rank, a_input, keep, a, w, table, tiles, pairs, inner, rank, down_rank, scale,
              CHOICES: tl.constexpr, GATHER: tl.constexpr, UP: tl.constexpr, DOWN: tl.constexpr, KEEP: tl.constexpr,
              PARTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, Q: tl.constexpr, QD: tl.constexpr):  # fmt: skip
    tile = tl.program_id(0)
    part = tl.program_id(1)
    expert = tl.load(table + tile).to(tl.int64)
    if expert >= 0:
        line = tl.load(table + tiles + tile) + tl.arange(0, BM)
        here = line < tl.load(table + 2 * tiles + tile)
        line = line.to(tl.int64)
        of = tl.load(pair + line, mask=here, other=0)
        source = of // CHOICES if GATHER else line
        s = tl.load(score + of, mask=here, other=0.0).to(tl.float32)[:, None]
        q = tl.arange(0, Q)
        qd = tl.arange(0, QD)
        # Without a pair z stands for any tensor, and nothing of it is used.
        z_gate = _rows_of(z, line, here & UP, q, rank, z_row)
        z_other = _rows_of(z + z_up, line, here & UP, q, rank, z_row)
        bg, bu, ad = b_gate + expert * b_expert, b_up + expert * b_expert, a_down + expert * a_expert
        total = tl.zeros((BM, QD), dtype=tl.float32)
        chunk = tl.cdiv(tl.cdiv(inner, BN), PARTS) * BN
        for start in range(part * chunk, tl.minimum((part + 1) * chunk, inner), BN):
            column = start + tl.arange(0, BN)
            inside = here[:, None] & (column < inner)[None, :]
            at = source[:, None] * row_step + column[None, :]
            g = _with_pair(gate + at, inside, z_gate, bg, column, q, inner, rank, b_out, b_rank, scale, UP)
            u = _with_pair(up + at, inside, z_other, bu, column, q, inner, rank, b_out, b_rank, scale, UP)
            value, _, _ = silu_parts(g, u)
            value = (value * s).to(a.dtype.element_ty)
            flat = line[:, None] * inner + column[None, :]
            tl.store(a + flat, value, mask=inside)
            if DOWN:
                value = (value * _kept(keep + flat, inside, KEEP)).to(a.dtype.element_ty)
                total = _back_to_rank(value, ad, column, qd, inner, down_rank, a_input, a_rank, total)
        if DOWN:
            at = (part.to(tl.int64) * pairs + line)[:, None] * down_rank + qd[None, :]
            tl.store(w + at, total.to(w.dtype.element_ty), mask=here[:, None] & (qd < down_rank)[None, :])


def activate(of: Between, by: SortedRows) -> tuple[Tensor, Tensor | None]:
    """(a [N,I], w [N,Q]; None without a pair on the down side)."""
    parts = by.parts(blocks(of.inner, _COLUMNS))
    a_NI = of.gate.new_empty(by.pairs, of.inner)
    w = None if of.a_down is None else part_buffer(a_NI, parts, by.pairs, of.down_rank)
    _activate[(by.tiles, parts)](
        *_read(of, by), a_NI, a_NI if w is None else w, by.table_X, by.tiles, by.pairs, of.inner, of.rank,
        of.down_rank, of.scale, *_flags(of, by), parts, by.rows, _COLUMNS, rank_block(of.rank),
        rank_block(of.down_rank),
    )  # fmt: skip
    return a_NI, None if w is None else added(w, a_NI.dtype)


def _read(of: Between, by: SortedRows) -> tuple[object, ...]:
    """The arguments that both kernels read; what is missing is never touched, and stands in as any tensor."""
    up = of.z is not None and of.b_gate is not None
    return (
        of.gate, of.up, of.gate.stride(0), by.pair_N, of.score,
        of.z if up else of.gate, of.z.stride(0) if up else 0, of.rank if of.own else 0,
        of.b_gate if up else of.gate, of.b_up if up else of.gate, *(strides(of.b_gate) if up else (0, 0, 0)),
        of.gate if of.a_down is None else of.a_down, *((0, 0, 0) if of.a_down is None else strides(of.a_down)),
        of.gate if of.keep is None else of.keep.view(torch.uint8),
    )  # fmt: skip


def _flags(of: Between, by: SortedRows) -> tuple[object, ...]:
    return by.choices, of.gather, of.z is not None, of.a_down is not None, of.keep is not None


@triton.jit
def _activate_backward(gate, up, row_step, pair, score, z, z_row, z_up, b_gate, b_up, b_expert, b_out, b_rank, a_down,
                       a_expert, a_rank, a_input, keep, da, dw, dh, a, ds, dz, table, tiles, pairs, slots, inner, rank,
                       down_rank, scale, scale_down,
                       CHOICES: tl.constexpr, GATHER: tl.constexpr, UP: tl.constexpr, DOWN: tl.constexpr,
                       KEEP: tl.constexpr, OWN: tl.constexpr, PARTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                       Q: tl.constexpr, QD: tl.constexpr):  # fmt: skip
    tile = tl.program_id(0)
    part = tl.program_id(1)
    expert = tl.load(table + tile).to(tl.int64)
    if expert >= 0:
        line = tl.load(table + tiles + tile) + tl.arange(0, BM)
        here = line < tl.load(table + 2 * tiles + tile)
        line = line.to(tl.int64)
        of = tl.load(pair + line, mask=here, other=0)
        source = of // CHOICES if GATHER else line
        s = tl.load(score + of, mask=here, other=0.0).to(tl.float32)[:, None]
        q, qd = tl.arange(0, Q), tl.arange(0, QD)
        # Without a pair z stands for any tensor, and nothing of it is used.
        z_gate = _rows_of(z, line, here & UP, q, rank, z_row)
        z_other = _rows_of(z + z_up, line, here & UP, q, rank, z_row)
        bg, bu, ad = b_gate + expert * b_expert, b_up + expert * b_expert, a_down + expert * a_expert
        down = _rows_of(dw, line, here & DOWN, qd, down_rank, down_rank)
        to_score = tl.zeros((BM,), dtype=tl.float32)
        to_gate = tl.zeros((BM, Q), dtype=tl.float32)
        to_up = to_gate
        chunk = tl.cdiv(tl.cdiv(inner, BN), PARTS) * BN
        for start in range(part * chunk, tl.minimum((part + 1) * chunk, inner), BN):
            column = start + tl.arange(0, BN)
            inside = here[:, None] & (column < inner)[None, :]
            flat = line[:, None] * inner + column[None, :]
            at = source[:, None] * row_step + column[None, :]
            g = _with_pair(gate + at, inside, z_gate, bg, column, q, inner, rank, b_out, b_rank, scale, UP)
            u = _with_pair(up + at, inside, z_other, bu, column, q, inner, rank, b_out, b_rank, scale, UP)
            d = tl.load(da + source[:, None] * inner + column[None, :], mask=inside, other=0.0).to(tl.float32)
            kept = _kept(keep + flat, inside, KEEP)
            if DOWN:
                d += scale_down * kept * _low_rank(down, ad, column, qd, inner, down_rank, a_input, a_rank)
            value, acted, slope = silu_parts(g, u)
            to_score += tl.sum(d * value, 1)
            d *= s
            d_gate = (d * u * slope).to(dh.dtype.element_ty)
            d_up = (d * acted).to(dh.dtype.element_ty)
            dh_at = dh + flat + line[:, None] * inner
            tl.store(dh_at, d_gate, mask=inside)
            tl.store(dh_at + inner, d_up, mask=inside)
            if DOWN:
                tl.store(a + flat, (value * s * kept).to(a.dtype.element_ty), mask=inside)
            if UP:
                to_gate = _back_to_rank(d_gate, bg, column, q, inner, rank, b_out, b_rank, to_gate)
                if OWN:
                    to_up = _back_to_rank(d_up, bu, column, q, inner, rank, b_out, b_rank, to_up)
                else:
                    to_gate = _back_to_rank(d_up, bu, column, q, inner, rank, b_out, b_rank, to_gate)
        tl.store(ds + part.to(tl.int64) * slots + of, to_score.to(ds.dtype.element_ty), mask=here)
        if UP:
            at = dz + (part.to(tl.int64) * pairs + line)[:, None] * (2 * rank if OWN else rank) + q[None, :]
            inside = here[:, None] & (q < rank)[None, :]
            tl.store(at, to_gate.to(dz.dtype.element_ty), mask=inside)
            if OWN:
                tl.store(at + rank, to_up.to(dz.dtype.element_ty), mask=inside)


@dataclass(frozen=True)
class BetweenGradients:
    """Of h [N,2I] and the scores (like them); ``a`` [N,I], what the down side's pair saw; ``A``'s dz, unscaled."""

    dh: Tensor
    a: Tensor
    score: Tensor
    dz: Tensor | None


def activate_backward(
    da: Tensor, dw_NQ: Tensor | None, of: Between, by: SortedRows, dh_N2I: Tensor, complete: bool
) -> BetweenGradients:
    """The derivative of :func:`activate`.

    Args:
        da: gradient of a, contiguous, gathered as gate and up are. Its memory is used if they are not gathered.
        dw_NQ: gradient of w over ``scale_down``.
        dh_N2I: receives the gradient of gate and up; may hold them, if they are not gathered.
        complete: whether every (row, choice) is one of the pairs.
    """
    parts = by.parts(blocks(of.inner, _COLUMNS))
    a_NI = da.new_empty(by.pairs, of.inner) if of.gather else da
    ds = of.score.new_empty(parts, *of.score.shape, dtype=of.score.dtype if parts == 1 else torch.float32)
    if not complete:
        ds.zero_()
    width = of.rank * (2 if of.own else 1)
    dz = None if of.z is None else part_buffer(a_NI, parts, by.pairs, width)
    _activate_backward[(by.tiles, parts)](
        *_read(of, by), da, da if dw_NQ is None else dw_NQ, dh_N2I, a_NI, ds, da if dz is None else dz, by.table_X,
        by.tiles, by.pairs, of.score.numel(), of.inner, of.rank, of.down_rank, of.scale, of.scale_down,
        *_flags(of, by), of.own, parts, by.rows, _COLUMNS, rank_block(of.rank), rank_block(of.down_rank),
    )  # fmt: skip
    return BetweenGradients(dh_N2I, a_NI, added(ds, of.score.dtype), None if dz is None else added(dz, a_NI.dtype))
