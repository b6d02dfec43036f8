"""The keeper as watchman, over real processes that post phases and then do nothing."""

import os
import signal

import pytest

from checkpointing.keeper import launch
from checkpointing.keeper.client import KeeperClient, keeper_status
from checkpointing.phases import Board

FINGERPRINT = "0123456789abcdef"

pytestmark = pytest.mark.drill


@pytest.fixture
def shape(make_job, run_dir):
    """Of a small state; the job that has it is gone again."""
    job = make_job(world=1)
    job.close()
    return job.clients[0].arena.shape


def attach(run_dir, shape, name, board):
    return KeeperClient.attach(run_dir, name, ["dp0000", "dp0001"], shape, FINGERPRINT, attempt=1, board=board)


def post(pipe, run_dir, shape, name, allowed_s, then=lambda client: None):
    """A worker: attach, post a phase, say so, and hang."""
    board = Board.create(name)
    client = attach(run_dir, shape, name, board)
    board.post("forward", 7, allowed_s)
    pipe.send(os.getpid())
    then(client)
    pipe.recv()


def test_an_overdue_worker_is_killed_and_named_and_others_are_not(run_dir, shape, spawn, events, wait_until):
    stuck = spawn(post, run_dir, shape, "dp0000", 0.5)
    patient = spawn(post, run_dir, shape, "dp0001", 0)
    stuck.end(-signal.SIGKILL)
    wait_until(lambda: [row for row in events("worker_gone") if row["pid"] == stuck.process.pid])
    (row,) = events("worker_stuck")
    assert (row["coordinate"], row["pid"], row["phase"], row["step"]) == ("dp0000", stuck.process.pid, "forward", 7)
    assert (row["allowed_s"], row["stopped"]) == (0.5, False)
    assert 0.5 <= row["seconds"] < 5
    (gone,) = [row for row in events("worker_gone") if row["pid"] == stuck.process.pid]
    assert (gone["phase"], gone["step"]) == ("forward", 7)
    assert patient.process.is_alive()


def test_a_stopped_worker_goes_with_the_peer_that_waits_for_it(run_dir, shape, spawn, events):
    waiting = spawn(post, run_dir, shape, "dp0000", 1.0)
    stopped = spawn(post, run_dir, shape, "dp0001", 1000.0)
    assert stopped.pipe.recv() == stopped.process.pid
    os.kill(stopped.process.pid, signal.SIGSTOP)
    waiting.end(-signal.SIGKILL)
    stopped.end(-signal.SIGKILL)
    assert {row["coordinate"]: row["stopped"] for row in events("worker_stuck")} == {"dp0000": False, "dp0001": True}


def take_all_slots(client):
    for step in range(client.arena.shape.base.count + 1):
        client.acquire(step, -1)


def test_who_waits_for_memory_is_not_stuck(run_dir, shape, spawn, events, wait_until):
    full = spawn(post, run_dir, shape, "dp0000", 0.5, take_all_slots)
    wait_until(lambda: events("backpressure"))
    full.process.join(2.0)
    assert full.process.is_alive()
    assert events("worker_stuck") == []


def test_the_next_keeper_watches_on(run_dir, shape, spawn, events, wait_until):
    stuck = spawn(post, run_dir, shape, "dp0000", 3.0)
    assert stuck.pipe.recv() == stuck.process.pid
    first, _ = keeper_status(run_dir)
    os.kill(first, signal.SIGKILL)
    launch.wait_for_end(first, 30)
    wait_until(lambda: events("keeper_adopted"))
    stuck.end(-signal.SIGKILL)
    assert events("worker_stuck")[-1]["pid"] == stuck.process.pid


def test_a_process_of_the_same_number_is_left_alone(run_dir, shape, spawn, events, monkeypatch):
    def another(pipe):
        monkeypatch.setattr("checkpointing.keeper.client.process_start_time", lambda pid: 1)
        post(pipe, run_dir, shape, "dp0000", 0.3)

    worker = spawn(another)
    assert worker.pipe.recv() == worker.process.pid
    worker.process.join(1.5)
    assert worker.process.is_alive()
    assert [row["pid"] for row in events("worker_unwatched")] == [worker.process.pid]
