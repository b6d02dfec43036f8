"""Checksums taken by the GPU, of state that still lies there: the keeper's reading of every captured byte shared cores
and memory with the thread that queues kernels (figures: docs/measurements.md).

Two Triton kernels give what :func:`checkpointing.xxh3.finish` needs. The first adds up each block of 1,024 bytes, all
blocks at once; the second takes a chunk's blocks in their order, scrambling after each, four chunks in a program. The
digest is that of the xxhash library, bit for bit, so whoever verifies a record does not know who took its sums. Blocks
of gradients are added up by the pass that scales them for the optimizer, which must read them anyway.

Shapes: C chunks, B blocks of a chunk, 16 stripes of a block, 8 lanes of 64 bits of a stripe.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl

from checkpointing.xxh3 import BLOCK, PRIME32_1, SECRET, START

_MOST = 64  # chunks of one capture; the keeper sums up the others. They take a 16th of their bytes on the device.
_TOGETHER = 32  # blocks that a program adds up
_SUMS = 64  # bytes of a block's
_UNROLLED = (51, 15, 1)  # blocks whose sums are loaded ahead of being scrambled: the most that divides a chunk's


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
def _scramble(rows, secret, start, out, prime: tl.constexpr, count, in_chunk: tl.constexpr, unrolled: tl.constexpr):
    """Four chunks in a warp. Each waits for its block before, so the next sums must be under way meanwhile.

    ``rows``: where each chunk's sums of blocks begin.
    """
    chunk = tl.program_id(0).to(tl.int64) * 4 + tl.arange(0, 4)[:, None]
    there = chunk < count
    lane = tl.arange(0, 8)[None, :]
    key = tl.load(secret + 16 + lane)
    total = tl.load(start + lane) + tl.zeros((4, 8), tl.uint64)
    at = tl.multiple_of(tl.load(rows + chunk, there, 0).to(tl.pointer_type(tl.uint64)), [16, 16]) + lane
    ahead = ()
    for turn in tl.static_range(unrolled):
        ahead += (tl.load(at + turn * 8, there, 0),)
    for block in range(unrolled, in_chunk, unrolled):  # the last block is the host's
        now, ahead = ahead, ()
        at += unrolled * 8
        more = there & (block < in_chunk - 1)
        for turn in tl.static_range(unrolled):
            ahead += (tl.load(at + turn * 8, more, 0),)
        for turn in tl.static_range(unrolled):
            total += now[turn]
            total = (total ^ (total >> 47) ^ key) * prime
    tl.store(out + chunk * 8 + lane, total, there)


class DeviceSums:
    """Takes the sums of whole chunks on a stream of its own.

    Args:
        chunk: bytes, a multiple of 16 KiB.
    """

    def __init__(self, device: torch.device, chunk: int) -> None:
        self._chunk, self._blocks = chunk, chunk // BLOCK
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

        def of_host(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=torch.uint64, pin_memory=device.type == "cuda")

        self._secret = _secret_on(device)
        self._start = torch.frombuffer(bytearray(struct.pack("<8Q", *START)), dtype=torch.uint64).to(device)
        self._sums_CB8 = torch.empty(0, dtype=torch.uint64, device=device)
        # Of each chunk where its bytes lie, and where its blocks' sums do.
        self._places_2C = torch.empty(2, _MOST, dtype=torch.uint64, device=device)
        self._found_C8 = torch.empty(_MOST, 8, dtype=torch.uint64, device=device)
        self._host_places_2C, self._host_found_C8 = of_host(2, _MOST), of_host(_MOST, 8)

    def queue(
        self,
        starts: Sequence[int],
        after: torch.cuda.Event | None = None,
        added: Sequence[int] = (),
        ready: torch.cuda.Event | None = None,
    ) -> int:
        """Begin with as many chunks as there is room for: first those whose blocks are added up after ``ready``, given
        where the sums lie, then, after ``after``, those whose bytes begin at ``starts``; all addresses of the device.

        Returns how many those are. Their bytes must stay as they are until :meth:`take`. Raises ValueError if one does
        not begin at a multiple of 16.
        """
        added = added[:_MOST]
        starts = starts[: _MOST - len(added)]
        if any(start % 16 for start in starts):
            raise ValueError("state begins between two multiples of 16 bytes")
        known, fresh, blocks = len(added), len(starts), self._blocks
        with torch.cuda.stream(self._stream):
            if self._sums_CB8.numel() < fresh * blocks * 8:  # of this stream's memory: the other's may still be in use
                self._sums_CB8 = self._secret.new_empty(fresh * blocks * 8)
            sums, places = self._sums_CB8.data_ptr(), self._host_places_2C.numpy()
            places[0, :fresh] = starts
            places[1, : known + fresh] = [*added, *(sums + number * blocks * _SUMS for number in range(fresh))]
            self._places_2C.copy_(self._host_places_2C, non_blocking=True)
            if added:
                self._wait(ready or after)
                self._scramble(0, known)
            if starts:
                self._wait(after)
                together = min(_TOGETHER, blocks & -blocks)
                of_all = (self._places_2C[0], self._secret, self._sums_CB8, blocks, together)
                _add_blocks[(blocks // together, fresh)](*of_all)
                self._scramble(known, fresh)
            self._host_found_C8.copy_(self._found_C8, non_blocking=True)
        return known + fresh

    def _wait(self, event: torch.cuda.Event | None) -> None:
        if self._stream is not None and event is not None:
            self._stream.wait_event(event)

    def _scramble(self, first: int, count: int) -> None:
        blocks = self._blocks
        unrolled = next(n for n in _UNROLLED if (blocks - 1) % n == 0)
        rows, found = self._places_2C[1, first:], self._found_C8[first:]
        of_all = (rows, self._secret, self._start, found, PRIME32_1, count, blocks, unrolled)
        _scramble[(-(-count // 4),)](*of_all, num_warps=1)

    def take(self, count: int) -> list[bytes]:
        """Wait for them; returns each chunk's accumulators."""
        if self._stream is not None:
            done = torch.cuda.Event(blocking=True)
            done.record(self._stream)
            done.synchronize()
        return [row.tobytes() for row in self._host_found_C8[:count].numpy()]


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
    _scale_blocks[(-(-blocks // _TOGETHER),)](*of_all, num_warps=_TOGETHER // 4)
    return sums


@lru_cache(maxsize=8)
def _secret_on(device: torch.device) -> torch.Tensor:
    return torch.frombuffer(bytearray(SECRET), dtype=torch.uint64).to(device)
