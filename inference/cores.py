"""How many threads can compute at once. No torch here."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path


def cpu_cores(groups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """The cores that this process may run on, or the whole ones that its control group is given time for, if fewer.

    Args:
        groups, own: where control groups lie, and which is this process's; v2 and v1.
    """
    return min([len(os.sched_getaffinity(0)), *(max(int(cores), 1) for cores in _quotas(groups, own))])


def last_cache_bytes(caches: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> int:
    """Of the largest cache before memory; 0 if the system does not say."""
    sizes = [file.read_text().strip() for file in caches.glob("index*/size")]
    return max((int(size[:-1]) << 10 for size in sizes if size[-1:] == "K" and size[:-1].isdigit()), default=0)


def _quotas(groups: Path, own: Path) -> Iterator[float]:
    """In cores, of this process's control group and of all above it."""
    for line in own.read_text().splitlines() if own.exists() else []:
        _, controllers, path = line.split(":", 2)
        root = groups if controllers == "" else groups / "cpu"
        if controllers and "cpu" not in controllers.split(","):
            continue
        folder = root / path.lstrip("/")
        for group in [folder, *folder.parents]:
            if group.is_relative_to(root) and (cores := _quota(group)) is not None:
                yield cores


def _quota(group: Path) -> float | None:
    try:
        if (group / "cpu.max").exists():
            quota, period = (group / "cpu.max").read_text().split()
        else:
            quota, period = ((group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return int(quota) / int(period) if int(quota) > 0 else None
    except (OSError, ValueError, ZeroDivisionError):  # none is given, or "max"
        return None
