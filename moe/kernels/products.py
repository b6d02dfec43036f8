"""Grouped products in Triton: rows are gathered while they are loaded, epilogues do the elementwise work.

A program computes one tile of one expert's rows. Which, stands in a table that is made on the device, so that nothing
is read back; there are as many programs as could be needed, and those beyond leave at once. Sums are in fp32 and in one
order. Tile sizes are a function of the shapes alone, never of a timing: with them the order of additions would change.

Shapes: R rows, L local experts, N sorted pairs, H hidden, I intermediate, O outputs, M inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe.kernels.elementwise import silu_parts


@dataclass(frozen=True)
class Tiles:
    """``rows`` x ``columns`` of the result, ``depth`` of the sum at a time; and how a program runs."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int

    @property
    def launch(self) -> dict[str, int]:
        return {"BM": self.rows, "BN": self.columns, "BK": self.depth, "num_warps": self.num_warps,
                "num_stages": self.num_stages}  # fmt: skip


def tiles_for(rows: int, columns: int, depth: int, element_size: int) -> Tiles:
    """For a result of ``rows`` (as expected per expert) x ``columns`` and a sum over ``depth``; smaller for fp32."""
    most = 128 if element_size <= 2 else 64
    sizes = [max(16, min(limit, triton.next_power_of_2(size))) for size, limit in
             ((max(rows, 1), most), (max(columns, 1), most), (max(depth, 1), most // 2))]  # fmt: skip
    return Tiles(*sizes, num_warps=8 if sizes[0] * sizes[1] >= 128 * 64 else 4, num_stages=3)


@dataclass(frozen=True)
class TileTable:
    """Expert (-1: none) and first pair of each program's rows, and where each expert's pairs end; on the device."""

    expert_P: Tensor
    start_P: Tensor
    end_L: Tensor


def tile_table(counts_L: Tensor, pairs: int, rows: int) -> TileTable:
    """As many entries as any counts that sum to ``pairs`` could need."""
    local = counts_L.numel()
    tiles_L = (counts_L + rows - 1) // rows
    tile_end_L, end_L = tiles_L.cumsum(0), counts_L.cumsum(0)
    tile_P = torch.arange(pairs // rows + local, device=counts_L.device)
    expert_P = torch.searchsorted(tile_end_L, tile_P, right=True)
    safe_P = expert_P.clamp(max=local - 1)
    start_P = (end_L - counts_L)[safe_P] + (tile_P - (tile_end_L - tiles_L)[safe_P]) * rows
    return TileTable(torch.where(expert_P < local, expert_P, -1), start_P, end_L)


@triton.jit
def _up(x, row, weight, score, h, a, experts, starts, ends, hidden, inner,
        BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    across = tl.cdiv(inner, BN)
    expert = tl.load(experts + tl.program_id(0) // across)
    if expert >= 0:
        first = tl.load(starts + tl.program_id(0) // across)
        line = tl.arange(0, BM)
        here = line < tl.load(ends + expert) - first
        source = tl.load(row + first + line, mask=here, other=0)
        column = (tl.program_id(0) % across) * BN + tl.arange(0, BN)
        weight += expert * (2 * inner) * hidden
        gate = tl.zeros((BM, BN), dtype=tl.float32)
        up = tl.zeros((BM, BN), dtype=tl.float32)
        for start in range(0, hidden, BK):
            k = start + tl.arange(0, BK)
            left = tl.load(
                x + source[:, None] * hidden + k[None, :], mask=here[:, None] & (k < hidden)[None, :], other=0.0
            )
            at = column[None, :].to(tl.int64) * hidden + k[:, None]
            inside = (column < inner)[None, :] & (k < hidden)[:, None]
            gate = tl.dot(left, tl.load(weight + at, mask=inside, other=0.0), gate, input_precision="ieee")
            right = tl.load(weight + inner * hidden + at, mask=inside, other=0.0)
            up = tl.dot(left, right, up, input_precision="ieee")
        # As they are kept, so that the backward finds the same.
        gate, up = gate.to(h.dtype.element_ty), up.to(h.dtype.element_ty)
        inside = here[:, None] & (column < inner)[None, :]
        at = line[:, None] * (2 * inner) + column[None, :]
        h += first * 2 * inner
        tl.store(h + at, gate, mask=inside)
        tl.store(h + at + inner, up, mask=inside)
        value, _, _ = silu_parts(gate.to(tl.float32), up.to(tl.float32))
        s = tl.load(score + first + line, mask=here, other=0.0)[:, None]
        a += first * inner
        tl.store(a + line[:, None] * inner + column[None, :], (value * s).to(a.dtype.element_ty), mask=inside)


def up_projection(
    x_RH: Tensor, row_N: Tensor, weight_L2IH: Tensor, score_N: Tensor, counts_L: Tensor
) -> tuple[Tensor, Tensor]:
    """(h [N,2I], ``score * silu(gate) * up`` [N,I]) of gathered rows."""
    pairs, (local, two_inner, hidden) = row_N.numel(), weight_L2IH.shape
    inner = two_inner // 2
    h_N2I, a_NI = x_RH.new_empty(pairs, two_inner), x_RH.new_empty(pairs, inner)
    tiles = tiles_for(pairs // local, inner, hidden, x_RH.element_size())
    table = tile_table(counts_L, pairs, tiles.rows)
    grid = (table.expert_P.numel() * triton.cdiv(inner, tiles.columns),)
    _up[grid](
        x_RH, row_N, weight_L2IH, score_N, h_N2I, a_NI, table.expert_P, table.start_P, table.end_L, hidden, inner,
        **tiles.launch,
    )  # fmt: skip
    return h_N2I, a_NI


@triton.jit
def _down_backward(dout, row, weight, score, h, dh, a, partial, experts, starts, ends, hidden, inner,
                   BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    across = tl.cdiv(inner, BN)
    part = tl.program_id(0) % across
    expert = tl.load(experts + tl.program_id(0) // across)
    if expert >= 0:
        first = tl.load(starts + tl.program_id(0) // across)
        line = tl.arange(0, BM)
        here = line < tl.load(ends + expert) - first
        source = tl.load(row + first + line, mask=here, other=0)
        column = part * BN + tl.arange(0, BN)
        weight += expert * hidden * inner
        d = tl.zeros((BM, BN), dtype=tl.float32)
        for start in range(0, hidden, BK):
            k = start + tl.arange(0, BK)
            left = tl.load(
                dout + source[:, None] * hidden + k[None, :], mask=here[:, None] & (k < hidden)[None, :], other=0.0
            )
            inside = (column < inner)[None, :] & (k < hidden)[:, None]
            right = tl.load(weight + k[:, None].to(tl.int64) * inner + column[None, :], mask=inside, other=0.0)
            d = tl.dot(left, right, d, input_precision="ieee")
        inside = here[:, None] & (column < inner)[None, :]
        at = line[:, None] * (2 * inner) + column[None, :]
        h += first * 2 * inner
        dh += first * 2 * inner
        a += first * inner
        gate = tl.load(h + at, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(h + at + inner, mask=inside, other=0.0).to(tl.float32)
        value, acted, slope = silu_parts(gate, up)
        tl.store(partial + (first + line) * across + part, tl.sum(d * value, 1), mask=here)
        s = tl.load(score + first + line, mask=here, other=0.0)[:, None]
        d = d * s
        tl.store(dh + at, (d * up * slope).to(dh.dtype.element_ty), mask=inside)
        tl.store(dh + at + inner, (d * acted).to(dh.dtype.element_ty), mask=inside)
        tl.store(a + line[:, None] * inner + column[None, :], (value * s).to(a.dtype.element_ty), mask=inside)


def down_backward(
    dout_RH: Tensor,
    row_N: Tensor,
    weight_LHI: Tensor,
    score_N: Tensor,
    h_N2I: Tensor,
    dh_N2I: Tensor,
    counts_L: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradient of h into ``dh``, which may be h. Returns (scaled activation [N,I], gradient of the score [N])."""
    pairs, (local, hidden, inner) = row_N.numel(), weight_LHI.shape
    # Half as wide as elsewhere: the epilogue holds five tiles, and registers would spill.
    tiles = tiles_for(pairs // local, min(inner, 64), hidden, dout_RH.element_size())
    table = tile_table(counts_L, pairs, tiles.rows)
    across = triton.cdiv(inner, tiles.columns)
    a_NI = dout_RH.new_empty(pairs, inner)
    partial_NP = score_N.new_empty(pairs, across)
    _down_backward[(table.expert_P.numel() * across,)](
        dout_RH, row_N, weight_LHI, score_N, h_N2I, dh_N2I, a_NI, partial_NP, table.expert_P, table.start_P,
        table.end_L, hidden, inner, **tiles.launch,
    )  # fmt: skip
    return a_NI, partial_NP.sum(1)


@triton.jit
def _product(x, weight, y, experts, starts, ends, inputs, outputs, to_expert, to_input, to_output,
             BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    across = tl.cdiv(outputs, BN)
    expert = tl.load(experts + tl.program_id(0) // across)
    if expert >= 0:
        first = tl.load(starts + tl.program_id(0) // across)
        line = tl.arange(0, BM)
        here = line < tl.load(ends + expert) - first
        column = (tl.program_id(0) % across) * BN + tl.arange(0, BN)
        weight += expert * to_expert
        x += first * inputs
        y += first * outputs
        total = tl.zeros((BM, BN), dtype=tl.float32)
        for start in range(0, inputs, BK):
            k = start + tl.arange(0, BK)
            left = tl.load(
                x + line[:, None] * inputs + k[None, :], mask=here[:, None] & (k < inputs)[None, :], other=0.0
            )
            at = k[:, None].to(tl.int64) * to_input + column[None, :].to(tl.int64) * to_output
            right = tl.load(weight + at, mask=(k < inputs)[:, None] & (column < outputs)[None, :], other=0.0)
            total = tl.dot(left, right, total, input_precision="ieee")
        tl.store(
            y + line[:, None] * outputs + column[None, :],
            total.to(y.dtype.element_ty),
            mask=here[:, None] & (column < outputs)[None, :],
        )


def product(x_NM: Tensor, weight_LMO: Tensor, counts_L: Tensor) -> Tensor:
    """``y[n] = x[n] @ weight[expert(n)]`` for sorted rows, [N,O]; the weight may have any strides."""
    pairs, (local, inputs, outputs) = x_NM.shape[0], weight_LMO.shape
    y_NO = x_NM.new_empty(pairs, outputs)
    tiles = tiles_for(pairs // local, outputs, inputs, x_NM.element_size())
    table = tile_table(counts_L, pairs, tiles.rows)
    grid = (table.expert_P.numel() * triton.cdiv(outputs, tiles.columns),)
    _product[grid](
        x_NM, weight_LMO, y_NO, table.expert_P, table.start_P, table.end_L, inputs, outputs, *weight_LMO.stride(),
        **tiles.launch,
    )  # fmt: skip
    return y_NO


@triton.jit
def _weight_gradient(left, right, row, out, ends, outputs, inputs, GATHER_LEFT: tl.constexpr,
                     GATHER_RIGHT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    across = tl.cdiv(inputs, BN)
    per_expert = tl.cdiv(outputs, BM) * across
    expert = tl.program_id(0) // per_expert
    tile = tl.program_id(0) % per_expert
    o = (tile // across) * BM + tl.arange(0, BM)
    m = (tile % across) * BN + tl.arange(0, BN)
    end = tl.load(ends + expert)
    first = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    total = tl.zeros((BM, BN), dtype=tl.float32)
    for start in range(first, end, BK):
        pair = start + tl.arange(0, BK).to(tl.int64)
        here = pair < end
        source = tl.load(row + pair, mask=here, other=0)
        at_left = source if GATHER_LEFT else pair
        at_right = source if GATHER_RIGHT else pair
        a = tl.load(
            left + at_left[None, :] * outputs + o[:, None], mask=here[None, :] & (o < outputs)[:, None], other=0.0
        )
        b = tl.load(
            right + at_right[:, None] * inputs + m[None, :], mask=here[:, None] & (m < inputs)[None, :], other=0.0
        )
        total = tl.dot(a, b, total, input_precision="ieee")
    at = (expert.to(tl.int64) * outputs + o[:, None]) * inputs + m[None, :]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=(o < outputs)[:, None] & (m < inputs)[None, :])


def weight_gradient(left: Tensor, right: Tensor, row_N: Tensor, counts_L: Tensor, gather: str) -> Tensor:
    """Per expert ``left.T @ right`` over its pairs, [L,O,M]; zero for no pairs.

    Args:
        left, right: [N,O] and [N,M], but the one that ``gather`` names (``left`` or ``right``) has R rows instead,
            which are gathered as they are loaded.
    """
    local, outputs, inputs = counts_L.numel(), left.shape[1], right.shape[1]
    out_LOM = left.new_empty(local, outputs, inputs)
    tiles = tiles_for(outputs, inputs, row_N.numel() // local, left.element_size())
    grid = (local * triton.cdiv(outputs, tiles.rows) * triton.cdiv(inputs, tiles.columns),)
    _weight_gradient[grid](
        left, right, row_N, out_LOM, counts_L.cumsum(0), outputs, inputs, gather == "left", gather == "right",
        **tiles.launch,
    )  # fmt: skip
    return out_LOM
