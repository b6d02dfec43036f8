"""Rows sorted by expert, cut into tiles for the programs of Triton kernels: which they are is found on the device.

A tile has rows of one expert only. How many tiles there are depends on the counts, which nothing reads back; so there
are as many as any counts could need, and those beyond the last row say so. Tile sizes depend on shapes alone, never on
a timing or a device: with them the order of additions would change.

Shapes: N sorted pairs, K choices per row, L local experts, P tiles.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe.assignment import Assignment

_CELLS = 8192  # (tile, expert) comparisons of one program
_PROGRAMS = 256  # fewer do not fill a large GPU, and a sum is split
_STEPS = 4  # of a split sum, at least


def blocks(size: int, block: int) -> int:
    """How many cover ``size``. Triton's own function for it costs as much as a launch when the host calls it."""
    return -(-size // block)


def power_of_two(size: int) -> int:
    """The least that is no smaller."""
    return 1 << (size - 1).bit_length()


@dataclass(frozen=True)
class SortedRows:
    """Made by :func:`sorted_rows`.

    Attributes:
        table_X: int32: of each tile its expert (-1: none), its first row and its expert's end; then where each expert's
            rows end. One tensor, to be kept for a backward.
        pair_N: the flattened (row, choice) pair of each sorted row; None where rows are sorted as they come.
    """

    table_X: Tensor
    pair_N: Tensor | None
    choices: int
    pairs: int
    experts: int
    rows: int
    tiles: int

    @functools.cached_property
    def ends_L(self) -> Tensor:
        """As torch's grouped product wants it."""
        return self.table_X[3 * self.tiles :]

    def parts(self, steps: int) -> int:
        """Into how many parts, each a program of its own, to split a tile's sum of ``steps`` blocks."""
        parts = 1
        while self.tiles * parts < _PROGRAMS and parts * 2 * _STEPS <= steps:
            parts *= 2
        return parts


@triton.jit
def _table(counts, table, experts, tiles,
           ROWS: tl.constexpr, EXPERTS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    expert = tl.arange(0, EXPERTS)
    count = tl.load(counts + expert, mask=expert < experts, other=0).to(tl.int32)
    end = tl.cumsum(count, 0)
    needed = (count + ROWS - 1) // ROWS
    tile_end = tl.cumsum(needed, 0)
    tile = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    of = tl.sum((tile_end[None, :] <= tile[:, None]).to(tl.int32), 1)
    own = expert[None, :] == of[:, None]
    stop = tl.sum(tl.where(own, end[None, :], 0), 1)
    begin = tl.sum(tl.where(own, (end - count)[None, :], 0), 1)
    before = tl.sum(tl.where(own, (tile_end - needed)[None, :], 0), 1)
    inside = tile < tiles
    tl.store(table + tile, tl.where(of < experts, of, -1), mask=inside)
    tl.store(table + tiles + tile, begin + (tile - before) * ROWS, mask=inside)
    tl.store(table + 2 * tiles + tile, stop, mask=inside)
    if tl.program_id(0) == 0:
        tl.store(table + 3 * tiles + expert, end, mask=expert < experts)


def sorted_rows(assignment: Assignment) -> SortedRows:
    """The tiles of an assignment's pairs."""
    pair_N, counts_L = assignment.pair_N, assignment.counts_L
    return _cut(counts_L, pair_N.numel(), pair_N, assignment.slot_RK.shape[1])


def rows_in_order(counts_L: Tensor, pairs: int) -> SortedRows:
    """The tiles of ``pairs`` rows that are sorted as they come."""
    return _cut(counts_L, pairs, None, 1)


def _cut(counts_L: Tensor, pairs: int, pair_N: Tensor | None, choices: int) -> SortedRows:
    rows, tiles = _size(counts_L.numel(), pairs)
    experts = counts_L.numel()
    table_X = torch.empty(3 * tiles + experts, dtype=torch.int32, device=counts_L.device)
    width = power_of_two(experts)
    block = max(1, min(64, _CELLS // width))
    _table[(blocks(tiles, block),)](counts_L.contiguous(), table_X, experts, tiles, rows, width, block)
    return SortedRows(table_X, pair_N, choices, pairs, experts, rows, tiles)


def _size(experts: int, pairs: int) -> tuple[int, int]:
    mean = pairs // experts
    rows = 64 if mean >= 128 else 32 if mean >= 32 else 16
    return rows, pairs // rows + experts


def sorted_again(table_X: Tensor, assignment: Assignment) -> SortedRows:
    """What :func:`sorted_rows` gave, from the table that was kept of it."""
    experts, pairs = assignment.counts_L.numel(), assignment.pair_N.numel()
    rows, tiles = _size(experts, pairs)
    return SortedRows(table_X, assignment.pair_N, assignment.slot_RK.shape[1], pairs, experts, rows, tiles)
