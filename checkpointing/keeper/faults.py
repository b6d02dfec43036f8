"""Named places in the keeper's work where a drill can strike (no torch here).

seal      a record is COPIED, its checksum not yet written
between   one coordinate's record is held back until another's of the same step or later is sealed
sealed    a record is SEALED, its worker not yet answered
disk      half of a checkpoint's bytes are written
rename    a checkpoint's files and manifest are on disk, the rename that makes it exist is not done
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

POINTS = ("seal", "between", "sealed", "disk", "rename")
_KEEPER = -1
_HELD_S = 30.0


@dataclass(frozen=True)
class Fault:
    """SIGKILL ``pids`` (-1 is the keeper) when the work of ``coordinate`` at or after ``step`` reaches ``at``. Once.

    The points ``disk`` and ``rename`` are of all coordinates together.
    """

    at: str
    step: int
    coordinate: str
    pids: tuple[int, ...]

    @classmethod
    def parse(cls, coordinate: str, kill: Mapping[str, Any]) -> Fault:
        """From the attach message: ``{"at": POINT, "step": N, "pids": [pid or "keeper", ...]}``."""
        pids = tuple(_KEEPER if pid == "keeper" else int(pid) for pid in kill["pids"])
        return cls(str(kill["at"]), int(kill["step"]), coordinate, pids)


class Faults:
    """What is armed, and carries it out. Thread-safe.

    Args:
        event: writes a row of the run's events: ``event(kind, step, **fields)``.
    """

    def __init__(self, event: Callable[..., None]) -> None:
        self._event = event
        self._armed: dict[str, Fault] = {}
        self._newest: dict[str, int] = {}  # coordinate -> newest sealed step, while anything is armed
        self._changed = threading.Condition()
        self._audited = False

    def arm(self, coordinate: str, kill: Mapping[str, Any] | None) -> None:
        """The drill that a worker brings, in place of what an earlier attempt's brought."""
        with self._changed:
            self._armed.pop(coordinate, None)
            self._newest.pop(coordinate, None)
            if kill:
                self._armed[coordinate] = Fault.parse(coordinate, kill)
        if kill and kill["at"] == "rename" and not self._audited:
            self._audited = True
            sys.addaudithook(self._on_audit)

    def reached(self, point: str, step: int, coordinate: str | None = None) -> None:
        """Strike if this is the place; None stands for every coordinate."""
        if not self._armed:
            return
        with self._changed:
            if point == "sealed" and coordinate is not None:
                self._newest[coordinate] = max(step, self._newest.get(coordinate, -1))
                self._changed.notify_all()
            due = [f for f in self._armed.values()
                   if f.at == point and step >= f.step and coordinate in (None, f.coordinate)]  # fmt: skip
            for fault in due:
                del self._armed[fault.coordinate]
        for fault in due:
            self._strike(fault, step)

    def before_seal(self, step: int, coordinate: str) -> None:
        """Points ``seal`` and ``between``, on the thread that is about to write a checksum."""
        self.reached("seal", step, coordinate)
        fault = self._armed.get(coordinate)
        if fault is None or fault.at != "between" or step < fault.step:
            return
        with self._changed:
            self._changed.wait_for(lambda: self._others_sealed(step, coordinate), _HELD_S)
        self.reached("between", step, coordinate)

    def _others_sealed(self, step: int, coordinate: str) -> bool:
        return any(other != coordinate and newest >= step for other, newest in self._newest.items())

    def _on_audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "os.rename" and self._armed:
            source = os.path.basename(os.fspath(arguments[0]))
            if source.startswith("step-") and source.endswith(".tmp"):
                self.reached("rename", int(source[len("step-") : -len(".tmp")]))

    def _strike(self, fault: Fault, step: int) -> None:
        self._event("kill", step, at=fault.at, coordinate=fault.coordinate, pids=list(fault.pids))
        for pid in sorted(fault.pids, reverse=True):  # the keeper last: it is the one that strikes
            os.kill(os.getpid() if pid == _KEEPER else pid, signal.SIGKILL)
