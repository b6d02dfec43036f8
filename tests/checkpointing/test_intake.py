"""What a restore reads is verified and pinned ahead of the plan, and never used, lost or left pinned by mistake."""

from __future__ import annotations

import os
import threading
from contextlib import closing
from dataclasses import replace

import pytest

from checkpointing import intake as module
from checkpointing.intake import Intake, likely_slots
from checkpointing.keeper.protocol import KeeperError
from checkpointing.pinning import Pinning
from checkpointing.records import (
    PAGE,
    Entry,
    Header,
    Kind,
    RecordInfo,
    begin,
    encode_table,
    extras_entries,
    finish,
    seal,
)
from checkpointing.recovery import RecoveryError
from checkpointing.schedule import Rules
from checkpointing.slots import Arena, ArenaShape, Pool
from checkpointing.units import Range
from tests.checkpointing.driver import Until

OWN, SIZE = "dp0000", 4 * PAGE


@pytest.fixture
def arena():
    shape = ArenaShape(Pool(4, PAGE, 2 * PAGE), Pool(3, PAGE, 2 * PAGE), 3)
    fd = os.memfd_create("test")
    os.ftruncate(fd, shape.nbytes)
    made = Arena(fd, shape)
    yield made
    made.close()


def write(arena: Arena, slot: int, kind: Kind, step: int, part: int = 0, sealed: bool = True) -> RecordInfo:
    view = arena.slots[slot]
    entries = (Entry(Range("w", "master", 8 * part, 8 * part + 8), "float32", 0, 32),)
    entries = extras_entries({"rng": bytes(8)}) if kind is Kind.EXTRAS else entries
    table = encode_table(entries, [part])
    begin(view)
    view[2 * PAGE : 2 * PAGE + 64] = bytes([step]) * 64
    finish(view, Header(kind, step, 0, step, len(table), 2 * PAGE, 64), table)
    if sealed:
        seal(view)
    return RecordInfo(OWN, kind, step, 0, step, entries, slot)


def rotation_of_two(arena: Arena) -> dict[int, RecordInfo]:
    """Steps 3 and 4 of two parts in rotation, with older records that nothing needs; slot -> record."""
    return {
        0: write(arena, 0, Kind.BASE, 4, part=0),
        1: write(arena, 1, Kind.BASE, 2, part=0),
        2: write(arena, 2, Kind.BASE, 3, part=1),
        4: write(arena, 4, Kind.LOG, 4),
        5: write(arena, 5, Kind.LOG, 3),
        7: write(arena, 7, Kind.EXTRAS, 3),
        8: write(arena, 8, Kind.EXTRAS, 4),
    }


def test_what_the_newest_step_needs_is_guessed_in_the_order_of_reading(arena):
    rotation_of_two(arena)
    assert likely_slots(arena, Rules(2)) == [8, 2, 4, 0]
    arena.slots[8][0] ^= 1  # no record any more
    assert likely_slots(arena, Rules(2)) == [7, 1, 5, 2]
    write(arena, 2, Kind.BASE, 3, part=1, sealed=False)  # the keeper is still at it
    assert likely_slots(arena, Rules(2)) == []


def test_slots_are_pinned_in_order_and_verified_before(arena, pinning_of, monkeypatch):
    rotation_of_two(arena)
    pinning, driver = pinning_of(arena)
    slots = {id(view): slot for slot, view in enumerate(arena.slots)}
    real = module.verify

    def verify(view, pool):
        header = real(view, pool)
        driver.events.append(("verified", slots[id(view)]))
        return header

    monkeypatch.setattr(module, "verify", verify)
    with closing(Intake(OWN, pinning)) as intake:
        intake.begin(arena, Rules(2))
        intake._ahead.result(20)
    assert [slot for what, slot in driver.events if what == "pin"] == [8, 2, 4, 0]
    for slot in (8, 2, 4, 0):
        assert driver.events.index(("verified", slot)) < driver.events.index(("pin", slot))


def test_once_the_plan_is_known_whoever_copies_pins(arena, pinning_of):
    records = rotation_of_two(arena)
    pinning, driver = pinning_of(arena)
    with closing(Intake(OWN, pinning)) as intake:
        driver.hold[2] = Until(lambda: intake._known)
        intake.begin(arena, Rules(2))
        for _ in range(2):
            assert driver.begun.acquire(timeout=20)
        intake.settle([(OWN, slot) for slot in (8, 2, 4, 0)], {OWN: arena})
        assert [slot for _, slot in driver.events] == [8, 2]  # the one that was under way, and no more
        for slot in (2, 4, 0):
            assert bytes(intake.payload(records[slot])[:1]) == bytes([records[slot].step])
            driver.events.append(("copy", slot))
    assert driver.events[2:] == [("copy", 2), ("pin", 4), ("copy", 4), ("pin", 0), ("copy", 0)]


def test_nothing_is_registered_while_others_call_the_driver(arena, pinning_of):
    rotation_of_two(arena)
    pinning, driver = pinning_of(arena)
    driver.hold[8] = Until(lambda: pinning._pauses)
    with closing(Intake(OWN, pinning)) as intake:
        intake.begin(arena, Rules(2))
        assert driver.begun.acquire(timeout=20)
        with pinning.paused():
            intake._records[OWN, 0].result(20)  # all is verified, and could be pinned
            assert driver.events == [("pin", 8)]
            assert not driver.begun.acquire(blocking=False)
        intake._ahead.result(20)
    assert [slot for _, slot in driver.events] == [8, 2, 4, 0]


