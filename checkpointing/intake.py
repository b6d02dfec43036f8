"""Records on their way into a restore: verified, and their slots pinned, ahead of whoever copies from them.

Registering memory is the slowest part of a restore on a GPU. Several threads at once take longer for it than one, and
whoever else calls the driver waits until a slot is registered. So it begins before it is known what will be read, while
nobody needs the device; once that is known, the thread that queues the copies registers slot by slot itself, and the
device copies meanwhile.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import suppress

from checkpointing.pinning import Pinning
from checkpointing.records import (
    Header,
    Kind,
    RecordError,
    RecordInfo,
    State,
    parts_of,
    payload_of,
    read_header,
    state_of,
    verify,
)
from checkpointing.recovery import RecoveryError
from checkpointing.schedule import Held, Rules, needed_for, restorable_steps
from checkpointing.slots import Arena

Place = tuple[str, int]  # (coordinate, slot)
Verified = tuple[Header, memoryview]


class Intake:
    """Verifies records in the background, in the order in which they are asked for, and pins their slots.

    Verifying also maps the pages, which are then registered in a third of the time. :meth:`close` it.

    Args:
        coordinate: whose slots are pinned; records of others are only verified.
        pinning: of that coordinate's arena; None if nothing is to be pinned.
    """

    def __init__(self, coordinate: str, pinning: Pinning | None) -> None:
        self._coordinate = coordinate
        self._pinning = pinning if pinning is not None and pinning.needed else None
        # Half of the cores ahead of the plan: the keeper may be proving the same records.
        cores = (os.cpu_count() or 1) // (1 if self._pinning is None else 2)
        self._hashers = ThreadPoolExecutor(max(1, min(16, cores)), "hashing")
        self._verifier = ThreadPoolExecutor(1, "verifying")
        self._pinner = ThreadPoolExecutor(1, "pinning ahead")
        self._records: dict[Place, Future[Verified]] = {}
        self._ahead: Future[None] | None = None
        self._known = False

    def begin(self, arena: Arena, rules: Rules) -> None:
        """Verify and pin what restoring the newest step of the coordinate's own arena would read, one after another.

        Does nothing where nothing is pinned.
        """
        if self._pinning is not None:
            slots = likely_slots(arena, rules)
            self._verify([(self._coordinate, slot) for slot in slots], {self._coordinate: arena})
            self._ahead = self._pinner.submit(self._pin_ahead, slots)

    def settle(self, places: Iterable[Place], arenas: Mapping[str, Arena]) -> None:
        """Now it is known what will be read, and in which order: verify what is still missing.

        What is not pinned yet will be by :meth:`payload`. Raises KeeperError if pinning was refused.
        """
        self._known = True
        self._verify(places, arenas)
        if self._ahead is not None:
            self._ahead.result()

    def payload(self, record: RecordInfo) -> memoryview:
        """Wait until a record is verified, and pin its slot unless it is.

        Raises RecoveryError if its bytes are damaged or another record's, KeeperError if pinning is refused.
        """
        header, payload = self._records[record.source, record.slot].result()
        if (header.kind, header.step, header.sequence) != (record.kind, record.step, record.sequence):
            raise RecoveryError(
                f"{record.source}, slot {record.slot}: holds the {header.kind.name.lower()} record of step "
                f"{header.step}, not that of step {record.step}; start again"
            )
        if self._pinning is not None and record.source == self._coordinate:
            self._pinning.pin(record.slot)
        return payload

    def close(self) -> None:
        """Begin nothing more, and wait for the slot that is being verified and the one that is being pinned."""
        self._known = True
        pools = (self._pinner, self._verifier, self._hashers)
        for pool in pools[:2]:
            pool.shutdown(wait=False, cancel_futures=True)
        for pool in pools:
            pool.shutdown()

    def _verify(self, places: Iterable[Place], arenas: Mapping[str, Arena]) -> None:
        for place in places:
            if place not in self._records:
                view = arenas[place[0]].slots[place[1]]
                self._records[place] = self._verifier.submit(self._verified, place, view)

    def _verified(self, place: Place, view: memoryview) -> Verified:
        try:
            header = verify(view, self._hashers)
        except RecordError as error:
            raise RecoveryError(f"{place[0]}, slot {place[1]}: {error}") from error
        return header, payload_of(view, header)

    def _pin_ahead(self, slots: Sequence[int]) -> None:
        assert self._pinning is not None
        for slot in slots:
            # A damaged record is no concern here: whoever needs it will be told. Not futures.wait, which would wait for
            # ever for one that close() has cancelled.
            with suppress(CancelledError):
                self._records[self._coordinate, slot].exception()
            if self._known:
                return
            self._pinning.pin(slot, giving_way=True)


def likely_slots(arena: Arena, rules: Rules) -> list[int]:
    """The slots that restoring the newest step of an arena would read, in the order of reading, as their headers say.

    A guess at what the plan will be: nothing has been verified, and other workers may lack that step.
    """
    held: dict[int, Held] = {}
    for slot, view in enumerate(arena.slots):
        if state_of(view) is not State.SEALED:
            continue
        try:
            header = read_header(view)
            held[slot] = Held(header.kind, header.step, parts_of(view, header))
        except RecordError:
            continue
    newest = max(restorable_steps(held.values(), rules), default=None)
    if newest is None:
        return []
    needed = needed_for(held.values(), newest, rules)
    order = {Kind.EXTRAS: (0, 0), Kind.LOG: (1, 0), Kind.BASE: (1, 1)}
    found = [slot for slot, record in held.items() if record in needed]
    return sorted(found, key=lambda s: (order[held[s].kind][0], held[s].step, order[held[s].kind][1], s))
