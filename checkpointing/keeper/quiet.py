"""Waiting until the keeper changes nothing, so that what a recovering worker finds stays as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from checkpointing.keeper.loop import Connection
from checkpointing.keeper.protocol import Message

if TYPE_CHECKING:
    from checkpointing.keeper.service import Service

_LONGEST_S = 300.0


class Quiet:
    """On the loop's thread only.

    Attributes:
        sealing: how many captures are being sealed; each may become a write.
    """

    def __init__(self, service: Service) -> None:
        self.sealing = 0
        self._service = service
        self._waiting: list[Callable[[], None]] = []

    def then(self, function: Callable[[], None]) -> None:
        """Call ``function`` once nothing is being sealed or written.

        After five minutes it is called all the same: a disk that hangs must not keep memory from being recovered.
        """
        self._waiting.append(function)
        self._service.loop.set_timer("quiet", _LONGEST_S, self._release)
        self.check()

    def check(self) -> None:
        if not self.sealing and self._service.persister.idle:
            self._release()

    def _release(self) -> None:
        waiting, self._waiting = self._waiting, []
        self._service.loop.set_timer("quiet", None)
        for function in waiting:
            function()

    def answer(self, connection: Connection, request: Message, fds: list[int]) -> None:
        self.then(lambda: connection.answer(request, {"ok": True}))
