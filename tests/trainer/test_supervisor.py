"""Starting, watching and ending processes; they are Python one-liners here."""

import os
import select
import signal
import sys

import pytest

from trainer.supervisor import Signals, Workers

# Says hello on the board, as workers do, then waits.
HELLO = (
    "import os, sys, time; sys.path.insert(0, os.environ['ROOT']); from checkpointing.phases import Board;"
    "board = Board(int(os.environ['PLANARIA_BOARD'])); rank = int(os.environ['RANK']);"
)


@pytest.fixture
def make(pytestconfig):
    stuck = []

    def start(body, count=2, import_s=60.0):
        environment = {**os.environ, "ROOT": str(pytestconfig.rootpath)}
        command = [sys.executable, "-c", HELLO + body]
        return Workers(command, count, environment, import_s, lambda *told: stuck.append(told))

    start.stuck = stuck
    return start


def gone(workers):
    return all(worker.status is not None and not os.path.exists(f"/proc/{worker.process.pid}") for worker in workers)


def test_all_that_end_well_are_waited_for(make):
    with Signals() as signals, make("board.post('finish', rank, 0)") as job:
        assert [worker.status for worker in job.wait(signals)] == [0, 0]
        assert [worker.board.read().step for worker in job.workers] == [0, 1]


def test_when_one_fails_the_others_end_at_once(make):
    with Signals() as signals, make("time.sleep(60 * (1 - rank)); sys.exit(3)") as job:
        ended = job.wait(signals)
        assert [(worker.rank, worker.status) for worker in ended] == [(1, 3)]
    assert gone(job.workers)
    assert job.workers[0].status == -signal.SIGKILL


def test_a_signal_is_noted_and_ends_the_waiting(make):
    before = signal.getsignal(signal.SIGTERM)
    body = "os.kill(os.getppid(), 15) if rank else None; time.sleep(60)"
    with Signals() as signals, make(body) as job:
        assert job.wait(signals) == []
        assert signals.received == [signal.SIGTERM]
    assert gone(job.workers)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_signal_during_the_start_is_found_by_the_first_wait(make):
    with Signals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        with make("time.sleep(60)") as job:
            assert job.wait(signals) == []
    assert gone(job.workers)


def test_a_worker_stopped_while_it_imports_is_killed_and_named(make):
    body = "os.kill(os.getpid(), 19) if rank else board.post('build', 0, 0); time.sleep(60)"
    with Signals() as signals, make(body, import_s=1.5) as job:
        ended = job.wait(signals)
        assert [(worker.rank, worker.status) for worker in ended] == [(1, -signal.SIGKILL)]
    worker, posted, seconds = make.stuck[0]
    assert (worker.rank, posted.phase, posted.allowed_s) == (1, "import", 1.5)
    assert 1.5 < seconds < 5


def test_who_is_watched_by_a_keeper_is_not_watched_twice(make):
    body = "board.post('build', 0, 0.3)\nfor _ in range(10): board.beat(); time.sleep(0.1)\n"
    with Signals() as signals, make(body) as job:
        assert [worker.status for worker in job.wait(signals)] == [0, 0]
    assert make.stuck == []


def test_workers_die_with_a_launcher_that_is_killed(make):
    read, write = os.pipe()
    launcher = os.fork()
    if launcher == 0:
        with make("time.sleep(60)") as job:
            os.write(write, " ".join(str(worker.process.pid) for worker in job.workers).encode())
            os.kill(os.getpid(), signal.SIGKILL)
    os.close(write)
    pids = [int(pid) for pid in os.read(read, 100).split()]
    os.close(read)
    os.waitpid(launcher, 0)
    assert len(pids) == 2
    for pid in pids:
        try:
            fd = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        assert select.select([fd], [], [], 10)[0], f"{pid} outlived its launcher"
        os.close(fd)
