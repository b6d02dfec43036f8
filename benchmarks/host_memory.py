"""What decides how fast a recovery from memory can be: clearing, mapping and registering shared memory; copies; hashes.

    python -m benchmarks.host_memory --gib 8 24

For every size and page size: allocate and prefault a memfd as the keeper does, map it a second time as a restarted
worker does, register that mapping with CUDA in one piece, per GiB and on several threads, and copy between it and the
GPU. Without a GPU the CUDA parts are left out. Prints one line per figure and writes JSON to --json, or
host_memory.json in the folder that OUT names. Nothing is left allocated.
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.ceilings import device_copy_gbps, hash_gbps, memcpy_gbps
from benchmarks.machine import GIB, describe_machine, result_path, save, say

_POPULATE_READ, _POPULATE_WRITE, _HUGEPAGE = 22, 23, 14  # madvise(2)
_PIECE = 256 << 20
_COPIED = 2 * GIB
_THREADS = (1, 4, 8, 16)
_libc = ctypes.CDLL(None, use_errno=True)


class Unavailable(RuntimeError):
    """This machine does not offer a kind of pages; the message says why."""


@contextmanager
def mapped(fd: int, nbytes: int, populate: bool = False) -> Iterator[int]:
    """A shared mapping of ``fd``; yields its address."""
    flags = mmap.MAP_SHARED | (mmap.MAP_POPULATE if populate else 0)
    with mmap.mmap(fd, nbytes, flags=flags) as memory:
        view = (ctypes.c_char * nbytes).from_buffer(memory)
        try:
            yield ctypes.addressof(view)
        finally:
            del view


def advise(address: int, nbytes: int, advice: int, threads: int = 1) -> float:
    """madvise(2) in pieces on ``threads``; returns the seconds taken."""

    def one(start: int) -> None:
        length = min(_PIECE, nbytes - start)
        if _libc.madvise(ctypes.c_void_p(address + start), ctypes.c_size_t(length), advice):
            raise Unavailable(f"madvise({advice}): {os.strerror(ctypes.get_errno())}")

    with ThreadPoolExecutor(threads) as pool:
        started = time.perf_counter()
        list(pool.map(one, range(0, nbytes, _PIECE)))
        return time.perf_counter() - started


@contextmanager
def prefaulted(nbytes: int, pages: str, threads: int, times: dict[str, float]) -> Iterator[int]:
    """A memfd all of whose pages exist; yields the descriptor and notes the seconds that it took.

    ``pages``: "4k", "sparse" (4 KiB, without fallocate before), "advised" (4 KiB with MADV_HUGEPAGE)
    or "hugetlb" (reserved 2 MiB pages).
    """
    fd = os.memfd_create("benchmark", os.MFD_CLOEXEC | (os.MFD_HUGETLB if pages == "hugetlb" else 0))
    try:
        os.ftruncate(fd, nbytes)
        started = time.perf_counter()
        if pages == "4k":
            os.posix_fallocate(fd, 0, nbytes)  # as the keeper does; it would leave no room for huge pages
            times["fallocate_s"] = time.perf_counter() - started
        with mapped(fd, nbytes) as address:
            if pages == "advised":
                advise(address, nbytes, _HUGEPAGE)
            times["prefault_s"] = advise(address, nbytes, _POPULATE_WRITE, threads)
            times["huge_gib"] = round(_huge_bytes(address) / GIB, 2)
        yield fd
    except OSError as error:
        raise Unavailable(f"{pages} pages: {error.strerror}") from error
    finally:
        os.close(fd)


def _huge_bytes(address: int) -> int:
    """Bytes of the mapping at ``address`` that the kernel backs with huge pages."""
    inside, found = False, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split(maxsplit=1)[0]
        if "-" in head and not head.endswith(":"):
            first, last = (int(part, 16) for part in head.split("-"))
            inside = first <= address < last
        elif inside and head in ("ShmemPmdMapped:", "Shared_Hugetlb:", "Private_Hugetlb:"):
            found += int(line.split()[1]) << 10
    return found


def measure_maps(fd: int, nbytes: int) -> dict[str, float]:
    """Seconds for a second process's way to the same pages: map them all at once, or on several threads."""
    times: dict[str, float] = {}
    started = time.perf_counter()
    with mapped(fd, nbytes, populate=True):
        times["map_populate_s"] = time.perf_counter() - started
    for threads in (1, 8, 16):
        with mapped(fd, nbytes) as address:
            times[f"populate_read_{threads}t_s"] = advise(address, nbytes, _POPULATE_READ, threads)
    return times


def measure_registering(fd: int, nbytes: int) -> dict[str, float]:
    """Seconds to register (and release) a fresh mapping of ``fd``, for several ways of cutting it up."""
    times: dict[str, float] = {}
    for name, piece, threads, populate in (
        ("whole", nbytes, 1, False),
        ("whole_populated", nbytes, 1, True),
        ("per_gib", GIB, 1, False),
        ("per_gib_populated", GIB, 1, True),
        ("per_gib_4t", GIB, 4, False),
        ("per_gib_8t", GIB, 8, False),
        ("per_gib_16t", GIB, 16, False),
    ):
        with mapped(fd, nbytes, populate=populate) as address:
            times[f"register_{name}_s"] = _register(address, nbytes, piece, threads)
            started = time.perf_counter()
            _unregister(address, nbytes, piece)
            times[f"unregister_{name}_s"] = time.perf_counter() - started
    return times


