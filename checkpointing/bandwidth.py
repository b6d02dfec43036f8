"""How fast this machine copies and hashes, measured in a fraction of a second.

Meant to be called by all workers of a machine at once, since they share its memory and its cores when it matters. The
disk is not measured: a hung one would keep the run from starting, and no schedule in memory depends on it; the keeper's
writes say how fast it is.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from statistics import median

from xxhash import xxh3_128_digest

from checkpointing.cost import Bandwidths

_REPEATS = 3
_CPUS_PER_HASHER = 4
_MOST_HASHERS = 8


def keeper_hashers(workers: int = 1) -> int:
    """The keeper's threads for checksums, as the share of one of ``workers`` on this machine; at least one.

    A quarter of the CPUs. With half of them, all cores of a machine with two hardware threads a core are busy, the ones
    that launch kernels too: a launch-bound loop on an H100 and 16 CPUs lost 17 to 23 %, with a quarter nothing.
    """
    return max(1, min(_MOST_HASHERS, (os.cpu_count() or 1) // _CPUS_PER_HASHER) // workers)


def measure(
    hash_threads: int = 1, nbytes: int = 128 << 20, device_to_host: Callable[[int], float] | None = None
) -> Bandwidths:
    """Medians of three; memory is touched before it is timed.

    Args:
        hash_threads: of the keeper's, this worker's share.
        nbytes: of each buffer; larger than the caches.
        device_to_host: seconds that copying so many bytes from the device takes; None where state lies in host memory.
    """
    source, target = bytearray(b"\xa5") * nbytes, bytearray(b"\x5a") * nbytes
    view, into = memoryview(source), memoryview(target)

    def copy() -> None:
        into[:] = view

    piece = nbytes // hash_threads
    pieces = [view[i * piece : (i + 1) * piece] for i in range(hash_threads)]
    with ThreadPoolExecutor(hash_threads) as pool:
        hash_s = _typical(lambda: list(pool.map(xxh3_128_digest, pieces)))
    copy_s = _typical(copy)
    link = None if device_to_host is None else nbytes / median(device_to_host(nbytes) for _ in range(_REPEATS))
    return Bandwidths(device_to_host=link, host_copy=nbytes / copy_s, hash=piece * hash_threads / hash_s)


def _typical(act: Callable[[], object]) -> float:
    """Seconds; the first run warms up."""
    times = []
    for _ in range(_REPEATS + 1):
        began = time.perf_counter()
        act()
        times.append(time.perf_counter() - began)
    return max(median(times[1:]), 1e-9)
