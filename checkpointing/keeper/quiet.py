"""Waiting until the keeper changes nothing, so that what a recovering worker finds stays as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from checkpointing.keeper.loop import Connection
from checkpointing.keeper.protocol import Message

if TYPE_CHECKING:
    from checkpointing.keeper.service import Service

_LONGEST_S = 60.0  # well within the workers' deadline for loading


class Quiet:
    """On the loop's thread only.

    Attributes:
        sealing: how many captures are being sealed; each may become a write.
    """

    def __init__(self, service: Service) -> None:
        self.sealing = 0
        self._service = service
        self._waiting: list[tuple[Callable[[], None], bool]] = []

    def then(self, function: Callable[[], None], writes: bool = True) -> None:
        """Call ``function`` once nothing is being sealed and, with ``writes``, nothing is being written to disk.

        After a minute it is called all the same: a disk that hangs must not keep a run from going on.
        """
        self._waiting.append((function, writes))
        self._service.loop.set_timer("quiet", _LONGEST_S, lambda: self._release(True))
        self.check()

    def check(self) -> None:
        if not self.sealing:
            self._release(self._service.persister.idle)

    def _release(self, written: bool) -> None:
        ready = [function for function, writes in self._waiting if written or not writes]
        self._waiting = [] if written else [pair for pair in self._waiting if pair[1]]
        if not self._waiting:
            self._service.loop.set_timer("quiet", None)
        for function in ready:
            function()

    def answer(self, connection: Connection, request: Message, fds: list[int]) -> None:
        self.then(lambda: connection.answer(request, {"ok": True}))
