"""How soon a dead, stopped or stuck worker is noticed, and that the run then ends with the undisturbed one's bits."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest

pytestmark = [pytest.mark.drill, pytest.mark.slow]
TWO_SECONDS = "parallel.deadlines.step=2"


def rows_of(job, kind):
    return [row for row in job.rows() if row["kind"] == kind]


def final_hash(rows):
    return next(row["state_hash"] for row in rows if row["kind"] == "done")


def wait_for(job, condition):
    """Poll what only files and /proc tell."""
    deadline = time.monotonic() + 100
    while not (found := condition()):
        assert time.monotonic() < deadline, job.output.read_text()[-2000:]
        assert job.process.poll() is None, job.output.read_text()[-2000:]
        time.sleep(0.01)
    return found


def wait_for_step(job, step):
    wait_for(job, lambda: any(row["step"] >= step for row in rows_of(job, "step")))


def worker_pid(job, rank):
    return [row["pid"] for row in rows_of(job, "start") if row["rank"] == rank][-1]


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_a_killed_worker_is_noticed_at_once_and_its_peers_are_gone_at_once(start, undisturbed, nothing_left):
    job = start("noticed")
    wait_for_step(job, 3)
    victim, killed = worker_pid(job, 1), time.time()
    os.kill(victim, signal.SIGKILL)
    rows = job.finish()
    seen = next(row for row in rows if row["kind"] == "worker_exit")
    assert (seen["worker"], seen["pid"], seen["reason"]) == (1, victim, "SIGKILL")
    assert seen["time"] - killed <= 0.5
    gone = next(row for row in rows if row["kind"] == "worker_gone")
    assert gone["time"] - killed <= 0.5
    assert gone["phase"] in ("forward", "backward", "exchange", "optimizer", "capture", "evaluate", "finish")
    assert next(row for row in rows if row["kind"] == "workers_ended")["time"] - killed <= 1.0
    assert final_hash(rows) == final_hash(undisturbed)
    nothing_left(job.run_dir)


@pytest.mark.parametrize("keeper_dies_first", [False, True])
def test_a_stopped_worker_is_killed_when_its_phase_is_overdue(start, undisturbed, nothing_left, keeper_dies_first):
    job = start(f"stopped-{keeper_dies_first}", [TWO_SECONDS])
    wait_for_step(job, 3)
    if keeper_dies_first:
        os.kill(rows_of(job, "keeper_started")[-1]["pid"], signal.SIGKILL)
        wait_for(job, lambda: len(rows_of(job, "keeper_adopted")) == 2)
    victim, stopped = worker_pid(job, 1), time.time()
    os.kill(victim, signal.SIGSTOP)
    rows = job.finish()
    stuck = [row for row in rows if row["kind"] == "worker_stuck"]
    assert victim in [row["pid"] for row in stuck], stuck
    named = next(row for row in stuck if row["pid"] == victim)
    assert (named["coordinate"], named["stopped"]) == ("dp0001", True)
    assert named["step"] >= 3
    assert stuck[0]["time"] - stopped <= 2 + 1.5
    assert "stopped by a signal" in job.output.read_text()
    assert final_hash(rows) == final_hash(undisturbed)
    nothing_left(job.run_dir)


def test_a_worker_stopped_before_a_keeper_knows_it_is_killed_by_the_launcher(start, undisturbed, nothing_left):
    job = start("stopped-early", ["parallel.deadlines.build=25"])
    victim = wait_for(job, lambda: children(job.process.pid)[1:])[0]
    os.kill(victim, signal.SIGSTOP)
    rows = job.finish()
    assert victim in [row["pid"] for row in rows if row["kind"] == "worker_stuck"]
    assert final_hash(rows) == final_hash(undisturbed)
    nothing_left(job.run_dir)


def test_under_torchrun_the_keeper_frees_a_stopped_worker(start, undisturbed, nothing_left):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1"]
    job = start("stopped-torchrun", [TWO_SECONDS], command=[*torchrun, "-m", "trainer", "train"],
                environment={"MASTER_PORT": "29617"})  # fmt: skip
    wait_for_step(job, 3)
    victim = worker_pid(job, 0)
    os.kill(victim, signal.SIGSTOP)
    rows = job.finish()
    assert victim in [row["pid"] for row in rows if row["kind"] == "worker_stuck"]
    assert final_hash(rows) == final_hash(undisturbed)
    nothing_left(job.run_dir)
