"""Threads that share out products too small to be computed by several threads each.

A product of one row is computed by one thread (ATen and MKL do not split it), and one of few rows is over before a
second thread has woken up; while other processes want the cores, waiting for that thread costs far more than the
product. So each lane, one for each of torch's threads, computes whole products by itself, other ones than its
neighbours. What is computed, and its bits, does not depend on which lane does it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch

WORTHWHILE = 1 << 21  # bytes of weights to read, below which handing over work costs more than it saves


class Lanes:
    """Runs shares of a list of work at once: the caller's thread is one lane, the others wait in a pool."""

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._size = 0
        self._around = threading.local()  # .threads: of a thread that is alone, how many it had

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Operations of this thread do not call others for help; those that are run in lanes still share out."""
        threads = torch.get_num_threads()
        if threads == 1:
            yield
            return
        self._around.threads = threads
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
            self._around.threads = None

    def run(self, function: Callable[[Any], object], items: Sequence[Any], nbytes: int) -> None:
        """``function`` of all items, or of a share of them in each lane if there are ``nbytes`` to read.

        Each product in it is computed by one thread. Shares follow each other in the list and differ by one at most.
        """
        threads = getattr(self._around, "threads", None)
        if threads is None and torch.get_num_threads() > 1:
            with self.alone():
                self.run(function, items, nbytes)
            return
        lanes = min(threads or 1, len(items))
        if lanes < 2 or nbytes < WORTHWHILE:
            function(items)
            return
        ends = [len(items) * lane // lanes for lane in range(lanes + 1)]
        shares = [items[start:end] for start, end in pairwise(ends)]
        guarded = torch.is_inference_mode_enabled()
        waiting = [self._threads(lanes - 1).submit(_elsewhere, function, share, guarded) for share in shares[1:]]
        try:
            function(shares[0])
        finally:
            failures = [future.exception() for future in waiting]
        for failure in failures:
            if failure is not None:
                raise failure

    def _threads(self, count: int) -> ThreadPoolExecutor:
        if self._pool is None or count > self._size:
            if self._pool is not None:
                self._pool.shutdown(wait=False)
            self._pool, self._size = ThreadPoolExecutor(count, "lane"), count
        return self._pool


LANES = Lanes()


def _elsewhere(function: Callable[[Any], object], share: Sequence[Any], guarded: bool) -> None:
    if torch.get_num_threads() > 1:  # of this thread only
        torch.set_num_threads(1)
    with torch.inference_mode(guarded):
        function(share)