def _register(address: int, nbytes: int, piece: int, threads: int = 1) -> float:
    runtime, device = torch.cuda.cudart(), torch.cuda.current_device()

    def one(start: int) -> None:
        with torch.cuda.device(device):
            status = runtime.cudaHostRegister(address + start, min(piece, nbytes - start), 0)
        if int(status) != 0:
            raise RuntimeError(f"cudaHostRegister of {nbytes - start:,} bytes failed with CUDA error {int(status)}")

    with ThreadPoolExecutor(threads) as pool:
        started = time.perf_counter()
        list(pool.map(one, range(0, nbytes, piece)))
        return time.perf_counter() - started


def _unregister(address: int, nbytes: int, piece: int) -> None:
    for start in range(0, nbytes, piece):
        status = torch.cuda.cudart().cudaHostUnregister(address + start)
        assert int(status) == 0, f"cudaHostUnregister failed with CUDA error {int(status)}"


def measure_copies(fd: int, nbytes: int) -> dict[str, float]:
    """GB/s between the GPU and a registered mapping of ``fd``."""
    copied = min(_COPIED, nbytes)
    with mapped(fd, nbytes) as address:
        _register(address, nbytes, GIB)
        host = torch.frombuffer((ctypes.c_uint8 * copied).from_address(address), dtype=torch.uint8)
        found = device_copy_gbps(copied, host)
        del host
        _unregister(address, nbytes, GIB)
    return {f"registered_{name}_gbps": value for name, value in found.items()}


def measure_pages(gib: float, pages: str) -> dict[str, Any]:
    """All figures of one size and kind of pages, or why there are none."""
    nbytes = int(gib * GIB) // (2 << 20) * (2 << 20)
    found: dict[str, Any] = {}
    cores = len(os.sched_getaffinity(0))
    try:
        if pages == "4k":
            for threads in (1, 16):
                alone: dict[str, float] = {}
                with prefaulted(nbytes, "sparse", threads, alone):
                    found[f"prefault_sparse_{threads}t_s"] = alone["prefault_s"]
        with prefaulted(nbytes, pages, min(8, cores), found) as fd:
            found |= measure_maps(fd, nbytes)
            if torch.cuda.is_available():
                found |= measure_registering(fd, nbytes)
                found |= measure_copies(fd, nbytes)
    except Unavailable as error:
        found["unavailable"] = str(error)
    return found


def measure_anonymous(nbytes: int, threads: tuple[int, ...]) -> dict[str, Any]:
    """Figures that do not depend on shared memory: copies, hashes, torch's own pinned memory."""
    found: dict[str, Any] = {"memcpy_gbps": memcpy_gbps(nbytes, threads), "xxh3_128_gbps": hash_gbps(nbytes, threads)}
    if torch.cuda.is_available():
        started = time.perf_counter()
        pinned = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
        found["torch_pinned_allocation_s"] = time.perf_counter() - started
        del pinned
        found |= {f"torch_pinned_{name}_gbps": value for name, value in device_copy_gbps(nbytes).items()}
    return found


def report(title: str, figures: dict[str, Any]) -> None:
    say(f"\n{title}")
    for name, value in figures.items():
        if isinstance(value, dict):
            value = "  ".join(f"{key}: {one:.2f}" for key, one in value.items())
        say(f"  {name:34s} {value if isinstance(value, str) else f'{value:.3f}'}")


def kernel_settings() -> dict[str, str]:
    """What the kernel allows in huge pages."""
    folder = Path("/sys/kernel/mm/transparent_hugepage")
    found = {name: (folder / name).read_text().strip() for name in ("enabled", "shmem_enabled") if folder.is_dir()}
    free = [line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("HugePages_Free")]
    return found | {"reserved": " ".join(free)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gib", type=float, nargs="+", default=[8, 24], help="sizes of the shared memory")
    parser.add_argument("--pages", nargs="+", default=["4k", "advised", "hugetlb"])
    parser.add_argument("--copied-gib", type=float, default=2, help="size of what is hashed and copied")
    parser.add_argument("--json", help="where to write the figures")
    options = parser.parse_args()
    path = result_path("host_memory.json", options.json)
    cores = len(os.sched_getaffinity(0))
    result: dict[str, Any] = {"machine": describe_machine(), "kernel": kernel_settings()}
    say(f"{result['machine']}\n{result['kernel']}")
    if not torch.cuda.is_available():
        say("no GPU: registering and device copies are left out")
    else:
        torch.zeros(1, device="cuda")
    threads = tuple(sorted({n for n in _THREADS if n <= cores} | {min(cores, _THREADS[-1])}))
    result["anonymous"] = measure_anonymous(int(options.copied_gib * GIB), threads)
    report(f"copies and hashes over {options.copied_gib:g} GiB, GB/s by threads", result["anonymous"])
    for gib in options.gib:
        for pages in options.pages:
            result[f"{gib:g} GiB, {pages}"] = found = measure_pages(gib, pages)
            report(f"{gib:g} GiB, {pages} pages", found)
            save(path, result)
    save(path, result)
    say(f"\nwritten to {path}")


if __name__ == "__main__":
    main()
