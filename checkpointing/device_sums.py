"""Digests of chunks of state taken by the GPU where they lie: the keeper's reading of every captured byte shared cores
and memory with the thread that queues kernels (figures: docs/measurements.md).

Two Triton kernels. The first adds up each block of 1,024 bytes, all blocks at once; the second takes a chunk's blocks
in their order, scrambling after each, four chunks in a program, and ends the digest. It is that of the xxhash library,
bit for bit, so whoever verifies a record does not know who took its digests. Blocks of gradients are added up by the
pass that scales them for the optimizer, which must read them anyway.

Scrambling is a chain, of one chunk as long as the chunk, and multiprocessors that hold it are missed by products of
matrices beside it: so chunks are small.

Shapes: C chunks, B blocks of a chunk, 16 stripes of a block, 8 lanes of 64 bits of a stripe.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
import triton
import triton.language as tl

from checkpointing.record_sums import Chunks
from checkpointing.xxh3 import BLOCK, PRIME32_1, PRIME_MX1, SECRET, SUMS, table_of
from moe.kernels.launching import Quick

_MOST = 1024  # chunks whose sums are kept at once, which take a 16th of their bytes; a multiple of 4
_TOGETHER = 32  # blocks that a program adds up
_UNROLLED = (45, 15, 1)  # blocks whose sums are loaded ahead of being scrambled: the most that divides a chunk's
# Rows of the table (checkpointing.xxh3.table_of) after the secret's.
_LAST, _MIX, _START, _BEGUN = (tl.constexpr(8 * row) for row in (3, 4, 6, 7))


@triton.jit
def _add_blocks(chunks, secret, sums, in_chunk, blocks: tl.constexpr):
    """A thread takes all stripes of two lanes: 16 loads of 16 bytes, and nothing to exchange with other threads."""
    chunk = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0) * blocks + tl.arange(0, blocks)[:, None]
    lane = tl.arange(0, 8)[None, :]
    at = tl.multiple_of(tl.load(chunks + chunk).to(tl.pointer_type(tl.uint64)), 16) + block * 128 + lane
    total = tl.zeros((blocks, 8), tl.uint64)
    words = tl.zeros((blocks, 8), tl.uint64)
    for stripe in tl.static_range(16):
        word = tl.load(at + stripe * 8)
        total += _product(word ^ tl.load(secret + stripe + lane))
        words += word
    tl.store(sums + (chunk * in_chunk + block) * 8 + lane, total + _swapped(words, blocks))


@triton.jit
def _product(mixed):
    """Of the two halves of each word."""
    return (mixed & 0xFFFFFFFF).to(tl.uint32).to(tl.uint64) * (mixed >> 32).to(tl.uint32).to(tl.uint64)


@triton.jit
def _swapped(words, blocks: tl.constexpr):
    """A word is added to its neighbour's lane."""
    even, odd = tl.split(tl.reshape(words, (blocks, 4, 2)))
    return tl.reshape(tl.join(odd, even), (blocks, 8))


@triton.jit
def _scaled(word, place: tl.constexpr, factor):
    """One of four bfloat16 numbers of each word, in fp32, times a factor."""
    return (((word >> place) & 0xFFFF).to(tl.uint32) << 16).to(tl.float32, bitcast=True) * factor


@triton.jit
def _scale_blocks(source, secret, factor, out, sums, words, blocks: tl.constexpr):
    """``source``'s bfloat16 numbers times a factor, in fp32, and the sums of its blocks as :func:`_add_blocks` takes
    them. Sums of a block that ends beyond the last of ``words`` mean nothing."""
    block = tl.program_id(0).to(tl.int64) * blocks + tl.arange(0, blocks)[:, None]
    lane = tl.arange(0, 8)[None, :]
    number = tl.arange(0, 32)[None, :]
    scale = tl.load(factor)
    numbers = words * tl.full((), 4, tl.int64)  # there may be more than 32 bits count
    total = tl.zeros((blocks, 8), tl.uint64)
    added = tl.zeros((blocks, 8), tl.uint64)
    for stripe in tl.static_range(16):
        at = block * 128 + stripe * 8 + lane
        word = tl.load(source + at, at < words, 0)
        total += _product(word ^ tl.load(secret + stripe + lane))
        added += word
        even = tl.join(_scaled(word, 0, scale), _scaled(word, 32, scale))
        odd = tl.join(_scaled(word, 16, scale), _scaled(word, 48, scale))
        to = block * 512 + stripe * 32 + number
        tl.store(out + to, tl.reshape(tl.join(even, odd), (blocks, 32)), to < numbers)
    tl.store(sums + block * 8 + lane, total + _swapped(added, blocks), block * 128 < words)


