"""Memory that no worker's death can remove: checked first, then really allocated."""

from __future__ import annotations

import ctypes
import mmap
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from checkpointing.keeper.protocol import TooLittleMemory

_GIB = 1 << 30
_MADV_POPULATE_WRITE = 23
_PREFAULT_PIECE = 256 << 20


def available_bytes() -> int:
    """What can still be allocated: the kernel's MemAvailable, and less if a control group limits us."""
    available = _meminfo("MemAvailable")
    for limit, used, reclaimable in _cgroup_figures():
        available = min(available, limit - used + reclaimable)
    return max(available, 0)


def total_bytes() -> int:
    """What there is in all, or what a control group gives us of it."""
    return min([_meminfo("MemTotal"), *(limit for limit, _, _ in _cgroup_figures())])


def _meminfo(name: str) -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) << 10
    return 1 << 62


def _cgroup_figures() -> list[tuple[int, int, int]]:
    """(limit, used, used but reclaimable) of this process's control group and all above it, cgroup v2 and v1."""
    figures = []
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, limit, used, cache = Path("/sys/fs/cgroup"), "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            root = Path("/sys/fs/cgroup/memory")
            limit, used, cache = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
        else:
            continue
        folder = root / path.lstrip("/")
        for group in [folder, *folder.parents]:
            if group.is_relative_to(root) and (found := _group_figures(group, limit, used, cache)):
                figures.append(found)
    return figures


def _group_figures(group: Path, limit: str, used: str, cache: str) -> tuple[int, int, int] | None:
    try:
        text = (group / limit).read_text().strip()
        if text == "max":
            return None
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return int(text), int((group / used).read_text()), int(stat.get(cache, 0))
    except (OSError, ValueError):
        return None


def check_fits(needed: int, what: str) -> None:
    """Raises TooLittleMemory with both figures if ``needed`` bytes are not available."""
    available = available_bytes()
    if needed > available:
        raise TooLittleMemory(
            f"{what} needs {needed:,} bytes ({needed / _GIB:.2f} GiB) of memory, {available:,} "
            f"({available / _GIB:.2f} GiB) are available; free memory, use fewer workers on this node, choose another "
            "checkpoint.wal.rotation, or set checkpoint.memory.enabled: false (two captures for the disk; none at all "
            "only with checkpoint.disk.every: 0 and checkpoint.disk.final: false, too)"
        )


def create_memfd(name: str, nbytes: int) -> int:
    """A memfd whose pages exist: a later write cannot fail, where a sparse one would kill the writer with SIGBUS."""
    fd = os.memfd_create(f"planaria-{name}", os.MFD_CLOEXEC)
    try:
        os.posix_fallocate(fd, 0, nbytes)
    except OSError as error:
        os.close(fd)
        raise TooLittleMemory(f"cannot allocate {nbytes:,} bytes for {name}: {error.strerror}") from error
    _prefault(fd, nbytes)
    return fd


def _prefault(fd: int, nbytes: int) -> None:
    """Have the kernel clear the pages now, on several threads: done on first use it would be slow and on one."""
    with mmap.mmap(fd, nbytes) as mapped, ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        view = (ctypes.c_char * nbytes).from_buffer(mapped)
        first = ctypes.addressof(view)
        starts = range(0, nbytes, _PREFAULT_PIECE)
        list(pool.map(lambda start: map_pages(first + start, min(_PREFAULT_PIECE, nbytes - start)), starts))
        del view


def map_pages(address: int, nbytes: int) -> None:
    """Map these bytes of a mapping for writing, and clear those that are new. Lets other threads run.

    Kernels before 5.14 lack the call; there pages are mapped on first use.
    """
    ctypes.CDLL(None).madvise(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), _MADV_POPULATE_WRITE)
