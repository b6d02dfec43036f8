"""The phase board: what a worker is doing, since when, and how long that may take, in memory that others read.

A worker posts a phase with a few stores, no system call. Whoever watches counts how long the board has not changed.
The board outlives the worker, so that afterwards it says where it died. (No torch here.)
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from dataclasses import dataclass

POLL_S = 0.25
_POSTED = struct.Struct("<qqq24s")  # step, since (ns of CLOCK_MONOTONIC), allowed (ns, 0: for ever), phase
_BEAT = struct.Struct("<q")  # when the node's keeper last looked (ns of CLOCK_MONOTONIC)
_NBYTES = 64
_KEPT_S = 8 * POLL_S


@dataclass(frozen=True)
class Posted:
    """One phase: ``allowed_s`` is how long it may take, 0 for ever; ``since`` is ``time.monotonic`` of its begin."""

    phase: str
    step: int
    since: float
    allowed_s: float


class Board:
    """One worker's board. Owns ``fd``, a memfd that others map, too."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._map = mmap.mmap(fd, _NBYTES)

    @classmethod
    def create(cls, name: str) -> Board:
        fd = os.memfd_create(f"planaria-board-{name}", os.MFD_CLOEXEC)
        os.ftruncate(fd, _NBYTES)
        return cls(fd)

    def post(self, phase: str, step: int, allowed_s: float) -> None:
        """Say that ``phase`` of ``step`` begins now and takes at most ``allowed_s`` (0: as long as it likes)."""
        _POSTED.pack_into(self._map, 0, step, time.monotonic_ns(), int(allowed_s * 1e9), phase.encode()[:24])

    def read(self) -> Posted:
        step, since, allowed, phase = _POSTED.unpack_from(self._map)
        return Posted(phase.rstrip(b"\0").decode(errors="replace"), step, since / 1e9, allowed / 1e9)

    def raw(self) -> bytes:
        """What is posted, uninterpreted: equal as long as the phase is the same."""
        return self._map[: _POSTED.size]

    def beat(self) -> None:
        """The keeper looks at this board now."""
        _BEAT.pack_into(self._map, _POSTED.size, time.monotonic_ns())

    @property
    def kept(self) -> bool:
        """Whether a keeper looked just now: then the launcher need not watch."""
        (looked,) = _BEAT.unpack_from(self._map, _POSTED.size)
        return bool(looked) and time.monotonic() - looked / 1e9 < _KEPT_S

    def close(self) -> None:
        if self.fd >= 0:
            self._map.close()
            os.close(self.fd)
            self.fd = -1


class Stopwatch:
    """Counts the seconds that a board has not changed, by what its owner says has passed.

    Not by the board's own clock: time in which the watcher itself did not run (a suspended machine, a debugger) or in
    which the worker waits for the watcher is no fault of the worker. Nor can a half-written board be misread: what
    counts as overdue has stayed the same over many looks.
    """

    def __init__(self, board: Board) -> None:
        self.board = board
        self.seconds = 0.0
        self._seen = b""

    def look(self, elapsed_s: float) -> Posted | None:
        """After ``elapsed_s`` more: the phase that has taken longer than it may, or None."""
        seen = self.board.raw()
        self.seconds = self.seconds + elapsed_s if seen == self._seen else 0.0
        self._seen = seen
        posted = self.board.read()
        return posted if posted.allowed_s and self.seconds > posted.allowed_s else None


class Ticker:
    """How much of the time between two looks counts: at most a few polls, so that a watcher's own pause does not."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def elapsed(self) -> float:
        now = time.monotonic()
        elapsed, self._last = now - self._last, now
        return min(elapsed, 4 * POLL_S)
