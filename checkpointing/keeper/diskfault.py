"""A drill's disk: too slow, full, or hung, where the real one is fine."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Mapping
from typing import Any


class DiskFault:
    """Strikes the writes of steps ``first`` to ``last`` (-1: all later ones), on the writer's thread.

    ``throttle``: no more than ``bytes_per_s``. ``full``: no space left, half-way. ``hang``: half-way nothing happens
    for ``seconds``.
    """

    def __init__(self, fields: Mapping[str, Any], sleep: Callable[[float], None] = time.sleep) -> None:
        self._kind = str(fields["kind"])
        self._first, self._last = int(fields.get("first", 0)), int(fields.get("last", -1))
        self._bytes_per_s = float(fields.get("bytes_per_s") or 0)
        self._seconds = float(fields.get("seconds") or 0)
        self._sleep = sleep
        self._hung_at = -1
        self._step, self._seen, self._since = -1, 0, 0.0

    @classmethod
    def parse(cls, fields: Mapping[str, Any] | None) -> DiskFault | None:
        return None if not fields else cls(fields)

    def strike(self, step: int, written: int, total: int) -> None:
        """Call it after each piece. Raises OSError if the disk is to be full."""
        if step < self._first or 0 <= self._last < step:
            return
        half = 2 * written >= total
        if self._kind == "throttle":
            self._slow_down(step, written)
        elif self._kind == "full" and half:
            raise OSError(errno.ENOSPC, "No space left on device (a drill)")
        elif self._kind == "hang" and half and self._hung_at != step:
            self._hung_at = step
            self._sleep(self._seconds)

    def _slow_down(self, step: int, written: int) -> None:
        if step != self._step:
            self._step, self._since, self._seen = step, time.monotonic(), 0
        self._seen = written
        ahead_s = self._seen / self._bytes_per_s - (time.monotonic() - self._since)
        if ahead_s > 0:
            self._sleep(ahead_s)
