"""Which slots a worker may write next. Used on the keeper's loop thread only."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from checkpointing.keeper.arenas import Keep, Waiting
from checkpointing.keeper.loop import Connection
from checkpointing.keeper.protocol import KeeperRefused, Message
from checkpointing.records import Kind

if TYPE_CHECKING:
    from checkpointing.keeper.service import Service


class Grants:
    """Meets requests for slots, at once or when memory becomes free; until then the worker's capture waits."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def acquire(self, connection: Connection, request: Message, fds: list[int]) -> None:
        keep = self._service.keep_of(connection)
        if keep.waiting is not None:
            raise KeeperRefused(f"{keep.coordinate} waits for slots already")
        # Of the memory attached to now: whoever replaced it knows of no step until all hold one there.
        self._service.reshaping.settle(request["committed"])
        keep.waiting = Waiting(connection, request, time.monotonic())
        if not self._grant(keep):
            self._service.event("backpressure", request["step"], coordinate=keep.coordinate,
                       slots=[f"{s.kind.name} {s.state.name} {s.step}" for s in keep.slots])  # fmt: skip

    def _grant(self, keep: Keep) -> bool:
        """Meet a waiting request if it can be met. A queued persist gives way, a running one does not.

        A request asks for so many base slots and says how few it can do with: a whole capture for the disk becomes an
        ordinary one when an earlier write still holds the memory.
        """
        waiting = keep.waiting
        if waiting is None:
            return True
        request = waiting.request
        committed = max(request["committed"], self._service.committed())
        others = [Kind(kind) for kind in request["others"]]
        bases = request["bases"]
        chosen = keep.choose([Kind.BASE] * bases + others, committed)
        if chosen is None and request["least"] < bases:
            bases = request["least"]
            chosen = keep.choose([Kind.BASE] * bases + others, committed)
        # Unless its memory is all that the last write of a leaving keeper has.
        if chosen is None and not self._service.departure.reason:
            chosen = keep.choose([Kind.BASE] * bases + others, committed, self._service.persister.queued_slots())
            if chosen is not None:
                self._service.persister.drop_queued("its memory is needed for the next capture")
        if chosen is None:
            return False
        if bases < request["bases"]:
            self._service.persister.health.behind(request["step"])
            self._service.event("disk_skipped", request["step"], coordinate=keep.coordinate,
                       reason="an earlier write still holds the memory that a whole capture needs")  # fmt: skip
        keep.waiting = None
        self._service.sequence += 1
        keep.grant(chosen, request["step"], self._service.sequence)
        waited = time.monotonic() - waiting.since
        slots = [slot.index for slot in chosen]
        waiting.connection.answer(
            request, {"ok": True, "bases": slots[:bases], "others": slots[bases:], "sequence": self._service.sequence,
                      "waited_s": waited}
        )  # fmt: skip
        return True

    def serve(self) -> None:
        """Try again for all that wait: something may have become free."""
        for keep in self._service.keeps.values():
            self._grant(keep)
