"""From a worker's death to its state again: memory first, disk if memory is gone, and never a damaged byte."""

from __future__ import annotations

import os
import signal

import pytest

from checkpointing import records
from checkpointing.keeper.control import stop_keeper
from checkpointing.records import Kind, State
from checkpointing.recovery import RecoveryError, plan_recovery
from checkpointing.store import list_checkpoints

pytestmark = pytest.mark.drill

DISK = {"every": 2, "keep_last": 2}


def train_and_die(pipe, make_job, die_in, options, after_step=lambda step: None):
    """All workers of a job in one process: steps 1..9, killed in the middle of capturing ``die_in``."""

    def reached(point, step):
        if (point, step) == ("capture", die_in):
            pipe.send("half")
            os.kill(os.getpid(), signal.SIGKILL)

    job = make_job(reached=reached, **options)
    for step in range(1, 10):
        job.run(step)
        after_step(step)


@pytest.fixture
def on_disk(run_dir, wait_until):
    """Called with a step: wait until it is on disk if it is due there."""

    def wait(step):
        wait_until(lambda: step % 2 or step in [s for s, _ in list_checkpoints(run_dir / "checkpoints")])

    return wait


def slot_of(job, rank, kind, step):
    for place, view in zip(job.clients[rank].arena.shape.slots(), job.clients[rank].arena.slots, strict=True):
        if place.kind is kind and records.state_of(view) is State.SEALED and records.read_header(view).step == step:
            return view
    raise AssertionError(f"no {kind.name} of step {step}")


def flip(view):
    at = records.read_header(view).payload_offset + 5
    view[at] ^= 0x10


def test_killed_in_the_middle_of_a_copy_the_step_before_is_restored(make_job, spawn, events):
    worker = spawn(train_and_die, make_job, 5, {})
    worker.expect("half")
    worker.end(-signal.SIGKILL)
    job = make_job(attempt=1)
    states = [records.state_of(view) for view in job.clients[0].arena.slots]
    assert State.WRITING not in states
    plan, extras, _ = job.recover()
    assert (plan.step, plan.tier) == (4, "memory")
    assert [e["rng"] for e in extras] == [b"rank 0 step 4", b"rank 1 step 4"]
    assert extras[0]["empty"] == b""
    restored = job.state()
    job.run(4)
    assert restored == job.history[4]
    gone = events("worker_gone")
    assert {row["pid"] for row in gone} == {worker.process.pid}
    assert {row["coordinate"] for row in gone} == {"dp0000", "dp0001"}


def test_training_goes_on_after_a_recovery_and_can_be_recovered_again(make_job, spawn):
    for attempt, (die_in, recovered) in enumerate([(4, -1), (6, 3), (7, 5)]):
        worker = spawn(continue_and_die, make_job, die_in, recovered, {"attempt": attempt})
        worker.expect("half")
        worker.end(-signal.SIGKILL)
    job = make_job(attempt=3)
    plan, _, _ = job.recover()
    assert plan.step == 6


def continue_and_die(pipe, make_job, die_in, recovered, options):
    def reached(point, step):
        if (point, step) == ("capture", die_in):
            pipe.send("half")
            os.kill(os.getpid(), signal.SIGKILL)

    job = make_job(reached=reached, **options)
    plan, _, _ = job.recover()
    assert plan.step == recovered
    job.run(*range(max(plan.step, 0) + 1, 10))


def test_a_step_that_only_one_rank_has_is_discarded(make_job):
    job = make_job()
    job.run(1, 2, 3)
    job.capturers[0].start(4, {"rng": b""}, 3, job.protections[0].fragments)
    job.capturers[0].wait_sealed(4)
    plan, _, _ = job.recover()
    assert plan.step == 3
    assert "step 4" not in plan.reason.rpartition(";")[2]
    assert job.state() == job.history[3]
    assert max(r.step for r in job.clients[0].inventory()) == 3


