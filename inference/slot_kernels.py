"""Experts of few rows in Triton, their weights read from the slot tensors by slot number.

A (row, choice) pair is one matrix-vector product after another: gate and up with the activation, then down with the
score. Each pair is computed by itself, in the same tiles whatever else is in the call, and its result is kept apart
until all are added in ascending order of expert. So neither residency nor the company in a batch can reach the bits.
Reading a weight twice for two rows is what that costs; the L2 cache absorbs it while rows are few.

Which slot holds which expert stands in a table on the device. Pairs whose expert has no slot there are skipped, so that
one call can be computed in two launches: what is resident, then what has arrived.

Shapes: T rows, K choices of each, P = T*K pairs, E experts, C slots, H hidden, I intermediate.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe.kernels.elementwise import silu_parts

# Tile sizes depend on the sizes of the experts alone: with them the order of additions would change.
_UP_ROWS, _DOWN_ROWS, _DEPTH = 8, 16, 256
_COMBINED = 256


@triton.jit
def _up(x, expert_P, slot_E, weight, a, slot_stride, hidden: tl.constexpr, inner: tl.constexpr,
        choices: tl.constexpr, BI: tl.constexpr, BH: tl.constexpr):  # fmt: skip
    pair = tl.program_id(0)
    slot = tl.load(slot_E + tl.load(expert_P + pair)).to(tl.int64)
    if slot >= 0:
        line = tl.program_id(1) * BI + tl.arange(0, BI)
        weight += slot * slot_stride
        x += (pair // choices).to(tl.int64) * hidden
        gate = tl.zeros((BI, BH), dtype=tl.float32)
        up = tl.zeros((BI, BH), dtype=tl.float32)
        for start in range(0, hidden, BH):
            h = start + tl.arange(0, BH)
            value = tl.load(x + h, mask=h < hidden, other=0.0).to(tl.float32)[None, :]
            at = line[:, None] * hidden + h[None, :]
            here = (line < inner)[:, None] & (h < hidden)[None, :]
            gate += tl.load(weight + at, mask=here, other=0.0).to(tl.float32) * value
            up += tl.load(weight + inner * hidden + at, mask=here, other=0.0).to(tl.float32) * value
        acted, _, _ = silu_parts(tl.sum(gate, 1), tl.sum(up, 1))
        tl.store(a + pair.to(tl.int64) * inner + line, acted, mask=line < inner)


@triton.jit
def _down(a, expert_P, slot_E, score_P, weight, y, slot_stride,
          hidden: tl.constexpr, inner: tl.constexpr, BH: tl.constexpr, BI: tl.constexpr):  # fmt: skip
    pair = tl.program_id(0)
    slot = tl.load(slot_E + tl.load(expert_P + pair)).to(tl.int64)
    if slot >= 0:
        line = tl.program_id(1) * BH + tl.arange(0, BH)
        weight += slot * slot_stride
        a += pair.to(tl.int64) * inner
        total = tl.zeros((BH, BI), dtype=tl.float32)
        for start in range(0, inner, BI):
            i = start + tl.arange(0, BI)
            value = tl.load(a + i, mask=i < inner, other=0.0)[None, :]
            at = line[:, None] * inner + i[None, :]
            here = (line < hidden)[:, None] & (i < inner)[None, :]
            total += tl.load(weight + at, mask=here, other=0.0).to(tl.float32) * value
        score = tl.load(score_P + pair).to(tl.float32)
        tl.store(y + pair.to(tl.int64) * hidden + line, tl.sum(total, 1) * score, mask=line < hidden)


@triton.jit
def _combine(y, other, expert_P, elsewhere_E, out, hidden: tl.constexpr, SPLIT: tl.constexpr,
             choices: tl.constexpr, CHOICES: tl.constexpr, BH: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BH + tl.arange(0, BH)
    here = column < hidden
    k = tl.arange(0, CHOICES)
    expert = tl.load(expert_P + row * choices + k, mask=k < choices, other=2147483647).to(tl.int32)
    # How many of the row's experts come before each is its turn; the choices of one row are distinct.
    turn = tl.sum((expert[None, :] < expert[:, None]).to(tl.int32), 1)
    total = tl.zeros((BH,), dtype=tl.float32)
    for now in range(choices):
        at = (row * choices + tl.sum(tl.where(turn == now, k, 0), 0)) * hidden + column
        if SPLIT:
            away = tl.load(elsewhere_E + tl.sum(tl.where(turn == now, expert, 0), 0)) != 0
            total += tl.load(y + at, mask=here & (not away), other=0.0)
            total += tl.load(other + at, mask=here & away, other=0.0)
        else:
            total += tl.load(y + at, mask=here, other=0.0)
    tl.store(out + row * hidden + column, total.to(out.dtype.element_ty), mask=here)


@triton.jit
def _publish(x, expert_P, score_P, x_out, expert_out, score_out, numbers, pairs, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x_out + at, tl.load(x + at, mask=at < numbers, other=0.0).to(tl.float32), mask=at < numbers)
    tl.store(expert_out + at, tl.load(expert_P + at, mask=at < pairs, other=0).to(tl.int32), mask=at < pairs)
    tl.store(score_out + at, tl.load(score_P + at, mask=at < pairs, other=0.0).to(tl.float32), mask=at < pairs)


def publish(
    x_TH: Tensor, expert_TK: Tensor, score_TK: Tensor, x_out_TH: Tensor, expert_out_TK: Tensor, score_out_TK: Tensor
) -> None:
    """What the host must know of a call, in one launch: fp32 and int32 copies, into pinned host memory."""
    assert x_out_TH.dtype == score_out_TK.dtype == torch.float32
    assert expert_out_TK.dtype == torch.int32
    assert all(t.is_contiguous() for t in (x_TH, expert_TK, score_TK))
    numbers, pairs = x_TH.numel(), expert_TK.numel()
    _publish[(triton.cdiv(max(numbers, pairs), 1024),)](
        x_TH, expert_TK, score_TK, x_out_TH, expert_out_TK, score_out_TK, numbers, pairs, BLOCK=1024
    )


@triton.jit
def _await_host(done, awaited):
    number = tl.load(awaited)
    found = tl.load(done, volatile=True)
    while found < number:
        found = tl.load(done, volatile=True)
    tl.store(awaited, number + 1)


def await_host(done_1: Tensor, awaited_1: Tensor) -> None:
    """What the device does next waits until the host has counted in ``done_1``, pinned memory, up to ``awaited_1``.

    That goes up by one on the device each time, so a captured launch waits for the next count. Whoever gives up
    counting must set ``done_1`` high enough, or the device waits forever.
    """
    _await_host[(1,)](done_1, awaited_1, num_warps=1)


@triton.jit
def _adopt(source, target, numbers, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(target + at, tl.load(source + at, mask=at < numbers, other=0), mask=at < numbers)


def adopt(host_table: Tensor, table: Tensor) -> None:
    """Read a small table from pinned host memory by a kernel: a copy would queue behind all that the link brings."""
    assert host_table.is_contiguous()
    assert table.is_contiguous()
    _adopt[(1,)](host_table, table, table.numel(), BLOCK=triton.next_power_of_2(table.numel()))


def compute(
    x_TH: Tensor,
    expert_TK: Tensor,
    score_TK: Tensor,
    slot_E: Tensor,
    gate_up_C2IH: Tensor,
    down_CHI: Tensor,
    a_PI: Tensor,
    y_PH: Tensor,
) -> None:
    """``score * down(silu(gate) * up)`` of every pair whose expert has a slot, into its row of ``y_PH``, in fp32.

    Args:
        slot_E: int32, on the device: the slot of each expert of this layer, -1 if it has none.
        gate_up_C2IH: each slot's two matrices contiguous, slots at any stride; gate rows first. ``down_CHI`` likewise.
        a_PI: fp32 scratch; rows of pairs that are skipped stay as they are, as in ``y_PH``.

    Reads nothing back, allocates nothing: fit for capture in a CUDA graph.
    """
    (rows, choices), hidden, inner = expert_TK.shape, x_TH.shape[1], down_CHI.shape[2]
    assert all(t.is_contiguous() for t in (x_TH, expert_TK, score_TK, a_PI, y_PH))
    assert all(t.dtype == torch.float32 for t in (a_PI, y_PH))
    assert (gate_up_C2IH.stride()[1:], down_CHI.stride()[1:]) == ((hidden, 1), (inner, 1))
    pairs = rows * choices
    _up[(pairs, triton.cdiv(inner, _UP_ROWS))](
        x_TH, expert_TK, slot_E, gate_up_C2IH, a_PI, gate_up_C2IH.stride(0), hidden, inner, choices,
        BI=_UP_ROWS, BH=_DEPTH, num_warps=4,
    )  # fmt: skip
    _down[(pairs, triton.cdiv(hidden, _DOWN_ROWS))](
        a_PI, expert_TK, slot_E, score_TK, down_CHI, y_PH, down_CHI.stride(0), hidden, inner,
        BH=_DOWN_ROWS, BI=_DEPTH, num_warps=4,
    )  # fmt: skip


def combine(
    y_PH: Tensor, expert_TK: Tensor, out_TH: Tensor, elsewhere_E: Tensor | None = None, other_PH: Tensor | None = None
) -> None:
    """Each row's pairs added up in fp32 in ascending order of expert, then rounded to the dtype of ``out_TH``.

    Args:
        elsewhere_E: int32, nonzero where an expert's pairs stand in ``other_PH`` (computed by the CPU: pinned host
            memory will do) instead of ``y_PH``. None: nowhere.
    """
    (rows, choices), hidden = expert_TK.shape, y_PH.shape[1]
    assert (elsewhere_E is None) == (other_PH is None)
    _combine[(rows, triton.cdiv(hidden, _COMBINED))](
        y_PH, y_PH if other_PH is None else other_PH, expert_TK, expert_TK if elsewhere_E is None else elsewhere_E,
        out_TH, hidden, other_PH is not None, choices, triton.next_power_of_2(choices), _COMBINED,
    )  # fmt: skip
