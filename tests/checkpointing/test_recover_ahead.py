"""A recovery on a machine with a device: what is read and pinned ahead of its plan, and that it ends with it."""

from __future__ import annotations

import gc
import threading
from dataclasses import replace

import pytest

from checkpointing import intake as module
from checkpointing.keeper.protocol import KeeperError
from checkpointing.recover import Recovery, exchange_reports
from checkpointing.recovery import RecoveryPlan, plan_recovery
from checkpointing.redo import Redo
from tests.checkpointing.driver import Until


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


def test_collecting_goes_on_after_a_recovery_also_one_that_fails(second_attempt, monkeypatch):
    (job, pinning, driver, _), collects = second_attempt, []
    driver.refuses = set(driver.slots.values())
    inventory = job.clients[0].inventory
    monkeypatch.setattr(job.clients[0], "inventory", lambda: collects.append(gc.isenabled()) or inventory())
    with pytest.raises(KeeperError, match="cudaHostRegister failed"):
        recover(job, pinning)
    assert collects == [False]
    assert gc.isenabled()
    assert not [t for t in threading.enumerate() if t.name.startswith(("pinning", "verifying", "hashing"))]


@pytest.mark.parametrize("tier", ["fresh", "disk"])
def test_what_was_begun_ends_before_a_recovery_that_reads_no_memory(tier, second_attempt, monkeypatch):
    job, pinning, driver, _ = second_attempt
    recovery = Recovery(job.clients[0], job.run_dir, replace(job.target(0), pinning=pinning))
    driver.hold = {slot: Until(lambda: recovery._intake._known) for slot in driver.slots.values()}
    seen = []

    def without_memory(plan):
        seen.append(recovery._intake)
        return {}

    monkeypatch.setattr(recovery, "_restore", without_memory)
    with recovery:
        assert driver.begun.acquire(timeout=20)
        recovery._report = {"memory": [], "disk": [4]}
        assert recovery.apply(RecoveryPlan(4 if tier == "disk" else -1, tier, "")) == {}
        assert recovery._intake is None
    assert seen == [None] * (tier == "disk")
    assert len(driver.events) == 1  # the one that was under way


class Reports:
    """What exchange_reports asks of a rank, and in which order."""

    def __init__(self, memory: list[int]) -> None:
        self._memory, self.unreadable = memory, "the disk is away"

    def report_memory(self) -> tuple[list[int], int]:
        return self._memory, -1

    def report(self) -> dict[str, list[int]]:
        return {"memory": self._memory, "disk": [7]}


@pytest.mark.parametrize(
    ("memory", "gathered", "found"),
    [
        ([4], [([4], -1)], ([{"memory": [4]}], [])),
        (
            [],
            [([], -1), {"memory": [], "disk": [7]}, "the disk is away"],
            ([{"memory": [], "disk": [7]}], ["the disk is away"]),
        ),
    ],
)
def test_the_disk_is_asked_only_when_memory_does_not_do_and_what_it_lacks_is_told(memory, gathered, found):
    asked = []
    assert exchange_reports(Reports(memory), lambda mine: asked.append(mine) or [mine]) == found
    assert asked == gathered
