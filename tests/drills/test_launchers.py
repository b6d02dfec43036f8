"""The three ways to start a run, and resuming by running the same command again."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest

pytestmark = [pytest.mark.drill, pytest.mark.slow]
BIN = Path(sys.executable).parent
PLANARIA = [sys.executable, "-m", "trainer", "train"]


def final_hash(rows):
    return next(row["state_hash"] for row in rows if row["kind"] == "done")


def wait_for_step(job, step):
    deadline = time.monotonic() + 100
    while not any(row["kind"] == "step" and row["step"] >= step for row in job.rows()):
        assert time.monotonic() < deadline, job.output.read_text()[-2000:]
        assert job.process.poll() is None, job.output.read_text()[-2000:]
        time.sleep(0.02)


def worker_pid(job, rank):
    return [row["pid"] for row in job.rows() if row["kind"] == "start" and row["rank"] == rank][-1]


def test_plain_torchrun_restarts_killed_workers(start, undisturbed):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "3"]
    job = start(
        "torchrun",
        command=[*torchrun, "-m", "trainer", "train"],
        environment={"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "0", "MASTER_PORT": "29611"},
    )
    wait_for_step(job, 5)
    os.kill(worker_pid(job, 1), signal.SIGKILL)
    assert final_hash(job.finish()) == final_hash(undisturbed)


def test_the_deepspeed_launcher_resumes_when_run_again(start, undisturbed):
    command = [str(BIN / "deepspeed"), "--num_gpus", "2", "--master_port", "29613", "--module", "trainer", "train"]
    environment = {"DS_ACCELERATOR": "cpu", "PATH": f"{BIN}:{os.environ['PATH']}"}
    job = start("deepspeed", command=command, environment=environment)
    wait_for_step(job, 5)
    os.kill(worker_pid(job, 1), signal.SIGKILL)
    assert job.wait() != 0, "the deepspeed launcher restarts nothing"
    again = start("deepspeed", command=command, environment=environment)
    rows = again.finish()
    plan = [row for row in rows if row["kind"] == "recovery_plan"][-1]
    assert (plan["tier"], plan["step"] >= 4) == ("memory", True)
    assert final_hash(rows) == final_hash(undisturbed)


def test_sigterm_stops_resumably_and_another_recipe_is_refused(start, undisturbed):
    job = start("sigterm", command=PLANARIA)
    wait_for_step(job, 4)
    job.process.send_signal(signal.SIGTERM)
    assert job.wait() == 75
    other = start("sigterm", ["train.lr=1e-2"])
    assert other.wait() == 2
    text = other.output.read_text()
    assert "belongs to another recipe" in text
    assert "lr: 0.01" in text
    assert "Traceback" not in text.partition("stopped by SIGTERM")[2]
    again = start("sigterm", command=PLANARIA)
    assert final_hash(again.finish()) == final_hash(undisturbed)


def test_a_finished_run_started_again_ends_at_once_with_the_same_state(start, undisturbed):
    rows = start("undisturbed", command=PLANARIA).finish()
    assert [row["state_hash"] for row in rows if row["kind"] == "done"] == [final_hash(undisturbed)] * 2
    assert sum(row["kind"] == "optimizer" and row["rank"] == 0 for row in rows) == 12


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_workers_die_with_a_killed_launcher_and_the_run_goes_on_when_started_again(start, undisturbed):
    job = start("orphans", command=PLANARIA)
    wait_for_step(job, 3)
    pids = [worker_pid(job, rank) for rank in range(2)]
    os.kill(job.process.pid, signal.SIGKILL)
    job.wait()
    deadline = time.monotonic() + 10
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < deadline, "workers outlived their launcher"
        time.sleep(0.02)
    assert final_hash(start("orphans", command=PLANARIA).finish()) == final_hash(undisturbed)


def test_a_second_job_in_a_run_folder_is_refused(start):
    first = start("shared", ["train.steps=5000"], command=PLANARIA)
    wait_for_step(first, 1)
    second = start("shared", ["train.steps=5000"], command=PLANARIA)
    assert second.wait() == 2
    assert "is being trained by process" in second.output.read_text()
    wait_for_step(first, first.rows()[-1]["step"] or 1)
    first.process.send_signal(signal.SIGTERM)
    assert first.wait() == 75


def test_a_diverging_run_stops_without_restarts_and_keeps_its_last_good_step(start):
    job = start("diverged", ["train.lr=1e38", "train.max_grad_norm=0", "train.warmup_steps=0"])
    assert job.wait() == 2
    assert "diverged" in job.output.read_text()
    assert sum(row["kind"] == "start" and row["rank"] == 0 for row in job.rows()) == 1


def test_workers_that_cannot_be_forked_are_started_as_programs(start, undisturbed):
    """As with CUDA, which must not be touched before a fork."""
    code = "import sys; from trainer import cli, launch; launch.may_fork = lambda _: False; sys.exit(cli.main())"
    kill = "rank=0,step=6,at=optimizer"
    job = start("programs", command=[sys.executable, "-c", code, "train"], kill=kill)
    rows = job.finish()
    assert [row["worker"] for row in rows if row["kind"] == "worker_exit" and row["status"] < 0] == [0]
    assert final_hash(rows) == final_hash(undisturbed)
