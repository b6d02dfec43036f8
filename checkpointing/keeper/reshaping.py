"""Replacing a worker's memory by one of another shape, without an instant in which no state is held.

Used on the keeper's loop thread only.
"""

from __future__ import annotations

from concurrent.futures import Future
from typing import TYPE_CHECKING

from checkpointing.keeper.arenas import Keep
from checkpointing.keeper.loop import Connection
from checkpointing.keeper.memory import available_bytes, check_fits, create_memfd
from checkpointing.keeper.protocol import KeeperRefused, Message
from checkpointing.schedule import Rules
from checkpointing.slots import Arena, ArenaShape

if TYPE_CHECKING:
    from checkpointing.keeper.service import Service


class Reshaping:
    """The former memory stays until the new one of all workers of the job holds a step, and comes back if they die
    before."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._dropped: list[Keep] = []  # still being read by a write to disk

    def take(self, connection: Connection, request: Message, fds: list[int]) -> None:
        service = self._service
        keep, shape = service.keep_of(connection), ArenaShape.from_list(request["shape"])
        if keep.former is not None:
            raise KeeperRefused(f"{keep.coordinate}: its memory is being replaced already")
        if keep.coordinate in service.allocating:
            raise KeeperRefused(f"{keep.coordinate}: its memory is being allocated already")
        pending = sum(service.allocating.values())
        former: Keep | None = keep
        if request["released"]:
            self._drop(keep)
            former = None
        elif pending + shape.nbytes > available_bytes():
            connection.answer(request, {"ok": True, "release": True})
            return
        try:
            check_fits(pending + shape.nbytes, f"{keep.coordinate}: changing its memory to {shape}")
        except KeeperRefused:
            self._forget(keep, request)
            raise
        service.allocating[keep.coordinate] = shape.nbytes

        def allocated(done: Future[int]) -> None:
            del service.allocating[keep.coordinate]
            if (problem := done.exception()) is not None:
                self._forget(keep, request)
                connection.answer(
                    request, {"error": str(problem), "refused": isinstance(problem, KeeperRefused)}
                )  # fmt: skip
                return
            self._replace(keep, Keep(keep.coordinate, Arena(done.result(), shape), former=former), request)
            service.event("reshaped", coordinate=keep.coordinate, bytes=shape.nbytes, both=former is not None)
            connection.answer(request, {"ok": True}, [service.keeps[keep.coordinate].arena.fd])

        service.in_background(lambda: create_memfd(keep.coordinate, shape.nbytes), allocated)

    def _forget(self, keep: Keep, request: Message) -> None:
        """Its memory was released for one that cannot be had: whoever attaches next gets memory of its own."""
        if request["released"]:
            del self._service.keeps[keep.coordinate]
            self._service.departure.arm()

    def _replace(self, keep: Keep, new: Keep, request: Message) -> None:
        _hand_over(keep, new)
        new.rules = Rules(**request["rules"])
        self._service.keeps[keep.coordinate] = new

    def settle(self, committed: int) -> None:
        """Free the former memory if the job can restore a step from the new."""
        if committed < 0:
            return
        for keep in self._service.keeps.values():
            if keep.former is not None:
                self._drop(keep.former)
                keep.former = None

    def undo(self) -> None:
        """The workers are gone: go back to the former memory, unless the new one holds a step of the job."""
        self.settle(self._service.committed())
        for keep in list(self._service.keeps.values()):
            if keep.former is not None:
                former, keep.former = keep.former, None
                _hand_over(keep, former)
                self._service.keeps[keep.coordinate] = former
                self._drop(keep)

    def sweep(self) -> None:
        """Free what was dropped while a write to disk was reading it."""
        dropped, self._dropped = self._dropped, []
        for keep in dropped:
            self._drop(keep)

    def _drop(self, keep: Keep) -> None:
        if any(slot.users for slot in keep.slots):
            self._dropped.append(keep)
            return
        for slot in keep.slots:
            slot.view.release()
        keep.arena.close()
        keep.slots = []


def _hand_over(keep: Keep, to: Keep) -> None:
    """All that a keep knows besides its memory and what that holds."""
    to.connection, keep.connection = keep.connection, None
    to.pid, to.attempt, to.finished = keep.pid, keep.attempt, keep.finished
    to.tensors, to.metadata, to.partitions = keep.tensors, keep.metadata, keep.partitions
