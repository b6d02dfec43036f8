"""What a restore reads is verified and pinned ahead of the plan, and never used, lost or left pinned by mistake."""

from __future__ import annotations

import gc
import os
import threading
import time
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

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
from checkpointing.recover import Recovery, exchange_reports
from checkpointing.recovery import RecoveryError, RecoveryPlan, plan_recovery
from checkpointing.redo import Redo
from checkpointing.schedule import Rules
from checkpointing.slots import Arena, ArenaShape, Pool
from checkpointing.units import Range

OWN, SIZE = "dp0000", 4 * PAGE


class Driver:
    """Stands for CUDA's registering. ``events`` are what happened in order: ("pin", slot), ("copy", step), ..."""

    def __init__(self) -> None:
        self.events: list[tuple[str, object]] = []
        self.registered: set[int] = set()
        self.refuses: set[int] = set()
        self.hold: dict[int, threading.Event | Until] = {}  # registering a slot waits for it
        self.base = 0
        self.begun = threading.Semaphore(0)
        self.slots: dict[int, int] = {}

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        slot = self.slots[address - self.base]
        self.begun.release()
        if slot in self.hold:
            assert self.hold[slot].wait(20)
        if slot in self.refuses:
            return 2
        assert address not in self.registered, "registered twice"
        self.registered.add(address)
        self.events.append(("pin", slot))
        return 0

    def note(self, what: str, of: object) -> None:
        self.events.append((what, of))

    def cudaHostUnregister(self, address: int) -> int:
        self.registered.remove(address)
        return 0


