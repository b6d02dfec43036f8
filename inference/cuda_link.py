"""The link of a GPU: copies on a stream beside the one that computes.

They are handed to CUDA's driver itself. The link is idle until it has been given a copy, and torch's ``copy_`` spends
more than 10 us on each, most of it to remember who still reads the memory, which whoever gives copies knows here.

Packed blocks go into a ring of buffers on the device, and from there, unpacked by a second stream, to where they are
wanted: while one is unpacked, the next one crosses.

Shapes: B elements of a block, N bytes of a packed one.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections import deque
from typing import Any

import torch
from torch import Tensor

from inference.native import library
from inference.packed import PackedBlock
from inference.placement import RING_BYTES
from inference.transfer import is_packed

_RING_BUFFERS = 8  # at most, as far as there is room for them, but two


class _Driver:
    """CUDA's driver. Each call returns its status, 0 for success. Only ``copy`` is called from Python."""

    def __init__(self) -> None:
        driver, pointer = ctypes.CDLL("libcuda.so.1"), ctypes.c_void_p
        self.copy: Any = driver.cuMemcpyHtoDAsync_v2
        self.copy.argtypes, self.copy.restype = (ctypes.c_uint64, pointer, ctypes.c_size_t, pointer), ctypes.c_int
        self.record, self.wait = driver.cuEventRecord, driver.cuStreamWaitEvent


_driver = functools.cache(_Driver)


class CudaLink:
    """Sources must be page-locked, or each copy would stop the host."""

    def __init__(self, device: torch.device, *, timed: bool = True) -> None:
        self.device = device
        # Streams are asked for by number: from a device torch finds it out in 10 us.
        self._number = torch.cuda.current_device() if device.index is None else device.index
        self._stream = torch.cuda.Stream(device, priority=-1)
        self._driver, self._handle = _driver(), self._stream.cuda_stream
        self._ring: _Ring | None = None
        # Whether copies were given that the other stream does not know of: on this one, and on the ring's.
        self._plain = self._packed = False
        self._timed = timed
        self._waits: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self._stall_s = 0.0

    @property
    def stall_s(self) -> float:
        self._harvest()
        return self._stall_s

    def copy(self, target_B: Tensor, source_B: Tensor) -> None:
        if is_packed(source_B):
            self._ring_for(target_B).bring(target_B, source_B)
            self._packed = True
            return
        assert target_B.dtype == source_B.dtype, (target_B.dtype, source_B.dtype)
        if self._packed:  # the target may be one that something is still unpacked to
            assert self._ring is not None
            self._stream.wait_stream(self._ring.unpacking)
            self._packed = False
        self._plain = True
        if self._driver.copy(target_B.data_ptr(), source_B.data_ptr(), target_B.nbytes, self._handle):
            with torch.cuda.stream(self._stream):  # a thread that has not met this device yet; or torch says what it is
                target_B.copy_(source_B, non_blocking=True)

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event()
        if self._ring is None:
            event.record(self._stream)
            return event
        if self._plain:
            self._ring.unpacking.wait_stream(self._stream)
            self._plain = False
        event.record(self._ring.unpacking)
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

    def _ring_for(self, target_B: Tensor) -> _Ring:
        if self._ring is None:
            self._ring = _Ring(target_B.numel(), self._stream)
        return self._ring

    def _harvest(self) -> None:
        while self._waits and self._waits[0][1].query():
            before, after = self._waits.popleft()
            self._stall_s += before.elapsed_time(after) / 1e3


class RingStruct(ctypes.Structure):
    """``ring_t`` of ring.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("copy", "record", "wait", "launch", "copying", "unpacking")),
        *((name, ctypes.c_void_p) for name in ("buffers", "arrived", "free", "kernel", "arguments", "places")),
        ("count", ctypes.c_int),
        *((name, ctypes.c_uint) for name in ("tiles", "threads", "shared")),
    )


class _Ring:
    """Packed blocks of one size on their way.

    Buffers take turns, and are given back by halves of the ring: a copy into the first buffer of a half is behind the
    unpacking of the last block that was in that half.

    Attributes:
        unpacking: the stream on which blocks become whole, in the order in which they were brought.
    """

    def __init__(self, elements: int, copying: torch.cuda.Stream) -> None:
        from inference.unpack_kernel import Unpacker  # only where there is Triton

        self._elements, self._stride, driver = elements, PackedBlock(elements).stride, _driver()
        self._count = max(min(RING_BYTES // self._stride, _RING_BUFFERS) // 2 * 2, 2)
        with torch.cuda.device(copying.device), torch.inference_mode(False):
            self._buffers = torch.empty(self._count, self._stride, dtype=torch.uint8, device=copying.device)
            self._unpack = Unpacker(elements, copying.device)
            self.unpacking = torch.cuda.Stream(copying.device, priority=-1)
            copying.wait_stream(torch.cuda.current_stream())  # the memory may have been somebody's
            self._events = [torch.cuda.Event() for _ in range(self._count + 2)]
            for event in self._events:  # only then there is one
                event.record(self.unpacking)
        handles = [event.cuda_event for event in self._events]
        self._arrays = (
            (ctypes.c_uint64 * self._count)(*(buffer.data_ptr() for buffer in self._buffers)),
            (ctypes.c_void_p * self._count)(*handles[: self._count]),
            (ctypes.c_void_p * 2)(*handles[self._count :]),
            self._unpack.arguments,
            self._unpack.places,
        )
        buffers, arrived, free, arguments, places = map(ctypes.addressof, self._arrays)
        calls = (driver.copy, driver.record, driver.wait, self._unpack.launch)
        self._ring = RingStruct(
            *(ctypes.cast(call, ctypes.c_void_p) for call in calls),
            *(copying.cuda_stream, self.unpacking.cuda_stream, buffers, arrived, free),
            *(self._unpack.kernel, arguments, places, self._count),
            *(self._unpack.tiles, self._unpack.threads, self._unpack.shared),
        )
        self._bring, self._at = library().ring_bring, ctypes.addressof(self._ring)
        self._copying, self._thread, self._turn = copying, threading.get_ident(), 0

    def bring(self, target_B: Tensor, packed_N: Tensor) -> None:
        assert target_B.numel() == self._elements, target_B.shape
        assert packed_N.nbytes <= self._stride, packed_N.shape
        if self._thread != threading.get_ident():  # the driver knows no thread that has not met the device yet
            torch.cuda.Event().record(self._copying)
            self._thread = threading.get_ident()
        status = self._bring(self._at, self._turn, target_B.data_ptr(), packed_N.data_ptr(), packed_N.nbytes)
        if status:
            torch.cuda.synchronize()  # says what it is, if it is the device's
            raise RuntimeError(f"CUDA error {status}")
        self._turn = (self._turn + 1) % self._count
