"""A stable sort of (row, choice) pairs by a small key in three Triton kernels: count, sum up, place.

torch's sort passes over 64-bit keys and positions several times, and scattering its inverse sorts once more under
deterministic algorithms. Here a pair's place is what comes before it: pairs of smaller keys, pairs of its own in
earlier blocks, and those before it in its block. Whole numbers only, so nothing depends on the order of additions.

:func:`sort_choices` does in the same three what a rank needs to know of its tokens before it may send any.
:func:`join` makes one order of two.

Shapes: T tokens, K choices per token, S pairs, L keys (local experts), W ranks, B blocks of pairs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe.kernels.launching import Quick, ceil_div, power_of_two

_PAIRS = 128  # of a block
_KEYS = 64  # compared at a time
_BLOCKS = 1024  # summed up at a time


@triton.jit
def _tally(key, counts, keys, step: tl.constexpr):
    """How often each key occurs in a block."""
    for start in range(0, keys, step):
        each = start + tl.arange(0, step)
        found = tl.sum((key[:, None] == each[None, :]).to(tl.int32), 0)
        tl.store(counts + each, found, mask=each < keys)


@triton.jit
def _places(key, before, totals, keys, block: tl.constexpr, step: tl.constexpr):
    """Where a block's pairs go, and how many pairs there are; key -1 goes nowhere."""
    place = tl.zeros((block,), dtype=tl.int32)
    every = tl.zeros((), dtype=tl.int32)
    for start in range(0, keys, step):
        each = start + tl.arange(0, step)
        total = tl.load(totals + each, mask=each < keys, other=0).to(tl.int32)
        place += tl.sum(tl.where(each[None, :] < key[:, None], total[None, :], 0), 1)
        every += tl.sum(total, 0)
    place += tl.load(before + key, mask=key >= 0, other=0)
    earlier = tl.arange(0, block)[None, :] < tl.arange(0, block)[:, None]
    place += tl.sum((earlier & (key[None, :] == key[:, None])).to(tl.int32), 1)
    return tl.where(key >= 0, place, every)


@triton.jit
def _ends(totals, ends, keys, step: tl.constexpr):
    """Where each key's pairs end."""
    every = tl.zeros((), dtype=tl.int32)
    for start in range(0, keys, step):
        each = start + tl.arange(0, step)
        total = tl.load(totals + each, mask=each < keys, other=0).to(tl.int32)
        tl.store(ends + each, every + tl.cumsum(total, 0), mask=each < keys)
        every += tl.sum(total, 0)


@triton.jit
def _keys_of(index, at, here, first, keys):
    key = tl.load(index + at, mask=here, other=0).to(tl.int32) - first
    return tl.where(here & (key >= 0) & (key < keys), key, -1)