class Until:
    """An event that comes when the condition holds."""

    def __init__(self, condition) -> None:
        self._condition, self._over = condition, threading.Event()

    def set(self) -> None:
        self._over.set()

    def wait(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while not self._condition() and not self._over.wait(0.001) and time.monotonic() < deadline:
            pass
        return time.monotonic() < deadline


@pytest.fixture
def pinning_of(monkeypatch):
    """A Pinning of an arena on a machine with a device, and the driver that it calls."""
    drivers = []

    def make(arena: Arena) -> tuple[Pinning, Driver]:
        driver = Driver()
        monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
        monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
        pinning = Pinning(arena, torch.device("cuda", 0))
        driver.base = pinning._base
        driver.slots = {place.offset: place.index for place in arena.places}
        drivers.append((pinning, driver))
        return pinning, driver

    yield make
    for pinning, driver in drivers:
        for hold in driver.hold.values():
            hold.set()
        pinning.close()
        assert not driver.registered, "a registration was leaked"


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
    with Intake(OWN, pinning) as intake:
        intake.begin(arena, Rules(2))
        intake._ahead.result(20)
    assert [slot for what, slot in driver.events if what == "pin"] == [8, 2, 4, 0]
    for slot in (8, 2, 4, 0):
        assert driver.events.index(("verified", slot)) < driver.events.index(("pin", slot))


def test_once_the_plan_is_known_whoever_copies_pins(arena, pinning_of):
    records = rotation_of_two(arena)
    pinning, driver = pinning_of(arena)
    with Intake(OWN, pinning) as intake:
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
    with Intake(OWN, pinning) as intake:
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
    with Intake(OWN, pinning) as intake:
        intake.begin(arena, Rules(2))
        futures = intake._ahead
        assert isinstance(futures.exception(20), KeeperError)
        with pytest.raises(KeeperError, match="cudaHostRegister failed with CUDA error 2"):
            intake.settle(places, {OWN: arena})
    with Intake(OWN, pinning) as intake:  # refused only then
        intake.settle(places, {OWN: arena})
        with pytest.raises(KeeperError, match="cudaHostRegister failed with CUDA error 2"):
            intake.payload(records[2])


def test_damage_is_told_to_whoever_needs_the_record_and_to_nobody_else(arena, pinning_of):
    records = rotation_of_two(arena)
    arena.slots[2][2 * PAGE + 5] ^= 4
    pinning, driver = pinning_of(arena)
    with Intake(OWN, pinning) as intake:
        intake.begin(arena, Rules(2))
        intake._ahead.result(20)
        intake.settle([(OWN, slot) for slot in (8, 2, 4, 0)], {OWN: arena})
        assert intake.payload(records[4])
        with pytest.raises(RecoveryError, match=r"dp0000, slot 2: the base record of step 3 does not match"):
            intake.payload(records[2])
    assert driver.events


def test_a_slot_that_holds_another_record_than_the_plan_says_is_refused(arena, pinning_of):
    records = rotation_of_two(arena)
    pinning, _ = pinning_of(arena)
    with Intake(OWN, pinning) as intake:
        intake.settle([(OWN, 0)], {OWN: arena})
        with pytest.raises(RecoveryError, match="holds the base record of step 4, not that of step 2"):
            intake.payload(replace(records[0], step=2))


def test_records_of_another_worker_are_verified_and_not_pinned(arena, pinning_of):
    records = rotation_of_two(arena)
    pinning, driver = pinning_of(arena)
    with Intake("dp0001", pinning) as intake:
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


def test_the_arena_is_given_up_while_a_slot_is_being_pinned(arena, pinning_of):
    rotation_of_two(arena)
    pinning, driver = pinning_of(arena)
    giving_up = threading.Thread(target=pinning.close)
    driver.hold[8] = Until(giving_up.is_alive)
    with Intake(OWN, pinning) as intake:
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
    with pinning.paused(), Intake(OWN, pinning) as intake:
        intake.begin(arena, Rules(2))
        pinning.close()
        intake._ahead.result(20)
    assert not driver.events


def test_without_a_device_nothing_is_read_ahead(arena):
    rotation_of_two(arena)
    with Intake(OWN, Pinning(arena, None)) as intake:
        intake.begin(arena, Rules(2))
        assert not intake._records
        assert intake._ahead is None


@pytest.fixture
def second_attempt(make_wal_job, pinning_of, monkeypatch):
    """A worker that comes back after four steps, its pinning and the driver; what must be restored."""
    first = make_wal_job(world=1)
    first.run(1, 2, 3, 4)
    first.close()
    job = make_wal_job(world=1, attempt=1)
    job.wipe()
    pinning, driver = pinning_of(job.clients[0].arena)
    redo = Redo.apply
    monkeypatch.setattr(Redo, "apply", lambda self, step, log: driver.note("redo", step) or redo(self, step, log))
    return job, pinning, driver, first.history[4]


def recover(job, pinning):
    with Recovery(job.clients[0], job.run_dir, replace(job.target(0), pinning=pinning)) as recovery:
        reports, unreadable = exchange_reports(recovery, lambda mine: [mine])
        assert unreadable == []
        plan = plan_recovery(reports)
        recovery.apply(plan)
    return plan.step


def test_what_a_recovery_reads_is_pinned_while_the_keeper_has_not_answered(second_attempt, monkeypatch):
    job, pinning, driver, expected = second_attempt
    inventory = job.clients[0].inventory

    def late():
        for _ in range(6):  # extras, three bases, the log of two steps
            assert driver.begun.acquire(timeout=20)
        return inventory()

    monkeypatch.setattr(job.clients[0], "inventory", late)
    assert recover(job, pinning) == 4
    assert job.state() == expected
    assert [what for what, _ in driver.events] == ["pin"] * 6 + ["redo"] * 2


def test_a_step_is_redone_when_its_log_is_there_not_when_all_are(second_attempt, monkeypatch):
    job, pinning, driver, expected = second_attempt
    monkeypatch.setattr(module, "likely_slots", lambda arena, rules: [])
    assert recover(job, pinning) == 4
    assert job.state() == expected
    kinds = {place.index: place.kind.name.lower() for place in job.clients[0].arena.places}
    happened = [kinds[of] if what == "pin" else f"{what} {of}" for what, of in driver.events]
    assert happened == ["base", "log", "redo 3", "base", "log", "redo 4", "base", "extras"]


def test_collecting_goes_on_after_a_recovery_also_one_that_fails(second_attempt):
    job, pinning, driver, _ = second_attempt
    driver.refuses = set(driver.slots.values())
    with pytest.raises(KeeperError, match="cudaHostRegister failed"):
        recover(job, pinning)
    assert gc.isenabled()
    assert not [t for t in threading.enumerate() if t.name.startswith(("pinning", "verifying", "hashing"))]


def test_what_was_begun_ends_before_a_recovery_that_reads_no_memory(second_attempt):
    job, pinning, driver, _ = second_attempt
    before = job.state()
    with Recovery(job.clients[0], job.run_dir, replace(job.target(0), pinning=pinning)) as recovery:
        driver.hold = {slot: Until(lambda: recovery._intake._known) for slot in driver.slots.values()}
        recovery.report_memory()
        assert recovery.apply(RecoveryPlan(-1, "fresh", "")) == {}
        assert recovery._intake is None
    assert len(driver.events) <= 2
    assert job.state() == before