@triton.jit
def _digest(table, chunks, rows, out, in_chunk: tl.constexpr, prime: tl.constexpr, mix: tl.constexpr,
            unrolled: tl.constexpr):  # fmt: skip
    """Of four chunks in a warp. Each waits for its block before, so the next sums must be under way meanwhile.

    ``rows``: where each chunk's sums of blocks begin.
    """
    chunk = tl.program_id(0).to(tl.int64) * 4 + tl.arange(0, 4)[:, None]
    lane = tl.arange(0, 8)[None, :]
    key = tl.load(table + 16 + lane)
    total = tl.load(table + _START + lane) + tl.zeros((4, 8), tl.uint64)
    at = tl.multiple_of(tl.load(rows + chunk).to(tl.pointer_type(tl.uint64)), [16, 16]) + lane
    ahead = ()
    for turn in tl.static_range(unrolled):
        ahead += (tl.load(at + turn * 8),)
    for block in range(unrolled, in_chunk, unrolled):  # the last block is not scrambled
        now, ahead = ahead, ()
        at += unrolled * 8
        for turn in tl.static_range(unrolled):
            ahead += (tl.load(at + turn * 8, block < in_chunk - 1, 0),)
        for turn in tl.static_range(unrolled):
            total += now[turn]
            total = (total ^ (total >> 47) ^ key) * prime
    at = tl.load(chunks + chunk).to(tl.pointer_type(tl.uint64)) + (in_chunk - 1) * 128 + lane
    for stripe in tl.static_range(16):
        word = tl.load(at + stripe * 8)
        total += _product(word ^ tl.load(table + (stripe if stripe < 15 else _LAST) + lane)) + _swapped(word, 4)
    for half in tl.static_range(2):
        even, odd = tl.split(tl.reshape(total ^ tl.load(table + _MIX + half * 8 + lane), (4, 4, 2)))
        word = tl.sum((even * odd) ^ tl.umulhi(even, odd), 1)[:, None] + tl.load(table + _BEGUN + half)
        word = (word ^ (word >> 37)) * mix
        tl.store(out + chunk * 2 + half, word ^ (word >> 32))