def test_a_refusal_reaches_whoever_restores(arena, pinning_of):
    records = rotation_of_two(arena)
    pinning, driver = pinning_of(arena)
    driver.refuses = {2}
    places = [(OWN, slot) for slot in (8, 2, 4, 0)]
    with closing(Intake(OWN, pinning)) as intake:
        intake.begin(arena, Rules(2))
        futures = intake._ahead
        assert isinstance(futures.exception(20), KeeperError)
        with pytest.raises(KeeperError, match="cudaHostRegister failed with CUDA error 2"):
            intake.settle(places, {OWN: arena})
    with closing(Intake(OWN, pinning)) as intake:  # refused only then
        intake.settle(places, {OWN: arena})
        with pytest.raises(KeeperError, match="cudaHostRegister failed with CUDA error 2"):
            intake.payload(records[2])


def test_damage_is_told_to_whoever_needs_the_record_and_to_nobody_else(arena, pinning_of):
    records = rotation_of_two(arena)
    arena.slots[2][2 * PAGE + 5] ^= 4
    pinning, driver = pinning_of(arena)
    with closing(Intake(OWN, pinning)) as intake:
        intake.begin(arena, Rules(2))
        intake._ahead.result(20)
        intake.settle([(OWN, slot) for slot in (8, 2, 4, 0)], {OWN: arena})
        assert intake.payload(records[4])
        with pytest.raises(RecoveryError, match=r"dp0000, slot 2: the base record of step 3 does not match"):
            intake.payload(records[2])
    assert driver.events


@pytest.mark.parametrize("other", [{"step": 2}, {"kind": Kind.LOG}, {"sequence": 3}])
def test_a_slot_that_holds_another_record_than_the_plan_says_is_refused(other, arena, pinning_of):
    records = rotation_of_two(arena)
    pinning, _ = pinning_of(arena)
    with closing(Intake(OWN, pinning)) as intake:
        intake.settle([(OWN, 0)], {OWN: arena})
        with pytest.raises(RecoveryError, match="slot 0: holds the base record of step 4, not that of step"):
            intake.payload(replace(records[0], **other))


def test_records_of_another_worker_are_verified_and_not_pinned(arena, pinning_of):
    records = rotation_of_two(arena)
    pinning, driver = pinning_of(arena)
    with closing(Intake("dp0001", pinning)) as intake:
        intake.settle([(OWN, 0)], {OWN: arena})
        assert intake.payload(records[0])
    assert not driver.events


def test_closed_in_the_middle_nothing_goes_on(arena, pinning_of):
    rotation_of_two(arena)
    pinning, driver = pinning_of(arena)
    intake = Intake(OWN, pinning)
    driver.hold[8] = Until(lambda: intake._known)
    intake.begin(arena, Rules(2))
    assert driver.begun.acquire(timeout=20)
    intake.close()
    assert driver.events == [("pin", 8)]
    assert not [t for t in threading.enumerate() if t.name.startswith(("pinning", "verifying", "hashing"))]


def test_closed_before_anything_is_verified_nothing_is_waited_for(arena, pinning_of):
    rotation_of_two(arena)
    pinning, driver = pinning_of(arena)
    intake, busy, waits = Intake(OWN, pinning), threading.Event(), threading.Event()
    intake._verifier.submit(busy.wait)
    pin_ahead = intake._pin_ahead
    intake._pin_ahead = lambda slots: waits.set() or pin_ahead(slots)
    intake.begin(arena, Rules(2))
    assert waits.wait(20)
    closing_it = threading.Thread(target=intake.close, daemon=True)
    closing_it.start()
    assert Until(intake._records[OWN, 0].cancelled).wait(20)
    busy.set()
    closing_it.join(20)
    assert not closing_it.is_alive()
    assert all(record.cancelled() for record in intake._records.values())
    assert not driver.events


def test_the_rest_is_registered_once_after_what_a_recovery_read(arena, pinning_of):
    pinning, driver = pinning_of(arena)
    pinning.pin(2)
    driver.refuses = {5}
    pinning.pin_rest()
    pinning._rest.join(20)
    assert [slot for _, slot in driver.events] == [2, 0, 1, 3, 4]
    with pytest.raises(KeeperError, match=r"slot 5 of [\d,]+ bytes: cudaHostRegister failed .*ulimit -l"):
        pinning.pin(5)  # as a capture does
    driver.refuses.clear()
    pinning.pin(5)
    pinning._pin_all()
    assert [slot for _, slot in driver.events] == [2, 0, 1, 3, 4, 5, *range(6, len(arena.places))]


def test_the_arena_is_given_up_while_a_slot_is_being_pinned(arena, pinning_of):
    rotation_of_two(arena)
    pinning, driver = pinning_of(arena)
    giving_up = threading.Thread(target=pinning.close)
    driver.hold[8] = Until(giving_up.is_alive)
    with closing(Intake(OWN, pinning)) as intake:
        intake.begin(arena, Rules(2))
        assert driver.begun.acquire(timeout=20)
        giving_up.start()
        giving_up.join(20)
        assert not giving_up.is_alive()
        intake._ahead.result(20)
    assert not driver.registered


def test_whoever_waits_for_a_turn_is_let_go_when_the_arena_is_given_up(arena, pinning_of):
    rotation_of_two(arena)
    pinning, driver = pinning_of(arena)
    with pinning.paused(), closing(Intake(OWN, pinning)) as intake:
        intake.begin(arena, Rules(2))
        pinning.close()
        intake._ahead.result(20)
    assert not driver.events


def test_without_a_device_nothing_is_read_ahead(arena):
    rotation_of_two(arena)
    with closing(Intake(OWN, Pinning(arena, None))) as intake:
        intake.begin(arena, Rules(2))
        assert not intake._records
        assert intake._ahead is None
