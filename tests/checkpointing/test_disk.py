"""The keeper's writes to disk: killed half-way, refused by the disk, and never in training's way."""

from __future__ import annotations

import json
import os
import resource
import signal
from pathlib import Path

import pytest

from checkpointing.keeper import launch
from checkpointing.store import Checkpoint, list_checkpoints, verify

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
