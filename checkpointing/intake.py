"""Records on their way into a restore: verified, and their slots pinned, ahead of whoever copies from them.

Registering memory is the slowest part of a restore on a GPU and cannot be done by several threads at once, so it should
never wait: it begins before it is known for certain what will be read, and everything else happens beside it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

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
    """Verifies records and pins their slots in the background, in the order in which they were wanted.

    One thread verifies, with others that hash, and thereby maps the pages, which are then registered in a third of the
    time; another pins what is verified. A context manager: at its end nothing is under way.

    Args:
        coordinate: whose slots are pinned; records of others are only verified.
        pin: registers a slot.
    """

    def __init__(self, coordinate: str, pin: Callable[[int], None]) -> None:
        self._coordinate, self._pin = coordinate, pin
        self._hashers = ThreadPoolExecutor(min(16, os.cpu_count() or 1), "hashing")
        self._verifier = ThreadPoolExecutor(1, "verifying")
        self._pinner = ThreadPoolExecutor(1, "pinning")
        self._ready: dict[Place, Future[Verified]] = {}

    def want(self, places: Iterable[Place], arenas: Mapping[str, Arena]) -> None:
        """Begin with what was not wanted before, behind that."""
        for place in places:
            if place not in self._ready:
                source, slot = place
                verified = self._verifier.submit(self._verified, place, arenas[source].slots[slot])
                self._ready[place] = self._pinner.submit(self._pinned, place, verified)

    def payload(self, record: RecordInfo) -> memoryview:
        """Wait until a wanted record is verified and its slot pinned.

        Raises RecoveryError if its bytes are damaged or are another record's, KeeperError if pinning is refused.
        """
        header, payload = self._ready[record.source, record.slot].result()
        if (header.kind, header.step, header.sequence) != (record.kind, record.step, record.sequence):
            raise RecoveryError(
                f"{record.source}, slot {record.slot}: holds the {header.kind.name.lower()} record of step "
                f"{header.step}, not that of step {record.step}; start again"
            )
        return payload

    def close(self) -> None:
        """Begin nothing more, and wait for the one slot that is being verified and the one that is being pinned."""
        pools = (self._pinner, self._verifier, self._hashers)
        for pool in pools[:2]:
            pool.shutdown(wait=False, cancel_futures=True)
        for pool in pools:
            pool.shutdown()

    def __enter__(self) -> Intake:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _verified(self, place: Place, view: memoryview) -> Verified:
        try:
            header = verify(view, self._hashers)
        except RecordError as error:
            raise RecoveryError(f"{place[0]}, slot {place[1]}: {error}") from error
        return header, payload_of(view, header)

    def _pinned(self, place: Place, verified: Future[Verified]) -> Verified:
        found = verified.result()
        if place[0] == self._coordinate:
            self._pin(place[1])
        return found


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
