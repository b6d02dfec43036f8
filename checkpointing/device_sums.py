"""Checksums taken by the GPU, of state that still lies there: the keeper's reading of every captured byte shared cores
and memory with the thread that queues kernels (figures: docs/measurements.md).

Two Triton kernels give what :func:`checkpointing.xxh3.finish` needs. The first adds up each block of 1,024 bytes, all
blocks at once; the second takes a chunk's blocks in their order, scrambling after each, one program for a chunk. The
digest is that of the xxhash library, bit for bit, so whoever verifies a record does not know who took its sums.

Shapes: C chunks, B blocks of a chunk, 16 stripes of a block, 8 lanes of 64 bits of a stripe.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from checkpointing.xxh3 import BLOCK, PRIME32_1, SECRET, START

_MOST = 64  # chunks of one capture; the keeper sums up the others. They take a 16th of their bytes on the device.
_TOGETHER = 32  # blocks that a program adds up
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
        mixed = word ^ tl.load(secret + stripe + lane)
        total += (mixed & 0xFFFFFFFF).to(tl.uint32).to(tl.uint64) * (mixed >> 32).to(tl.uint32).to(tl.uint64)
        words += word
    even, odd = tl.split(tl.reshape(words, (blocks, 4, 2)))  # a word is added to its neighbour's lane
    total += tl.reshape(tl.join(odd, even), (blocks, 8))
    tl.store(sums + (chunk * in_chunk + block) * 8 + lane, total)


@triton.jit
def _scramble(sums, secret, start, out, prime: tl.constexpr, count, in_chunk: tl.constexpr, unrolled: tl.constexpr):
    """Four chunks in a warp. Each waits for its block before, so the next sums must be under way meanwhile."""
    chunk = tl.program_id(0).to(tl.int64) * 4 + tl.arange(0, 4)[:, None]
    there = chunk < count
    lane = tl.arange(0, 8)[None, :]
    key = tl.load(secret + 16 + lane)
    total = tl.load(start + lane) + tl.zeros((4, 8), tl.uint64)
    at = sums + chunk * in_chunk * 8 + lane
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

        def words(values: bytes) -> torch.Tensor:
            return torch.frombuffer(bytearray(values), dtype=torch.uint64).to(device)

        def of_host(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=torch.uint64, pin_memory=device.type == "cuda")

        self._secret, self._start = words(SECRET), words(struct.pack("<8Q", *START))
        self._sums_CB8 = torch.empty(0, dtype=torch.uint64, device=device)
        self._chunks_C = torch.empty(_MOST, dtype=torch.uint64, device=device)
        self._found_C8 = torch.empty(_MOST, 8, dtype=torch.uint64, device=device)
        self._host_chunks_C, self._host_found_C8 = of_host(_MOST), of_host(_MOST, 8)

    def queue(self, starts: Sequence[int], after: torch.cuda.Event | None = None) -> int:
        """Begin with as many chunks as there is room for, in the order of ``starts``, their addresses on the device.

        Returns how many those are. Their bytes must stay as they are until :meth:`take`. Raises ValueError if one does
        not begin at a multiple of 16.
        """
        starts = starts[:_MOST]
        if any(start % 16 for start in starts):
            raise ValueError("state begins between two multiples of 16 bytes")
        count, blocks = len(starts), self._blocks
        if not count:
            return 0
        self._host_chunks_C.numpy()[:count] = starts
        with torch.cuda.stream(self._stream):
            if self._stream is not None and after is not None:
                self._stream.wait_event(after)
            if self._sums_CB8.numel() < count * blocks * 8:
                self._sums_CB8 = self._secret.new_empty(count * blocks * 8)
            self._chunks_C.copy_(self._host_chunks_C, non_blocking=True)
            together = min(_TOGETHER, blocks & -blocks)
            _add_blocks[(blocks // together, count)](self._chunks_C, self._secret, self._sums_CB8, blocks, together)
            unrolled = next(n for n in _UNROLLED if (blocks - 1) % n == 0)
            of_all = (self._sums_CB8, self._secret, self._start, self._found_C8, PRIME32_1, count, blocks, unrolled)
            _scramble[(-(-count // 4),)](*of_all, num_warps=1)
            self._host_found_C8.copy_(self._found_C8, non_blocking=True)
        return count

    def take(self, count: int) -> list[bytes]:
        """Wait for them; returns each chunk's accumulators."""
        if self._stream is not None:
            done = torch.cuda.Event(blocking=True)
            done.record(self._stream)
            done.synchronize()
        return [row.tobytes() for row in self._host_found_C8[:count].numpy()]
