"""What the keeper holds: nothing of it is reported or adopted that does not match its checksum now."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from xxhash import xxh3_64_hexdigest

from checkpointing.keeper.arenas import Keep, Slot
from checkpointing.keeper.loop import Connection
from checkpointing.keeper.protocol import KeeperRefused, Message
from checkpointing.records import PAGE, Header, RecordError, decode_table, read_header, verify

if TYPE_CHECKING:
    from checkpointing.keeper.service import Service


class Inventory:
    def __init__(self, service: Service) -> None:
        self._service = service
        # (coordinate, slot) -> (record's sequence, attempt it was verified for): ranks that restart together share one
        # verification, the next restart verifies anew.
        self._verified: dict[tuple[str, int], tuple[int, int]] = {}
        self._sound: set[str] = set()  # digests of tables that a worker can read
        self._running: dict[tuple[str, int], list[Callable[[], None]]] = {}
        # More than seals take beside training: while this proves something for a recovery, nobody trains.
        self._provers = ThreadPoolExecutor(max(1, min(16, (os.cpu_count() or 1) // 2)), "prove")

    def take(self, connection: Connection, request: Message, fds: list[int]) -> None:
        """Answer with all sealed records of all coordinates, re-verified, and the newest step known to be on disk.
        Equal tables are sent once.

        Not while a capture is being sealed: it may be what makes a step complete.
        """
        self._service.quiet.then(lambda: self._take(connection, request), writes=False)

    def give_arena(self, connection: Connection, request: Message, fds: list[int]) -> None:
        keep = self._service.keeps.get(request["coordinate"])
        if keep is None:
            raise KeeperRefused(f"this keeper has no memory of {request['coordinate']}")
        connection.answer(request, {"ok": True, "shape": keep.shape.as_list()}, [keep.arena.fd])

    def status(self, connection: Connection, request: Message, fds: list[int]) -> None:
        keeps = {
            keep.coordinate: {"attached": keep.connection is not None, "pid": keep.pid, "steps": sorted(keep.steps())}
            for keep in self._service.keeps.values()
        }
        persister = self._service.persister
        writing = persister.running.step if persister.running is not None else None
        disk = persister.health.status() | {"place": str(persister.directory)}
        connection.answer(request, {"ok": True, "keeps": keeps, "writing": writing, "disk": disk})

    def verify_ahead(self) -> None:
        """A worker died: verify what the next attempt will ask for, while its workers still start."""
        for keep in self._service.keeps.values():
            slots = [slot for slot in keep.slots if slot.sealed]
            self.check(keep, slots, self._service.attempt + 1, lambda: None, self._provers)

    def _take(self, connection: Connection, request: Message) -> None:
        attempt = max((k.attempt for k in self._service.keeps.values() if k.connection is connection), default=0)
        pending = {"count": 1}

        def one_done() -> None:
            pending["count"] -= 1
            if not pending["count"]:
                self._answer(connection, request)

        for keep in list(self._service.keeps.values()):
            pending["count"] += 1
            self.check(keep, [slot for slot in keep.slots if slot.sealed], attempt, one_done, self._provers)
        one_done()

    def check(
        self, keep: Keep, slots: Iterable[Slot], attempt: int, done: Callable[[], None], hashers: Executor
    ) -> None:
        """Verify sealed slots in the background, quarantine corrupt ones, then call ``done`` on the loop's thread."""
        stale = [s for s in slots if self._verified.get((keep.coordinate, s.index)) != (s.sequence, attempt)]
        left = {"count": len(stale)}

        def one_done() -> None:
            left["count"] -= 1
            if not left["count"]:
                done()

        if not stale:
            done()
        for slot in stale:
            self._check_slot(keep, slot, attempt, one_done, hashers)

    def _check_slot(self, keep: Keep, slot: Slot, attempt: int, done: Callable[[], None], hashers: Executor) -> None:
        key = (keep.coordinate, slot.index)
        if key in self._running:
            self._running[key].append(done)
            return
        self._running[key] = [done]
        slot.users += 1

        def checked(result: Future[Header]) -> None:
            problem = result.exception()
            step = slot.step
            slot.release()
            if problem is None:
                self._verified[key] = (slot.sequence, attempt)
            else:
                self._set_aside(keep, slot, step, problem)
                if not isinstance(problem, RecordError):
                    raise problem
            for callback in self._running.pop(key):
                callback()
            self._service.grants.serve()

        self._service.in_background(lambda: verify(slot.view, hashers), checked)

    def _set_aside(self, keep: Keep, slot: Slot, step: int, problem: BaseException) -> None:
        slot.quarantine()
        self._service.event("quarantined", step, tier="memory", coordinate=keep.coordinate, slot=slot.index,
                            problem=str(problem))  # fmt: skip

    def _answer(self, connection: Connection, request: Message) -> None:
        tables: dict[str, str] = {}
        records = []
        for keep in self._service.keeps.values():
            for slot in keep.slots:
                if not slot.sealed:
                    continue
                try:
                    header, table = _table_of(slot)
                    digest = xxh3_64_hexdigest(table)
                    if digest not in self._sound:
                        decode_table(table)
                        self._sound.add(digest)
                except (RecordError, ValueError, TypeError) as error:  # damaged since it was verified ahead
                    self._set_aside(keep, slot, slot.step, error)
                    continue
                tables[digest] = table.decode()
                records.append(
                    {
                        "source": keep.coordinate,
                        "slot": slot.index,
                        "kind": int(slot.kind),
                        "step": header.step,
                        "attempt": header.attempt,
                        "sequence": header.sequence,
                        "table": digest,
                    }
                )
        disk = self._service.persister.newest
        connection.answer(request, {"ok": True, "records": records, "tables": tables, "disk": disk})


def _table_of(slot: Slot) -> tuple[Header, bytes]:
    """Raises RecordError if the header is not what it was when the slot was sealed."""
    header = read_header(slot.view)
    if (header.kind, header.step) != (slot.kind, slot.step):
        raise RecordError(f"the header of step {slot.step}'s {slot.kind.name.lower()} record is of another record")
    return header, bytes(slot.view[PAGE : PAGE + header.table_bytes])
