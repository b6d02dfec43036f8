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

_WORDS = BLOCK // 8
_MOST = 64  # chunks of one capture; the keeper sums up the others. They take a 16th of their bytes on the device.


@triton.jit
def _add_blocks(source, secret, sums, blocks: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * blocks
    block = tl.arange(0, blocks)[:, None, None]
    stripe = tl.arange(0, 16)[None, :, None]
    lane = tl.arange(0, 8)[None, None, :]
    low = tl.full((1, 1, 1), 0xFFFFFFFF, tl.int64)
    at = source + (first + block) * 128 + stripe * 8
    mixed = tl.load(at + lane) ^ tl.load(secret + stripe + lane)
    total = tl.sum((mixed & low) * ((mixed >> 32) & low) + tl.load(at + (lane ^ 1)), axis=1)
    row = first + tl.arange(0, blocks)[:, None]
    tl.store(sums + row * 8 + tl.arange(0, 8)[None, :], total)


@triton.jit
def _scramble(sums, secret, start, out, prime, blocks: tl.constexpr, unrolled: tl.constexpr):
    chunk = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, 8)
    key = tl.load(secret + 16 + lane)
    total = tl.load(start + lane)
    at = sums + chunk * (blocks + 1) * 8 + lane
    for block in range(0, blocks, unrolled):
        for turn in tl.static_range(unrolled):
            total += tl.load(at + (block + turn) * 8)
            total = (total ^ ((total >> 47) & 0x1FFFF) ^ key) * prime
    tl.store(out + chunk * 8 + lane, total)


class DeviceSums:
    """Takes the sums of whole chunks on a stream of its own.

    Args:
        chunk: bytes, a multiple of 16 KiB.
    """

    def __init__(self, device: torch.device, chunk: int) -> None:
        self._chunk, self._blocks = chunk, chunk // BLOCK
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

        def words(values: bytes) -> torch.Tensor:
            return torch.frombuffer(bytearray(values), dtype=torch.int64).to(device)

        self._secret, self._start = words(SECRET), words(struct.pack("<8Q", *START))
        self._sums_CB8 = torch.empty(0, dtype=torch.int64, device=device)
        self._found_C8 = torch.empty(_MOST, 8, dtype=torch.int64, device=device)
        self._host_C8 = torch.empty(_MOST, 8, dtype=torch.int64, pin_memory=device.type == "cuda")

    def queue(self, sources: Sequence[torch.Tensor], after: torch.cuda.Event | None = None) -> int:
        """Begin with as many chunks as there is room for, in the order of ``sources``: uint8 tensors of whole chunks.

        Returns how many those are. The tensors must stay as they are until :meth:`take`.
        """
        with torch.cuda.stream(self._stream):
            if self._stream is not None and after is not None:
                self._stream.wait_event(after)
            room = min(_MOST, sum(source.numel() for source in sources) // self._chunk)
            if self._sums_CB8.numel() < room * self._blocks * 8:
                self._sums_CB8 = self._secret.new_empty(room * self._blocks * 8)
            done = 0
            for source in sources:
                count = min(source.numel() // self._chunk, room - done)
                if count:
                    sums = self._sums_CB8[done * self._blocks * 8 :]
                    words = source[: count * self._chunk].view(torch.int64)
                    _add_blocks[(count * self._blocks // 8,)](words, self._secret, sums, 8)
                    done += count
            if done:
                whole = self._blocks - 1
                unrolled = 15 if whole % 15 == 0 else 1
                _scramble[(done,)](
                    self._sums_CB8, self._secret, self._start, self._found_C8, PRIME32_1, whole, unrolled, num_warps=1
                )
                self._host_C8.copy_(self._found_C8, non_blocking=True)
        return done

    def take(self, count: int) -> list[bytes]:
        """Wait for them; returns each chunk's accumulators."""
        if self._stream is not None:
            done = torch.cuda.Event(blocking=True)
            done.record(self._stream)
            done.synchronize()
        return [row.tobytes() for row in self._host_C8[:count].numpy()]
