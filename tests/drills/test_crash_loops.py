"""Failures that repeat themselves stop a run with a diagnosis; failures with progress in between do not."""

import sys

import pytest

pytestmark = [pytest.mark.drill, pytest.mark.slow]
SAME = ";".join(["rank=1,step=3,at=optimizer"] * 5)


def starts(job):
    return sum(row["kind"] == "start" and row["rank"] == 0 for row in job.rows())


def test_three_identical_kills_stop_the_run_and_it_resumes_when_started_again(start, undisturbed, nothing_left):
    job = start("loop", ["parallel.restarts=9"], kill=SAME)
    assert job.wait() == 1
    assert starts(job) == 3
    text = job.output.read_text()
    assert "crash loop: the workers ended 3 times in the same way" in text
    assert "worker 1 in optimizer of step 3: SIGKILL" in text
    assert "keeper.log" in text
    assert "Traceback" not in text
    again = start("loop", ["parallel.restarts=9"])
    rows = again.finish()
    hashes = [[row["state_hash"] for row in side if row["kind"] == "done"] for side in (rows, undisturbed)]
    assert hashes[0] == hashes[1][:1]
    nothing_left(job.run_dir)


def test_under_torchrun_the_workers_refuse_the_fourth_start(start):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "3"]
    job = start("loop-torchrun", command=[*torchrun, "-m", "trainer", "train"], kill=SAME,
                environment={"MASTER_PORT": "29619"})  # fmt: skip
    assert job.wait() != 0
    assert starts(job) == 3
    assert "crash loop: the workers ended 3 times in the same way" in job.output.read_text()
