"""A stable sort of (row, choice) pairs by a small key in three Triton kernels: count, sum up, place.

torch's sort passes over 64-bit keys and positions several times, and scattering its inverse sorts once more under
deterministic algorithms. Here a pair's place is what comes before it: pairs of smaller keys, pairs of its own in
earlier blocks, and those before it in its block. Whole numbers only, so nothing depends on the order of additions.

Shapes: S pairs, L keys, B blocks of pairs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_PAIRS = 128  # of a block
_KEYS = 64  # compared at a time
_BLOCKS = 1024  # summed up at a time


@triton.jit(do_not_specialize=["pairs", "first", "keys"])
def _count(index, counts, pairs, first, keys, block: tl.constexpr, step: tl.constexpr):
    at = tl.program_id(0) * block + tl.arange(0, block)
    key = tl.load(index + at, mask=at < pairs, other=-1).to(tl.int32) - first
    key = tl.where(at < pairs, key, -1)
    for start in range(0, keys, step):
        each = start + tl.arange(0, step)
        found = tl.sum((key[:, None] == each[None, :]).to(tl.int32), 0)
        tl.store(counts + tl.program_id(0) * keys + each, found, mask=each < keys)


@triton.jit(do_not_specialize=["blocks", "keys"])
def _sum_up(counts, totals, blocks, keys, step: tl.constexpr):
    """Counts become those of all blocks before; one program for each key."""
    key = tl.program_id(0)
    total = tl.zeros((), dtype=tl.int32)
    for start in range(0, blocks, step):
        at = (start + tl.arange(0, step)) * keys + key
        here = start + tl.arange(0, step) < blocks
        found = tl.load(counts + at, mask=here, other=0)
        tl.store(counts + at, total + tl.cumsum(found, 0) - found, mask=here)
        total += tl.sum(found, 0)
    tl.store(totals + key, total.to(tl.int64))


@triton.jit(do_not_specialize=["pairs", "first", "keys"])
def _place(index, before, totals, slot, pair, pairs, first, keys, block: tl.constexpr, step: tl.constexpr):
    at = tl.program_id(0) * block + tl.arange(0, block)
    key = tl.load(index + at, mask=at < pairs, other=-1).to(tl.int32) - first
    known = (at < pairs) & (key >= 0) & (key < keys)
    key = tl.where(known, key, -1)
    place = tl.zeros((block,), dtype=tl.int32)
    every = tl.zeros((), dtype=tl.int32)
    for start in range(0, keys, step):
        each = start + tl.arange(0, step)
        total = tl.load(totals + each, mask=each < keys, other=0).to(tl.int32)
        place += tl.sum(tl.where(each[None, :] < key[:, None], total[None, :], 0), 1)
        every += tl.sum(total, 0)
    place += tl.load(before + tl.program_id(0) * keys + key, mask=known, other=0)
    earlier = tl.arange(0, block)[None, :] < tl.arange(0, block)[:, None]
    place += tl.sum((earlier & (key[None, :] == key[:, None])).to(tl.int32), 1)
    tl.store(slot + at, tl.where(known, place, every).to(tl.int64), mask=at < pairs)
    tl.store(pair + place, at.to(tl.int64), mask=known)


def sort_pairs(index: Tensor, first: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sort by ``index - first``; what is outside [0, keys) has no place.

    Args:
        index: of any shape with S elements, contiguous.

    Returns (pair [S]: which pair stands at each place, undefined behind the last; slot [S]: each pair's place, the
    number of places if it has none; pairs of each key [L]), all int64.
    """
    pairs = index.numel()
    blocks = max(1, triton.cdiv(pairs, _PAIRS))
    counts_BL = torch.empty(blocks, keys, dtype=torch.int32, device=index.device)
    totals_L, slot_S, pair_S = (
        torch.empty(size, dtype=torch.int64, device=index.device) for size in (keys, pairs, pairs)
    )
    _count[(blocks,)](index, counts_BL, pairs, first, keys, _PAIRS, _KEYS)
    _sum_up[(keys,)](counts_BL, totals_L, blocks, keys, min(_BLOCKS, max(16, triton.next_power_of_2(blocks))))
    _place[(blocks,)](index, counts_BL, totals_L, slot_S, pair_S, pairs, first, keys, _PAIRS, _KEYS)
    return pair_S, slot_S, totals_L
