"""The keeper as watchman: it kills workers whose phase takes longer than the recipe allows.

A worker stopped by a signal, or stuck in a collective whose peer is, cannot help itself; its launcher sees it alive and
waits. Killed, it is started again like any dead worker.
"""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checkpointing.keeper.launch import process_start_time
from checkpointing.keeper.protocol import Message
from checkpointing.phases import POLL_S, Board, Stopwatch, Ticker

if TYPE_CHECKING:
    from checkpointing.keeper.service import Service


@dataclass
class Watched:
    coordinate: str
    pid: int
    pidfd: int
    stopwatch: Stopwatch

    def close(self) -> None:
        self.stopwatch.board.close()
        os.close(self.pidfd)


class Watch:
    """Used on the loop's thread only."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._watched: dict[int, Watched] = {}
        self._ticker = Ticker()

    def adopt(self, request: Message, fds: list[int]) -> None:
        """Watch an attaching worker by the board it brings, which is the last of the descriptors."""
        started = request.get("board")
        if started is None:
            return
        board, pid = Board(fds.pop()), request["pid"]
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            board.close()
            return
        if process_start_time(pid) != started:  # the number has passed to another process, or is of another namespace
            board.close()
            os.close(pidfd)
            self._service.event("worker_unwatched", pid=pid, coordinate=request["coordinate"])
            return
        self._drop(pid)
        board.beat()
        self._watched[pid] = Watched(request["coordinate"], pid, pidfd, Stopwatch(board))
        self._arm()

    def forget(self, pid: int) -> dict[str, Any]:
        """Stop watching; where the worker was is left as fields for an event."""
        watched = self._watched.get(pid)
        if watched is None:
            return {}
        posted = watched.stopwatch.board.read()
        self._drop(pid)
        return {"step": posted.step, "phase": posted.phase}

    def _drop(self, pid: int) -> None:
        watched = self._watched.pop(pid, None)
        if watched is not None:
            watched.close()

    def _arm(self) -> None:
        self._service.loop.set_timer("watch", POLL_S if self._watched else None, self._poll)

    def _poll(self) -> None:
        self._arm()
        elapsed = self._ticker.elapsed()
        for watched in self._watched.values():
            watched.stopwatch.board.beat()
        # Who waits for memory waits for us or for the disk, and its peers wait for it: nobody is stuck.
        if any(keep.waiting is not None for keep in self._service.keeps.values()):
            elapsed = 0.0
        overdue = {pid for pid, watched in self._watched.items() if watched.stopwatch.look(elapsed)}
        if overdue:
            # One that is stopped, but whose time is not up yet, is the reason why the others wait.
            for pid in overdue | {pid for pid in self._watched if is_stopped(pid)}:
                self._kill(self._watched[pid])

    def _kill(self, watched: Watched) -> None:
        posted, stopped = watched.stopwatch.board.read(), is_stopped(watched.pid)
        try:
            signal.pidfd_send_signal(watched.pidfd, signal.SIGKILL)
        except ProcessLookupError:
            self._drop(watched.pid)
            return
        self._service.event(
            "worker_stuck",
            posted.step,
            coordinate=watched.coordinate,
            pid=watched.pid,
            phase=posted.phase,
            seconds=round(watched.stopwatch.seconds, 2),
            allowed_s=posted.allowed_s,
            stopped=stopped,
        )
        watched.stopwatch.seconds = 0.0  # a process that is slow to die is not reported with every look


def is_stopped(pid: int) -> bool:
    """Whether a signal or a debugger has stopped the process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "Tt"
    except (OSError, IndexError):
        return False
