"""Kill real workers at every point of a step; every run must end with the bits of the undisturbed one."""

import os
import random
import signal
import time

import pytest

from trainer.drill import judge
from trainer.events import EventLog
from trainer.faults import KillSpec

pytestmark = [pytest.mark.drill, pytest.mark.slow]


def verdict_of(job, kill, undisturbed):
    verdict = judge(job.recipe, kill, undisturbed, job.finish())
    assert verdict.passed, (verdict.problems, job.output.read_text()[-3000:])
    assert verdict.state_hash_killed == verdict.state_hash_undisturbed != ""
    return verdict


def steps_after_recovery(job):
    rows = job.rows()
    recovered = max(i for i, row in enumerate(rows) if row["kind"] == "recovered")
    return len({row["step"] for row in rows[recovered:] if row["kind"] == "optimizer"})


@pytest.mark.parametrize("point", ["forward", "optimizer", "capture"])
def test_a_worker_killed_inside_a_step_resumes_from_memory(start, undisturbed, point):
    kill = KillSpec(rank=1, step=7, at=point)
    job = start(f"memory-{point}", ["checkpoint.disk.every=0"], kill=str(kill))
    verdict = verdict_of(job, kill, undisturbed)
    assert verdict.tier == "memory"
    assert verdict.steps_lost <= 1
    assert verdict.optimizer_steps <= verdict.steps + 1
    assert steps_after_recovery(job) >= 3


def test_a_worker_killed_during_a_disk_write_resumes(start, undisturbed):
    kill = KillSpec(rank=0, step=8, at="disk")
    verdict = verdict_of(start("disk-write", kill=str(kill)), kill, undisturbed)
    assert verdict.tier == "memory"
    assert verdict.optimizer_steps <= verdict.steps + 1


def test_without_memory_a_run_resumes_from_disk(start, undisturbed):
    kill = KillSpec(rank=1, step=10, at="forward", who="both")
    job = start("from-disk", kill=str(kill))
    verdict = verdict_of(job, kill, undisturbed)
    assert verdict.tier == "disk"
    assert verdict.resumed_step in (4, 8)


@pytest.mark.parametrize("point", ["optimizer", "disk"])
def test_the_keeper_killed_alone_does_not_disturb_training(start, undisturbed, point):
    kill = KillSpec(rank=0, step=6 if point == "optimizer" else 8, at=point, who="keeper")
    job = start(f"keeper-{point}", kill=str(kill))
    verdict = verdict_of(job, kill, undisturbed)
    assert verdict.optimizer_steps == verdict.steps
    assert len({row["pid"] for row in job.rows() if row["kind"] == "keeper_started"}) == 2


@pytest.mark.parametrize("seed", range(3))
def test_a_kill_from_outside_at_a_random_time(start, undisturbed, seed):
    """No failpoint: the test kills whichever process it likes, wherever that happens to be."""
    choice = random.Random(seed)
    job = start(f"outside-{seed}")
    after, rank, delay = choice.randrange(1, 10), choice.randrange(2), choice.uniform(0, 0.25)
    deadline = time.monotonic() + 100
    while not any(row["kind"] == "step" and row["step"] >= after for row in job.rows()):
        assert time.monotonic() < deadline, job.output.read_text()[-2000:]
        assert job.process.poll() is None, job.output.read_text()[-2000:]
        time.sleep(0.02)
    time.sleep(delay)  # not a synchronisation: the kill is meant to fall anywhere in a step
    pid = next(row["pid"] for row in job.rows() if row["kind"] == "start" and row["rank"] == rank)
    EventLog(job.run_dir, -1, 0).write("kill", step=after, at="outside", who="worker", pid=pid)
    os.kill(pid, signal.SIGKILL)
    verdict = verdict_of(job, KillSpec(rank=rank, step=after), undisturbed)
    assert verdict.tier == "memory"
    assert verdict.steps_lost <= 1


def test_every_sample_counts_once(undisturbed):
    """The chain over ids and tokens is part of the state hash; the cursor is in every step's row."""
    cursors = [row["samples"] for row in undisturbed if row["kind"] == "step"]
    assert cursors == [8 * step for step in range(1, 13)]