@Quick
@triton.jit(do_not_specialize=["pairs", "first", "keys"])
def _count(index, wide, counts, pairs, first, keys, top_k: tl.constexpr, block: tl.constexpr, step: tl.constexpr):
    at = tl.program_id(0) * block + tl.arange(0, block)
    key = _keys_of(index, at // top_k * wide + at % top_k, at < pairs, first, keys)
    _tally(key, counts + tl.program_id(0) * keys, keys, step)


@Quick
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


@Quick
@triton.jit(do_not_specialize=["pairs", "first", "keys"])
def _place(
    index, wide, before, totals, slot, pair, ends, pairs, first, keys,
    top_k: tl.constexpr, block: tl.constexpr, step: tl.constexpr
):  # fmt: skip
    if tl.program_id(0) == 0:
        _ends(totals, ends, keys, step)
    at = tl.program_id(0) * block + tl.arange(0, block)
    key = _keys_of(index, at // top_k * wide + at % top_k, at < pairs, first, keys)
    place = _places(key, before + tl.program_id(0) * keys, totals, keys, block, step).to(tl.int64)
    tl.store(slot + at, place, mask=at < pairs)
    tl.store(pair + place, at.to(tl.int64), mask=key >= 0)


def sort_pairs(index_RK: Tensor, first: int, keys: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sort by ``index - first``; what is outside [0, keys) has no place.

    Args:
        index_RK: whole numbers; may be columns of something wider.

    Returns (pair [S]: which pair stands at each place, undefined behind the last; slot [S]: each pair's place, the
    number of places if it has none; pairs of each key [L]), all int64, and where each key's pairs end, [L] int32.
    """
    if index_RK.stride(1) != 1:
        index_RK = index_RK.contiguous()
    pairs, top_k, device = index_RK.numel(), max(1, index_RK.shape[1]), index_RK.device
    blocks = max(1, ceil_div(pairs, _PAIRS))
    counts_BL, ends_L = torch.empty((blocks + 1) * keys, dtype=torch.int32, device=device).split([blocks * keys, keys])
    totals_L, slot_S, pair_S = _whole_numbers(device, keys, pairs, pairs)
    source, sizes = (index_RK, index_RK.stride(0)), (pairs, first, keys, top_k, _PAIRS, _KEYS)
    _count[(blocks,)](*source, counts_BL, *sizes)
    _sum_up[(keys,)](counts_BL, totals_L, blocks, keys, _step(blocks))
    _place[(blocks,)](*source, counts_BL, totals_L, slot_S, pair_S, ends_L, *sizes)
    return pair_S, slot_S, totals_L, ends_L


@Quick
@triton.jit(do_not_specialize=["pairs", "offset", "keys"])
def _join(
    slot, ends, others, slot_out, pair_out, counts_out, ends_out, pairs, offset, keys,
    behind: tl.constexpr, block: tl.constexpr, step: tl.constexpr
):  # fmt: skip
    """``behind``: the others' pairs of the same key come first."""
    at = tl.program_id(0) * block + tl.arange(0, block)
    place = tl.load(slot + at, mask=at < pairs, other=0).to(tl.int32)
    moved = place
    for start in range(0, keys, step):
        each = start + tl.arange(0, step)
        end = tl.load(ends + each, mask=each < keys, other=0)
        begin = tl.load(ends + each - 1, mask=(each < keys) & (each > 0), other=0)
        others_end = tl.load(others + each, mask=each < keys, other=0)
        many = others_end - tl.load(others + each - 1, mask=(each < keys) & (each > 0), other=0)
        if behind:
            before = begin[None, :] <= place[:, None]
        else:
            before = end[None, :] <= place[:, None]
            tl.store(counts_out + each, (end - begin + many).to(tl.int64), mask=(each < keys) & (tl.program_id(0) == 0))
            tl.store(ends_out + each, end + others_end, mask=(each < keys) & (tl.program_id(0) == 0))
        moved += tl.sum(tl.where(before, many[None, :], 0), 1)
    tl.store(slot_out + at, moved.to(tl.int64), mask=at < pairs)
    tl.store(pair_out + moved, (at + offset).to(tl.int64), mask=(at < pairs) & (place < tl.load(ends + keys - 1)))


def join(
    first: tuple[Tensor, Tensor, Tensor], second: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`moe.assignment.join`; of each part the pairs [N], slots [R,K] and ends [L], as :func:`sort_pairs`
    makes them, and so are the results."""
    (pair_N, slot_RK, ends_L), (pair_M, slot_QK, ends_of_second_L) = first, second
    keys, device = ends_L.numel(), slot_RK.device
    places, pairs = pair_N.numel() + pair_M.numel(), slot_RK.numel() + slot_QK.numel()
    counts_out_L, slot_S, pair_S = _whole_numbers(device, keys, pairs, places)
    ends_out_L = torch.empty_like(ends_L)
    outs = (pair_S, counts_out_L, ends_out_L)
    offset = slot_RK.numel()
    for slot, slot_out, ends, others, behind in (
        (slot_RK, slot_S, ends_L, ends_of_second_L, False),
        (slot_QK, slot_S[offset:], ends_of_second_L, ends_L, True),
    ):
        grid, sizes = (max(1, ceil_div(slot.numel(), _PAIRS)),), (slot.numel(), behind * offset, keys)
        _join[grid](slot, ends, others, slot_out, *outs, *sizes, behind, _PAIRS, _KEYS)
    return pair_S, slot_S, counts_out_L, ends_out_L


@triton.jit
def _block_of_choices(index, tokens, top_k, first, keys, rows: tl.constexpr, columns: tl.constexpr):
    """A block's tokens, pairs, keys, and the ranks that have their experts."""
    token = tl.program_id(0) * rows + tl.arange(0, rows)
    choice = tl.arange(0, columns)
    here = (token < tokens)[:, None] & (choice < top_k)[None, :]
    at = token[:, None] * top_k + choice[None, :]
    rank = tl.where(here, tl.load(index + at, mask=here, other=0).to(tl.int32) // keys, -1)
    at = tl.reshape(tl.where(here, at, -1), (rows * columns,))
    return token, at, _keys_of(index, at, at >= 0, first, keys), rank


@Quick
@triton.jit(do_not_specialize=["tokens", "first", "keys", "ranks"])
def _count_choices(
    index, counts, tokens, top_k, first, keys, ranks, rows: tl.constexpr, columns: tl.constexpr, step: tl.constexpr
):
    _token, _, key, rank = _block_of_choices(index, tokens, top_k, first, keys, rows, columns)
    counts += tl.program_id(0) * (keys + 2 * ranks)
    _tally(key, counts, keys, step)
    for other in range(ranks):
        theirs = (rank == other).to(tl.int32)
        goes = tl.where(other * keys == first, 0, tl.max(theirs, 1))
        tl.store(counts + keys + 2 * other, tl.sum(goes, 0))
        tl.store(counts + keys + 2 * other + 1, tl.sum(tl.sum(theirs, 1), 0))


@Quick
@triton.jit(do_not_specialize=["tokens", "first", "keys", "ranks"])
def _place_choices(
    index, before, totals, slot, pair, ends, slot_there, pair_there, ends_there, tokens, top_k, first, keys, ranks,
    rows: tl.constexpr, columns: tl.constexpr, step: tl.constexpr
):  # fmt: skip
    if tl.program_id(0) == 0:
        _ends(totals, ends, keys, step)
    token, at, key, rank = _block_of_choices(index, tokens, top_k, first, keys, rows, columns)
    before += tl.program_id(0) * (keys + 2 * ranks)
    place = _places(key, before, totals, keys, rows * columns, step).to(tl.int64)
    tl.store(slot + at, place, mask=at >= 0)
    tl.store(pair + place, at.to(tl.int64), mask=key >= 0)
    every = tl.zeros((), dtype=tl.int64)
    for other in range(ranks):
        every += tl.load(totals + keys + 2 * other)
    start = tl.zeros((), dtype=tl.int64)
    for other in range(ranks):
        goes = tl.where(other * keys == first, 0, tl.max((rank == other).to(tl.int32), 1))
        to = start + tl.load(before + keys + 2 * other) + tl.cumsum(goes, 0) - goes
        there = token * ranks + other
        tl.store(slot_there + there, tl.where(goes > 0, to, every), mask=token < tokens)
        tl.store(pair_there + to, there.to(tl.int64), mask=goes > 0)
        start += tl.load(totals + keys + 2 * other)
        tl.store(ends_there + other, start.to(tl.int32), mask=tl.program_id(0) == 0)


def sort_choices(
    index_TK: Tensor, first: int, keys: int, ranks: int
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], Tensor]:
    """Own (token, choice) pairs by expert, and (token, rank) pairs by rank, of tokens that have experts elsewhere.

    Args:
        index_TK: global expert numbers; rank r has [r*L, (r+1)*L), and this one those from ``first`` on.

    Returns what :func:`sort_pairs` does of both, slots as [T,K] and [T,W]; and of each rank the tokens that go there
    and the pairs of a token and an expert there, [W,2].
    """
    (tokens, top_k), device, index_TK = index_TK.shape, index_TK.device, index_TK.contiguous()
    columns = power_of_two(top_k)
    rows = max(1, _PAIRS // columns)
    blocks, width = max(1, ceil_div(tokens, rows)), keys + 2 * ranks
    counts_BX, ends_L, ends_W = torch.empty(blocks * width + keys + ranks, dtype=torch.int32, device=device).split(
        [blocks * width, keys, ranks]
    )
    totals_X, slot_S, pair_S, slot_TW, pair_TW = _whole_numbers(
        device, width, tokens * top_k, tokens * top_k, tokens * ranks, tokens * ranks
    )
    sizes = (tokens, top_k, first, keys, ranks, rows, columns, _KEYS)
    _count_choices[(blocks,)](index_TK, counts_BX, *sizes)
    _sum_up[(width,)](counts_BX, totals_X, blocks, width, _step(blocks))
    _place_choices[(blocks,)](index_TK, counts_BX, totals_X, slot_S, pair_S, ends_L, slot_TW, pair_TW, ends_W, *sizes)
    counts_W2 = totals_X[keys:].view(ranks, 2)
    own = pair_S, slot_S.view(tokens, top_k), totals_X[:keys], ends_L
    return own, (pair_TW, slot_TW.view(tokens, ranks), counts_W2[:, 0], ends_W), counts_W2


def _whole_numbers(device: torch.device, *sizes: int) -> tuple[Tensor, ...]:
    """Tensors of these sizes, out of one allocation."""
    return torch.empty(sum(sizes), dtype=torch.int64, device=device).split(sizes)


def _step(blocks: int) -> int:
    return min(_BLOCKS, max(16, power_of_two(blocks)))
