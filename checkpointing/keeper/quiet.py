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
        self._unsealed: list[Callable[[], None]] = []
        self._waiting: list[Callable[[], None]] = []

    def sealed(self, function: Callable[[], None]) -> None:
        """Call ``function`` once nothing is being sealed.

        A write may go on, slow or hung as the disk may be, since memory is the better tier; it deletes nothing.
        """
        self._unsealed.append(function)
        self.check()

    def then(self, function: Callable[[], None]) -> None:
        """Call ``function`` once nothing is being sealed or written, or after five minutes: a disk may hang."""
        self._waiting.append(function)
        self._service.loop.set_timer("quiet", _LONGEST_S, self._release)
        self.check()

    def check(self) -> None:
        if self.sealing:
            return
        unsealed, self._unsealed = self._unsealed, []
        if unsealed:
            self._service.persister.spare_old()
        for function in unsealed:
            function()
        if self._service.persister.idle:
            self._release()

    def _release(self) -> None:
        waiting, self._waiting = self._waiting, []
        self._service.loop.set_timer("quiet", None)
        for function in waiting:
            function()

    def answer(self, connection: Connection, request: Message, fds: list[int]) -> None:
        self.then(lambda: connection.answer(request, {"ok": True}))