class DeviceSums:
    """Takes the digests of whole chunks, on whatever stream is current.

    Args:
        chunk: bytes, a multiple of 16 KiB.
    """

    def __init__(self, device: torch.device, chunk: int) -> None:
        self._device, self._chunk, self._blocks = device, chunk, chunk // BLOCK
        self._table = torch.frombuffer(bytearray(table_of(chunk)), dtype=torch.uint64).to(device)
        self._unrolled = next(n for n in _UNROLLED if (self._blocks - 1) % n == 0)
        self._together = min(_TOGETHER, self._blocks & -self._blocks)
        self._row = self._blocks * SUMS
        self._sums_CB8 = torch.empty(0, dtype=torch.uint64, device=device)
        self._make_room(_MOST)
        self._order: list[tuple[int, int]] = []  # where the digests begin of what is wanted, and how many they are

    def _make_room(self, chunks: int) -> None:
        pin = self._device.type == "cuda"
        # Of each chunk where its bytes lie, and where its blocks' sums do.
        self._host_places = torch.empty(2, chunks, dtype=torch.uint64, pin_memory=pin)
        self._host_found = torch.empty(chunks, 2, dtype=torch.uint64, pin_memory=pin)
        self._places_2C, self._found_C2 = self._host_places.numpy(), self._host_found.numpy()
        self._places = torch.empty(2, chunks, dtype=torch.uint64, device=self._device)
        self._found = torch.empty(chunks, 2, dtype=torch.uint64, device=self._device)
        self._numbers_C = np.arange(chunks, dtype=np.uint64)

    def queue(self, wanted: Sequence[Chunks]) -> None:
        """Begin. All bytes must stay as they are until the device has come to what is queued now, and :meth:`take` is
        called before the next."""
        fresh = sum(chunks.count for chunks in wanted if chunks.sums is None)
        programs = -(-sum(chunks.count for chunks in wanted) // 4)
        if 4 * programs > len(self._found_C2):
            self._make_room(4 * programs)
        if self._sums_CB8.numel() * 8 < min(fresh, _MOST) * self._row:
            self._sums_CB8 = self._table.new_empty(min(fresh, _MOST) * self._row // 8)
        self._note(wanted, fresh)
        if programs:
            self._launch(fresh, programs)

    def _note(self, wanted: Sequence[Chunks], fresh: int) -> None:
        """Where everything lies: first those whose blocks are added up here."""
        at, place, (starts_C, rows_C), numbers_C = 0, fresh, self._places_2C, self._numbers_C
        self._order = []
        for chunks in wanted:
            begin = at if chunks.sums is None else place
            end = begin + chunks.count
            np.multiply(numbers_C[: chunks.count], self._chunk, out=starts_C[begin:end])
            starts_C[begin:end] += chunks.address
            if chunks.sums is None:
                at = end
            else:
                np.multiply(numbers_C[: chunks.count], self._row, out=rows_C[begin:end])
                rows_C[begin:end] += chunks.sums
                place = end
            self._order.append((begin, chunks.count))
        np.multiply(numbers_C[:fresh] % _MOST, self._row, out=rows_C[:fresh])
        rows_C[:fresh] += self._sums_CB8.data_ptr()
        self._places_2C[:, place : place + 3] = self._places_2C[:, :1]  # programs take four

    def _launch(self, fresh: int, programs: int) -> None:
        self._places.copy_(self._host_places, non_blocking=True)
        begun = 0
        while fresh - begun > _MOST:
            self._add(begun, _MOST)
            self._digest(begun, _MOST // 4)
            begun += _MOST
        if fresh:
            self._add(begun, fresh - begun)
        self._digest(begun, programs - begun // 4)
        self._host_found.copy_(self._found, non_blocking=True)

    def _add(self, begin: int, count: int) -> None:
        grid = (self._blocks // self._together, count)
        _ADD[grid](self._places[0, begin:], self._table, self._sums_CB8, self._blocks, self._together)

    def _digest(self, begin: int, programs: int) -> None:
        starts, rows = self._places[:, begin:].unbind(0)
        of_all = (self._table, starts, rows, self._found[begin:], self._blocks, PRIME32_1, PRIME_MX1, self._unrolled)
        _DIGEST[(programs,)](*of_all, num_warps=1)

    def take(self) -> list[bytes]:
        """The digests of each of what :meth:`queue` was given, one after another, once the device has come to it."""
        found = self._found_C2.byteswap()
        return [found[at : at + count].tobytes() for at, count in self._order]


def scale_and_add(source: torch.Tensor, factor: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """``out`` becomes the bfloat16 ``source`` [N] times ``factor`` [1], both products and ``out`` in fp32.

    Returns the sums of source's blocks, [blocks, 8], for :meth:`DeviceSums.queue`; of whole blocks only. N is a
    multiple of 4, and source begins at one of 16 bytes.
    """
    words = source.view(torch.uint64)
    blocks = -(-words.numel() // (BLOCK // 8))
    sums = torch.empty(blocks, 8, dtype=torch.uint64, device=source.device)
    secret = _secret_on(source.device)
    of_all = (words, secret, factor, out, sums, words.numel(), _TOGETHER)
    # A word for each thread, which stores the four products as one; with two they would change threads before.
    _SCALE[(-(-blocks // _TOGETHER),)](*of_all, num_warps=_TOGETHER // 4)
    return sums


@lru_cache(maxsize=8)
def _secret_on(device: torch.device) -> torch.Tensor:
    return torch.frombuffer(bytearray(SECRET), dtype=torch.uint64).to(device)


_ADD, _DIGEST, _SCALE = Quick(_add_blocks), Quick(_digest), Quick(_scale_blocks)
