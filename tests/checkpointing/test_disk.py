"""The keeper's writes to disk: killed half-way, refused by the disk, and never in training's way."""

from __future__ import annotations

import json
import os
import resource
import signal
import threading
from pathlib import Path

import pytest

from checkpointing.keeper import launch
from checkpointing.records import Entry
from checkpointing.recover import Recovery
from checkpointing.recovery import RecoveryError, plan_recovery
from checkpointing.store import Checkpoint, Section, list_checkpoints, verify, write_checkpoint
from checkpointing.units import Range

pytestmark = pytest.mark.drill

DISK = {"every": 2, "keep_last": 2}


def steps_on_disk(run_dir: Path) -> list[int]:
    return [step for step, _ in list_checkpoints(run_dir / "checkpoints")]


def test_due_steps_are_written_and_old_ones_removed(run_dir, make_job, events, wait_until):
    tensors = {
        "model.norm0.weight": {"param": "model.norm0.weight", "shape": [33], "dtype": "bfloat16", "elements": 33}
    }
    job = make_job(disk=DISK, options={"tensors": tensors, "metadata": {"torch": "2.13"}})
    job.begin()
    for step in range(1, 8):
        job.step(step)
        if step % 2 == 0:
            wait_until(lambda step=step: step in steps_on_disk(run_dir))
    wait_until(lambda: steps_on_disk(run_dir) == [4, 6])
    checkpoint = Checkpoint.open(run_dir / "checkpoints" / "step-6")
    assert verify(checkpoint.path) == []
    assert checkpoint.manifest["metadata"] == {"torch": "2.13", "recipe": "0123456789abcdef", "attempt": 0}
    assert checkpoint.manifest["tensors"] == tensors
    assert checkpoint.extras("dp0001")["rng"] == b"rank 1 step 6"
    held = checkpoint.assemble("L00.E003.down_proj", "exp_avg").tobytes()
    assert held == job.history[6][0][1] + job.history[6][1][1]
    assert {row["step"] for row in events("disk_written")} == {2, 4, 6}


def test_the_keeper_killed_half_way_leaves_the_previous_one_and_writes_again(run_dir, make_job, events, wait_until):
    job = make_job(disk=DISK, options={"kill": {"at": "disk", "step": 4, "pids": ["keeper"]}})
    first = job.clients[0].keeper_pid
    job.begin()
    job.step(1)
    job.step(2)
    wait_until(lambda: steps_on_disk(run_dir) == [2])
    job.step(3)
    job.step(4)
    launch.wait_for_end(first, 30)
    assert verify(run_dir / "checkpoints" / "step-2") == []
    # Its workers bring their memory to a new keeper, which finds the write undone.
    wait_until(lambda: steps_on_disk(run_dir) == [2, 4])
    assert len(events("keeper_started")) == 2
    assert verify(run_dir / "checkpoints" / "step-4") == []
    assert not list((run_dir / "checkpoints").glob("step-*.tmp"))
    job.run(5)


def train_until_killed(pipe, make_job):
    job = make_job(disk=DISK, options={"kill": {"at": "disk", "step": 3, "pids": [os.getpid()]}})
    job.run(1, 2, 3, 4)
    pipe.send("captured")
    pipe.recv()


def test_a_worker_killed_in_the_middle_of_a_write_does_not_stop_it(run_dir, make_job, spawn, wait_until):
    worker = spawn(train_until_killed, make_job)
    worker.end(-signal.SIGKILL)
    wait_until(lambda: 4 in steps_on_disk(run_dir))
    assert verify(run_dir / "checkpoints" / "step-4") == []
    plan, _, _ = make_job(attempt=1, disk=DISK).recover()
    assert (plan.step, plan.tier) == (4, "memory")


