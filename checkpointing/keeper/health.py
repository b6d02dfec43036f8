"""What the disk does to writes, said in events while it happens: it fails, it is too slow, or it hangs."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_LONGEST_PAUSE_S = 300.0
_TIMER = "disk health"


@dataclass
class Writing:
    """A write that is under way: payload bytes written, of how many, and when something last happened."""

    step: int
    started: float
    moved: float
    written: int = 0
    total: int = 0
    said_slow: bool = False
    said_hung: bool = False


class DiskHealth:
    """Watches one write at a time and spaces out those that follow failures. All on the loop's thread but ``progress``.

    Attributes:
        hung_after_s: how long a write may stand still before ``disk_hung`` is said.
        problem: what the last write failed of, "" if it succeeded.
    """

    def __init__(self, set_timer: Callable[..., None], event: Callable[..., None]) -> None:
        self.hung_after_s = 60.0
        self.problem = ""
        self._set_timer, self._event = set_timer, event
        self._writing: Writing | None = None
        self._failures = 0
        self._not_before = 0.0
        self._put_off = -1

    def started(self, step: int) -> None:
        now = time.monotonic()
        self._writing = Writing(step, now, now)
        self._set_timer(_TIMER, self.hung_after_s, self._check)

    def progress(self, written: int, total: int) -> None:
        """From the writer's thread."""
        writing = self._writing
        if writing is not None:
            writing.written, writing.total, writing.moved = written, total, time.monotonic()

    def ended(self, problem: str) -> float:
        """Returns the seconds to wait before the next try: none after a success and after a first failure."""
        writing, self._writing, self.problem = self._writing, None, problem
        self._set_timer(_TIMER, None)
        if writing is not None and writing.said_hung:
            self._event("disk_resumed", writing.step, seconds=time.monotonic() - writing.started)
        self._failures = self._failures + 1 if problem else 0
        pause_s = min(2.0 ** (self._failures - 2), _LONGEST_PAUSE_S) if self._failures > 1 else 0.0
        self._not_before = time.monotonic() + pause_s
        return pause_s

    def ready(self, step: int) -> bool:
        """Whether a due step should be tried; if not, that is said once."""
        wait_s = self._not_before - time.monotonic()
        if wait_s > 0 and self._put_off < step:
            self._put_off = step
            self._event("disk_skipped", step, reason=f"the last {self._failures} writes failed ({self.problem}); "
                        f"the next try is not before {wait_s:.1f} s from now")  # fmt: skip
        return wait_s <= 0

    def behind(self, due: int) -> None:
        """A newer step is due while one is being written: the disk does not keep up with the recipe."""
        writing = self._writing
        if writing is not None and writing.step < due and not writing.said_slow:
            writing.said_slow = True
            seconds = time.monotonic() - writing.started
            self._event("disk_slow", writing.step, due=due, seconds=seconds, bytes=writing.written,
                        total=writing.total, bytes_per_s=round(writing.written / max(seconds, 1e-9)))  # fmt: skip

    def status(self) -> dict[str, Any]:
        writing = self._writing
        facts = {} if writing is None else {"step": writing.step, "written": writing.written, "total": writing.total,
                                            "seconds": time.monotonic() - writing.started,
                                            "hung": writing.said_hung}  # fmt: skip
        return {"writing": facts, "problem": self.problem, "failures": self._failures}

    def _check(self) -> None:
        writing = self._writing
        if writing is None:
            return
        still_s = time.monotonic() - writing.moved
        if still_s < self.hung_after_s:
            if writing.said_hung:
                writing.said_hung = False
                self._event("disk_resumed", writing.step, seconds=time.monotonic() - writing.started)
        elif not writing.said_hung:
            writing.said_hung = True
            self._event("disk_hung", writing.step, seconds=still_s, bytes=writing.written, total=writing.total)
        pause_s = self.hung_after_s - still_s if still_s < self.hung_after_s else self.hung_after_s
        self._set_timer(_TIMER, max(pause_s, 0.05), self._check)
