"""When the keeper ends: after a finish, a stop, a SIGTERM, or too long without workers.

It never ends with the only copy of a state that was to be on disk: if that write fails, it says so and stays, and tries
again as long as no worker comes back for its memory.
"""

from __future__ import annotations

import traceback
from typing import TYPE_CHECKING

from checkpointing.keeper.loop import Connection
from checkpointing.keeper.protocol import Message

if TYPE_CHECKING:
    from checkpointing.keeper.service import Service

# The workers of whoever started it still have to import torch and to read their data before they attach.
_FIRST_LINGER_S = 60.0
_REFUSED_LINGER_S = 1.0
_LONGEST_RETRY_S = 300.0
_NO_WORKERS = "no workers"
_SEALING_POLL_S = 0.02


class Departure:
    """Decides when the loop stops. Used on the loop's thread only.

    Attributes:
        reason: why the keeper is about to end; empty while it is not.
    """

    def __init__(self, service: Service) -> None:
        self.reason = ""
        self._service = service
        self._finishing: list[tuple[Connection, Message]] = []
        self._stopping: list[tuple[Connection, Message]] = []
        self._retiring: list[tuple[Connection, Message]] = []
        self._had_workers = False
        self._failures = 0
        # The step that must be on disk before the end, -1 if none, and what is still wrong with that.
        self._step, self._problem = -1, ""

    def attached(self) -> None:
        """A worker came: whoever was only tired of waiting for one stays."""
        self._had_workers, self._failures = True, 0
        if self.reason == _NO_WORKERS:
            self.reason = ""
        self.arm()

    def closed(self, connection: Connection) -> None:
        self._finishing = [pair for pair in self._finishing if pair[0] is not connection]
        self._stopping = [pair for pair in self._stopping if pair[0] is not connection]
        self._retiring = [pair for pair in self._retiring if pair[0] is not connection]

    def arm(self, seconds: float | None = None) -> None:
        """Leave after so long (default: what the recipe asks for) unless a worker is attached."""
        service = self._service
        if seconds is None:
            seconds = service.linger_s if self._had_workers else max(service.linger_s, _FIRST_LINGER_S)
        attached = any(keep.connection is not None for keep in service.keeps.values())
        persist = service.disk is not None
        service.loop.set_timer("linger", None if attached else seconds, lambda: self.leave(_NO_WORKERS, persist))

    def refused(self) -> None:
        """There was no memory for a worker: with none at all there is nothing to stay for."""
        if not self._service.keeps:
            self.arm(_REFUSED_LINGER_S)

    def finish(self, connection: Connection, request: Message, fds: list[int]) -> None:
        self._service.keep_of(connection).finished = True
        self._finishing.append((connection, request))
        keeps = self._service.keeps
        if all(c in keeps and keeps[c].finished for c in self._service.local):
            self.leave("finished", any(r["persist"] for _, r in self._finishing))

    def stop(self, connection: Connection, request: Message, fds: list[int]) -> None:
        self._stopping.append((connection, request))
        self.leave("stop", request.get("persist", True) and self._service.disk is not None)

    def retire(self, connection: Connection, request: Message, fds: list[int]) -> None:
        """The job was stopped: write the newest step and end. What has no disk tier stays in memory, and so do we.

        A step that is being sealed just now is waited for: its worker is dead, its bytes are here.
        """
        service = self._service
        if service.quiet.sealing:
            service.loop.set_timer("retire", _SEALING_POLL_S, lambda: self.retire(connection, request, fds))
            return
        service.reshaping.undo()
        newest = service.committed()
        if service.disk is None and newest >= 0:
            connection.answer(request, {"ok": True, "stays": True, "on_disk": -1, "in_memory": newest, "problem": ""})
            return
        self._retiring.append((connection, request))
        self.leave("retired", service.disk is not None)

    def leave(self, reason: str, persist: bool) -> None:
        """End once nothing is being written and, if ``persist``, the newest complete step is on disk."""
        if self.reason:
            return
        self.reason, self._step, self._problem = reason, -1, ""
        if persist:
            try:
                self._step = self._service.persist_newest()
                self._problem = "it was not written" if self._step >= 0 else ""
            except Exception as error:
                traceback.print_exc()
                self._problem = f"{type(error).__name__}: {error}"
        self.when_idle()

    def written(self, step: int, problem: str) -> None:
        """A write ended; ``problem`` is empty if the step is on disk."""
        if step == self._step:
            self._problem = problem

    def when_idle(self) -> None:
        """Go, if it is time to and nothing is being written; stay if the last step is not on disk."""
        if not self.reason or not self._service.persister.idle:
            return
        finishing, stopping, retiring = self._finishing, self._stopping, self._retiring
        self._finishing, self._stopping, self._retiring = [], [], []
        # The events tell it before the workers are told.
        if self._problem and self._service.lease.holds():
            self._stay()
        else:
            self._service.loop.stop()
        for connection, request in finishing:
            connection.answer(request, {"ok": True, "step": self._step, "problem": self._problem})
        for connection, request in stopping:
            connection.answer(request, self._answer_to_stop())
        for connection, request in retiring:
            connection.answer(request, self._answer_to_retire())

    def _answer_to_stop(self) -> Message:
        if not self._problem:
            return {"ok": True}
        return {"error": f"the keeper stays, because step {self._step} could not be written: {self._problem}"}

    def _answer_to_retire(self) -> Message:
        kept = bool(self._problem)
        on_disk, in_memory = (-1, self._step) if kept else (self._step, -1)
        return {"ok": True, "stays": kept, "on_disk": on_disk, "in_memory": in_memory, "problem": self._problem}

    def _stay(self) -> None:
        reason, self.reason = self.reason, ""
        retry_s = min(2.0**self._failures, _LONGEST_RETRY_S)
        self._failures += 1
        for keep in self._service.keeps.values():
            keep.finished = False
        self._service.event("keeper_stays", self._step, reason=reason, problem=self._problem)
        self.arm(retry_s)