def test_a_disk_that_refuses_is_reported_and_training_goes_on(run_dir, make_job, events, wait_until):
    job = make_job(disk=DISK)
    job.begin()
    job.step(1)
    job.step(2)
    wait_until(lambda: steps_on_disk(run_dir) == [2])
    keeper = job.clients[0].keeper_pid
    _, hard = resource.prlimit(keeper, resource.RLIMIT_FSIZE)
    # The kernel now refuses the keeper's writes in the middle of a file, as a full disk would.
    resource.prlimit(keeper, resource.RLIMIT_FSIZE, (9000, hard))
    job.step(3)
    job.step(4)
    wait_until(lambda: events("disk_failed"))
    assert "OSError" in events("disk_failed")[0]["error"]
    assert steps_on_disk(run_dir) == [2]
    assert not list((run_dir / "checkpoints").glob("step-*.tmp"))
    resource.prlimit(keeper, resource.RLIMIT_FSIZE, (hard, hard))
    job.step(5)
    job.step(6)
    wait_until(lambda: steps_on_disk(run_dir) == [2, 6])
    assert job.clients[0].keeper_pid == keeper


def test_a_hung_disk_skips_writes_but_never_captures(run_dir, make_job, events, wait_until):
    job = make_job(disk=DISK)
    # A FIFO without a reader where a file should go: opening it for writing blocks, as a dead disk does.
    folder = run_dir / "checkpoints"
    folder.mkdir()
    os.mkfifo(folder / "latest.tmp")
    job.begin()
    for step in range(1, 11):
        job.step(step)
    wait_until(lambda: [row["step"] for row in events("disk_skipped")] == [4, 6, 8])
    assert job.capturers[0].sealed_step == 10
    # Someone reads at last: the write ends, and the newest queued step follows if its memory is still there.
    reader = os.open(folder / "latest.tmp", os.O_RDONLY | os.O_NONBLOCK)
    wait_until(lambda: [row["step"] for row in events("disk_written")] == [2, 10])
    os.close(reader)
    job.run(11)


def test_what_is_on_disk_already_is_not_written_again(run_dir, make_job, events, wait_until):
    job = make_job(world=1, disk=DISK)
    job.run(1, 2)
    wait_until(lambda: steps_on_disk(run_dir) == [2])
    manifest = (run_dir / "checkpoints" / "step-2" / "manifest.json").read_bytes()
    job.capturers[0].close()
    assert job.clients[0].finish(persist=True) == 2
    assert (run_dir / "checkpoints" / "step-2" / "manifest.json").read_bytes() == manifest
    assert json.loads(manifest)["step"] == 2
    assert len(events("disk_written")) == 1


def hang_the_next_write(run_dir):
    """After its commit and before retention: a FIFO without a reader blocks who opens it, as a dead disk does."""
    os.mkfifo(run_dir / "checkpoints" / "latest.tmp")


def let_it_end(run_dir):
    return os.open(run_dir / "checkpoints" / "latest.tmp", os.O_RDONLY | os.O_NONBLOCK)


def test_two_generations_are_enough_when_only_disk_steps_are_captured(run_dir, make_job, events, wait_until):
    job = make_job(world=2, disk=DISK, generations=2)
    (run_dir / "checkpoints").mkdir()
    hang_the_next_write(run_dir)
    job.begin()
    job.step(2)
    job.step(4)
    for rank, capturer in enumerate(job.capturers):
        capturer.start(6, {"rng": b"%d" % rank}, 4, job.protections[rank].fragments)
    # One slot is being written to a disk that hangs, the other holds the newest step: now captures have to wait.
    wait_until(lambda: {row["coordinate"] for row in events("backpressure")} == {"dp0000", "dp0001"})
    assert events("disk_skipped") == [], "giving up the queued step would not have helped"
    reader = let_it_end(run_dir)
    for capturer in job.capturers:
        capturer.wait_sealed(6)
    job.run(8, 10, 12)
    wait_until(lambda: steps_on_disk(run_dir)[-1:] == [12])
    os.close(reader)


