"""The physical limits that figures are held against, measured in the same run: memory, hash, device copies, disk.

All figures are GB/s (1e9 bytes a second) of payload, medians of several repetitions over random bytes. A copy counts
its bytes once, although it reads and writes them.
"""

from __future__ import annotations

import ctypes
import os
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor
from xxhash import xxh3_128_digest

_CHUNK = 64 << 20
_REPEATS = 5


def seconds(work: Callable[[], object], repeats: int = _REPEATS, warm: bool = True) -> float:
    """Median wall time of ``work``; with CUDA, until the device has done it."""
    taken = []
    for _ in range(repeats + warm):
        _wait_for_device()
        started = time.perf_counter()
        work()
        _wait_for_device()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken[warm:])


def _wait_for_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def random_bytes(nbytes: int, pin: bool = False) -> Tensor:
    """A uint8 tensor [nbytes] without runs of zeros, its pages present."""
    block = torch.randint(0, 256, (min(nbytes, 16 << 20),), dtype=torch.uint8)
    out = torch.empty(nbytes, dtype=torch.uint8, pin_memory=pin)
    for at in range(0, nbytes, block.numel()):
        out[at : at + block.numel()] = block[: nbytes - at]
    return out


def _in_chunks(work: Callable[[int, int], object], nbytes: int, threads: int) -> Callable[[], None]:
    """``work(start, length)`` over all of ``nbytes``, on a pool that is made beforehand."""
    pool = ThreadPoolExecutor(threads)

    def run() -> None:
        list(pool.map(lambda at: work(at, min(_CHUNK, nbytes - at)), range(0, nbytes, _CHUNK)))

    return run


def memcpy_gbps(nbytes: int, threads: Sequence[int]) -> dict[int, float]:
    """memmove within this process's memory."""
    source, target = random_bytes(nbytes), random_bytes(nbytes)
    at, to = source.data_ptr(), target.data_ptr()

    def copy(start: int, length: int) -> None:
        ctypes.memmove(to + start, at + start, length)

    return {n: nbytes / seconds(_in_chunks(copy, nbytes, n)) / 1e9 for n in threads}


def hash_gbps(nbytes: int, threads: Sequence[int]) -> dict[int, float]:
    """xxh3_128 over chunks, as records are verified."""
    view = memoryview(random_bytes(nbytes).numpy())

    def digest(start: int, length: int) -> None:
        xxh3_128_digest(view[start : start + length])

    return {n: nbytes / seconds(_in_chunks(digest, nbytes, n)) / 1e9 for n in threads}


def device_copy_gbps(nbytes: int, host: Tensor | None = None) -> dict[str, float]:
    """``d2h`` and ``h2d`` between a GPU and ``host`` (default: torch's own pinned memory); empty without a GPU."""
    if not torch.cuda.is_available():
        return {}
    host = random_bytes(nbytes, pin=True) if host is None else host
    device = random_bytes(nbytes).cuda()
    d2h = seconds(lambda: host.copy_(device, non_blocking=True))
    h2d = seconds(lambda: device.copy_(host, non_blocking=True))
    return {"d2h": nbytes / d2h / 1e9, "h2d": nbytes / h2d / 1e9}


def disk_gbps(folder: Path, nbytes: int) -> dict[str, float]:
    """Writing one file with fsync, and reading it back after asking the kernel to forget it. One repetition each."""
    data = memoryview(random_bytes(nbytes).numpy())
    path = folder / "ceiling.bin"
    try:
        with path.open("wb", buffering=0) as file:
            started = time.perf_counter()
            for at in range(0, nbytes, _CHUNK):
                file.write(data[at : at + _CHUNK])
            os.fsync(file.fileno())
            written_s = time.perf_counter() - started
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        with path.open("rb", buffering=0) as file:
            started = time.perf_counter()
            while file.readinto(data[:_CHUNK]):
                pass
            read_s = time.perf_counter() - started
    finally:
        path.unlink(missing_ok=True)
    return {"write_fsync": nbytes / written_s / 1e9, "read": nbytes / read_s / 1e9}
