"""Stopping a launcher at any time: status 75, the newest step kept, no process left, and the same command resumes."""

import os
import re
import signal
import time
from pathlib import Path

import pytest

from checkpointing.keeper.client import stop_keeper
from checkpointing.store import list_checkpoints

pytestmark = [pytest.mark.drill, pytest.mark.slow]
GRACE_S = 30


def rows_of(job, kind):
    return [row for row in job.rows() if row["kind"] == kind]


def wait_for(job, condition):
    deadline = time.monotonic() + 100
    while not condition():
        assert time.monotonic() < deadline, job.output.read_text()[-2000:]
        assert job.process.poll() is None, job.output.read_text()[-2000:]
        time.sleep(0.01)


def stop(job, number=signal.SIGTERM):
    """Signal the launcher; seconds until it has ended with status 75."""
    began = time.monotonic()
    job.process.send_signal(number)
    assert job.wait() == 75, job.output.read_text()[-3000:]
    return time.monotonic() - began


def final_hash(rows):
    return next(row["state_hash"] for row in rows if row["kind"] == "done")


def test_the_newest_step_is_on_disk_and_the_keeper_gone(start, undisturbed, nothing_left):
    job = start("stopped", ["checkpoint.disk.every=0"])
    wait_for(job, lambda: any(row["step"] >= 5 for row in rows_of(job, "step")))
    assert stop(job) < GRACE_S
    nothing_left(job.run_dir)
    text = job.output.read_text()
    step = int(re.search(r"stopped by SIGTERM; step (\d+) is on disk; the same command resumes", text)[1])
    assert step >= 4
    assert [s for s, _ in list_checkpoints(job.run_dir / "checkpoints")] == [step]
    assert "Traceback" not in text
    rows = start("stopped", ["checkpoint.disk.every=0"]).finish()
    plan = rows_of(job, "recovery_plan")[-1]
    assert (plan["tier"], plan["step"]) == ("disk", step)
    assert final_hash(rows) == final_hash(undisturbed)
    nothing_left(job.run_dir)


def test_without_a_disk_tier_the_keeper_stays_with_the_newest_step(start, undisturbed, nothing_left):
    memory_only = ["checkpoint.disk.every=0", "checkpoint.disk.final=false"]
    job = start("in-memory", memory_only)
    wait_for(job, lambda: any(row["step"] >= 5 for row in rows_of(job, "step")))
    assert stop(job, signal.SIGINT) < GRACE_S
    text = job.output.read_text()
    assert re.search(r"stopped by SIGINT; step \d+ is in memory only: checkpoint\.disk is off; the keeper \(pid", text)
    rows = start("in-memory", memory_only).finish()
    assert rows_of(job, "recovery_plan")[-1]["tier"] == "memory"
    assert final_hash(rows) == final_hash(undisturbed)
    nothing_left(job.run_dir)


def test_a_step_that_cannot_be_written_stays_in_memory(start, nothing_left):
    job = start("unwritable", ["checkpoint.disk.every=0"])
    wait_for(job, lambda: any(row["step"] >= 3 for row in rows_of(job, "step")))
    (job.run_dir / "checkpoints").touch()  # for root, too, a folder that cannot be made
    assert stop(job) < GRACE_S
    assert "is in memory only (" in job.output.read_text()
    assert stop_keeper(job.run_dir, persist=False)
    nothing_left(job.run_dir)


def has_children(job):
    return bool(Path(f"/proc/{job.process.pid}/task/{job.process.pid}/children").read_text().split())


def test_a_stop_during_the_start_leaves_nothing_and_the_next_start_goes_on(start, undisturbed, nothing_left):
    """While the workers import, while they build, while the keeper starts: one launch after the other."""
    moments = [
        (signal.SIGTERM, has_children),
        (signal.SIGINT, lambda job: rows_of(job, "start")),
        (signal.SIGTERM, lambda job: (job.run_dir / "keeper.start").exists()),
        (signal.SIGHUP, lambda job: rows_of(job, "keeper_started")),
    ]
    for i, (number, moment) in enumerate(moments):
        job = start(f"early-{i}")
        wait_for(job, lambda job=job, moment=moment: moment(job))
        assert stop(job, number) < GRACE_S
        nothing_left(job.run_dir)
        assert "stopped by" in job.output.read_text()
    assert final_hash(start("early-3").finish()) == final_hash(undisturbed)


def test_a_keeper_that_is_asked_to_end_writes_first_and_the_run_goes_on_with_another(start, undisturbed, nothing_left):
    job = start("keeper-term", ["checkpoint.disk.every=0"])
    wait_for(job, lambda: any(row["step"] >= 4 for row in rows_of(job, "step")))
    os.kill(rows_of(job, "keeper_started")[-1]["pid"], signal.SIGTERM)
    rows = job.finish()
    assert len(rows_of(job, "keeper_started")) == 2
    assert rows_of(job, "disk_written")[0]["step"] >= 3
    assert final_hash(rows) == final_hash(undisturbed)
    nothing_left(job.run_dir)