def test_recovery_from_disk_waits_for_the_write_that_is_running(run_dir, make_job, events, wait_until):
    job = make_job(world=1, disk={"every": 2, "keep_last": 1}, generations=2)
    job.run(2)
    wait_until(lambda: events("disk_written"))
    hang_the_next_write(run_dir)
    job.run(4)
    wait_until(lambda: steps_on_disk(run_dir) == [2, 4])
    rank = Recovery(job.clients[0], run_dir, job.target(0), memory=False)
    reports = []
    thread = threading.Thread(target=lambda: reports.append(rank.report()))
    thread.start()
    thread.join(0.5)
    assert thread.is_alive()
    reader = let_it_end(run_dir)
    thread.join(30)
    os.close(reader)
    # Had it not waited, it would have promised step 2, which that write's retention then removed.
    assert reports == [{"memory": [], "disk": [4]}]


def test_a_folder_that_is_being_removed_is_not_called_damaged(run_dir, make_job, wait_until, events):
    job = make_job(world=1, disk=DISK)
    job.run(1, 2)
    wait_until(lambda: events("disk_written"))
    rank = Recovery(None, run_dir, job.target(0))
    report = rank.report()
    (run_dir / "checkpoints" / "step-2" / "manifest.json").unlink()
    with pytest.raises(RecoveryError):
        rank.apply(plan_recovery([report]))
    assert (rank.problems, events("quarantined")) == ([], [])
    assert (run_dir / "checkpoints" / "step-2").exists()


def test_checkpoints_of_another_recipe_are_not_restored(run_dir, make_job, wait_until, events):
    job = make_job(world=1, disk=DISK)
    job.run(1, 2)
    wait_until(lambda: events("disk_written"))
    ours = Recovery(job.clients[0], run_dir, job.target(0), memory=False, fingerprint="0123456789abcdef")
    assert ours.report()["disk"] == [2]
    theirs = Recovery(job.clients[0], run_dir, job.target(0), memory=False, fingerprint="f" * 16)
    assert theirs.report()["disk"] == []
    assert "step-2: ignored, it is of recipe 0123456789abcdef" in theirs.problems[0]


def test_steps_of_an_abandoned_course_are_set_aside_and_written_anew(run_dir, make_job, wait_until, events):
    job = make_job(disk=DISK)
    job.begin()
    for step in (1, 2, 3, 4):
        job.step(step)
        wait_until(lambda step=step: step % 2 or step in [row["step"] for row in events("disk_written")])
    abandoned = (run_dir / "checkpoints" / "step-4" / "manifest.json").read_bytes()
    for client in job.clients:
        client.discard(after_step=3)
    job.run(4)
    wait_until(lambda: [row["step"] for row in events("disk_written")] == [2, 4, 4])
    assert events("disk_kept") == []
    assert (run_dir / "checkpoints" / "step-4.abandoned" / "manifest.json").read_bytes() == abandoned
    assert verify(run_dir / "checkpoints" / "step-4") == []
    assert steps_on_disk(run_dir) == [2, 4]


def test_a_step_of_another_recipe_is_not_taken_for_this_runs(run_dir, make_job, wait_until, events):
    parts = [Section([Entry(Range("x", "master", 0, 2), "float32", 0, 8)], memoryview(bytes(8)))]
    write_checkpoint(run_dir / "checkpoints", 2, {"dp0000": parts}, {}, {"recipe": "f" * 16})
    make_job(world=1, disk=DISK).run(1, 2)
    wait_until(lambda: events("disk_written"))
    assert Checkpoint.open(run_dir / "checkpoints" / "step-2").manifest["metadata"]["recipe"] == "0123456789abcdef"
    assert verify(run_dir / "checkpoints" / "step-2.abandoned") != []
    assert list((run_dir / "checkpoints").glob("step-2.*")) == [run_dir / "checkpoints" / "step-2.abandoned"]