@pytest.mark.parametrize("kind", [Kind.BASE, Kind.EXTRAS])
def test_a_flipped_byte_in_memory_is_detected_and_the_older_step_used(make_job, events, kind):
    job = make_job()
    job.run(1, 2, 3)
    flip(slot_of(job, 1, kind, 3))
    plan, _, _ = job.recover()
    assert (plan.step, plan.tier) == (2, "memory")
    assert "memory had" in plan.reason
    assert job.state() == job.history[2]
    (row,) = events("quarantined")
    assert (row["tier"], row["coordinate"], row["step"]) == ("memory", "dp0001", 3)
    job.run(3, 4, 5, 6)


@pytest.mark.parametrize(("kind", "offset"), [(Kind.BASE, records.PAGE + 1), (Kind.EXTRAS, 24)])
def test_a_record_damaged_after_it_was_verified_is_not_reported(make_job, events, kind, offset):
    """Its table, or its step: the keeper verifies ahead, and the worker that asks must not stumble over it."""
    job = make_job()
    job.run(1, 2, 3)
    assert max(r.step for r in job.clients[0].inventory()) == 3
    slot_of(job, 1, kind, 3)[offset] ^= 0x20
    plan, _, _ = job.recover()
    assert (plan.step, plan.tier) == (2, "memory")
    assert job.state() == job.history[2]
    (row,) = events("quarantined")
    assert (row["coordinate"], row["step"]) == ("dp0001", 3)


def test_a_byte_flipped_after_the_report_is_not_restored(make_job):
    job = make_job(world=1)
    job.run(1, 2, 3)
    _, _, (rank,) = job.recover()
    report = rank.report()
    flip(slot_of(job, 0, Kind.BASE, 3))
    with pytest.raises(RecoveryError, match="does not match its checksum"):
        rank.apply(plan_recovery([report]))


def test_disk_takes_over_when_memory_is_gone(run_dir, make_job, spawn, events, on_disk):
    worker = spawn(train_and_die, make_job, 8, {"disk": DISK}, on_disk)
    worker.expect("half")
    worker.end(-signal.SIGKILL)
    assert stop_keeper(run_dir, persist=False)
    job = make_job(attempt=1, disk=DISK)
    plan, extras, _ = job.recover()
    assert (plan.step, plan.tier) == (6, "disk")
    assert extras[1]["rng"] == b"rank 1 step 6"
    restored = job.state()
    job.run(6)
    assert restored == job.history[6]


def test_damaged_disk_is_set_aside_and_the_older_one_used(run_dir, make_job, spawn, events, on_disk):
    worker = spawn(train_and_die, make_job, 8, {"disk": DISK}, on_disk)
    worker.expect("half")
    worker.end(-signal.SIGKILL)
    assert stop_keeper(run_dir, persist=False)
    checkpoints = run_dir / "checkpoints"
    assert [step for step, _ in list_checkpoints(checkpoints)] == [4, 6]
    file = checkpoints / "step-6" / "dp0001.safetensors"
    data = bytearray(file.read_bytes())
    data[-1000] ^= 1
    file.write_bytes(data)
    job = make_job(attempt=1, disk=DISK)
    plan, _, ranks = job.recover()
    assert (plan.step, plan.tier) == (4, "disk")
    assert "dp0001.safetensors" in ranks[0].problems[0]
    assert (checkpoints / "step-6.corrupt").exists()
    assert events("quarantined")[0]["tier"] == "disk"
    restored = job.state()
    job.run(4)
    assert restored == job.history[4]


def test_newer_disk_beats_older_memory(run_dir, make_job, wait_until):
    job = make_job(disk=DISK)
    job.run(1, 2, 3, 4)
    wait_until(lambda: [step for step, _ in list_checkpoints(run_dir / "checkpoints")] == [2, 4])
    for rank in range(2):
        for kind in (Kind.BASE, Kind.EXTRAS):
            flip(slot_of(job, rank, kind, 4))
    plan, _, _ = job.recover()
    assert (plan.step, plan.tier) == (4, "disk")
    assert job.state() == job.history[4]


def test_without_anything_it_starts_afresh(make_job):
    job = make_job()
    before = job.state()
    plan, extras, _ = job.recover()
    assert (plan.step, plan.tier, extras) == (-1, "fresh", [{}, {}])
    assert job.state() == before
