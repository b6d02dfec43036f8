"""The link of a GPU: copies on a stream beside the one that computes.

They are handed to CUDA's driver itself. The link is idle until it has been given a copy, and torch's ``copy_`` spends
more than 10 us on each, most of it to remember who still reads the memory, which whoever gives copies knows here.
"""

from __future__ import annotations

import ctypes
import functools
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


@functools.cache
def _copy_to_device() -> Callable[[int, int, int, int], int]:
    """(target, source, bytes, stream) to CUDA's status, 0 for success."""
    call: Any = ctypes.CDLL("libcuda.so.1").cuMemcpyHtoDAsync_v2
    call.argtypes = [ctypes.c_uint64, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    call.restype = ctypes.c_int
    return call  # type: ignore[no-any-return]


class CudaLink:
    """Sources must be page-locked, or each copy would stop the host."""

    def __init__(self, device: torch.device, *, timed: bool = True) -> None:
        self.device = device
        # Streams are asked for by number: from a device torch finds it out in 10 us.
        self._number = torch.cuda.current_device() if device.index is None else device.index
        self._stream = torch.cuda.Stream(device, priority=-1)
        self._give, self._handle = _copy_to_device(), self._stream.cuda_stream
        self._timed = timed
        self._waits: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self._stall_s = 0.0

    @property
    def stall_s(self) -> float:
        self._harvest()
        return self._stall_s

    def copy(self, target_B: Tensor, source_B: Tensor) -> None:
        assert target_B.dtype == source_B.dtype, (target_B.dtype, source_B.dtype)
        if self._give(target_B.data_ptr(), source_B.data_ptr(), target_B.nbytes, self._handle):
            with torch.cuda.stream(self._stream):  # a thread that has not met this device yet; or torch says what it is
                target_B.copy_(source_B, non_blocking=True)

    def copy_all(self, pairs: Sequence[tuple[Tensor, Tensor]], ends: Sequence[int]) -> list[torch.cuda.Event]:
        marks = []
        for given, (target_B, source_B) in enumerate(pairs, start=1):
            self.copy(target_B, source_B)
            if given in ends:
                marks.append(self.mark())
        return marks

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record(self._stream)
        return event

    def done(self, mark: torch.cuda.Event) -> bool:
        return mark.query()

    def wait(self, mark: torch.cuda.Event) -> None:
        computing = torch.cuda.current_stream(self._number)
        if not self._timed:
            computing.wait_event(mark)
            return
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record(computing)
        computing.wait_event(mark)
        after.record(computing)
        self._waits.append((before, after))
        if len(self._waits) > 64:
            self._harvest()

    def settle(self, mark: torch.cuda.Event) -> None:
        mark.synchronize()

    def fence(self) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self._number))

    def _harvest(self) -> None:
        while self._waits and self._waits[0][1].query():
            before, after = self._waits.popleft()
            self._stall_s += before.elapsed_time(after) / 1e3
