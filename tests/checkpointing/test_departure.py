"""When a keeper ends, when it must not, and what it leaves alone."""

from __future__ import annotations

import os
import shutil
import signal

import pytest

from checkpointing.keeper import launch
from checkpointing.keeper.client import KeeperClient
from checkpointing.keeper.control import stop_keeper
from checkpointing.keeper.protocol import KeeperError
from checkpointing.store import list_checkpoints

FINGERPRINT = "0123456789abcdef"
FINAL = {"every": 0, "keep_last": 2}

pytestmark = pytest.mark.drill


def steps_on_disk(run_dir):
    return [step for step, _ in list_checkpoints(run_dir / "checkpoints")]


def remove(run_dir):
    """Again, where the keeper wrote an event just then: the folder was not empty."""
    while run_dir.exists():
        shutil.rmtree(run_dir, ignore_errors=True)


def replace(run_dir):
    """What a user does who starts over: the folder goes, and a run of the same name gets another keeper."""
    remove(run_dir)
    launch.start(run_dir, FINGERPRINT, 60)
    return launch.read_info(run_dir)


@pytest.mark.parametrize("recreated", [True, False])
def test_a_keeper_of_a_deleted_run_leaves_without_touching_the_folder(run_dir, make_job, events, recreated):
    job = make_job(world=1, disk=FINAL)
    job.run(1, 2)
    old = job.clients[0].keeper_pid
    job.close()
    new = replace(run_dir) if recreated else remove(run_dir)
    os.kill(old, signal.SIGTERM)
    launch.wait_for_end(old, 30)
    if not recreated:
        assert not run_dir.exists()
        return
    assert new.pid != old
    assert launch.read_info(run_dir) == new
    sock, _ = launch.connect(run_dir)
    sock.close()
    assert [row["kind"] for row in events()] == ["keeper_started"]
    assert not (run_dir / "checkpoints").exists()


def test_a_keeper_of_a_deleted_run_writes_no_step_into_the_new_one(run_dir, make_job, events):
    job = make_job(world=1, disk={"every": 2, "keep_last": 2})
    job.run(1)
    old = job.clients[0].keeper_pid
    new = replace(run_dir)
    job.run(2, 3, 4)
    job.capturers[0].close()
    with pytest.raises(KeeperError, match="was removed, or is another run's"):
        job.clients[0].finish(persist=True)
    launch.wait_for_end(old, 30)
    assert launch.read_info(run_dir) == new
    assert [row["kind"] for row in events()] == ["keeper_started"]
    assert not (run_dir / "checkpoints").exists()


def test_a_finish_that_cannot_write_leaves_the_keeper_for_another_try(run_dir, make_job, events):
    job = make_job(world=1, disk=FINAL)
    job.run(1, 2, 3)
    # Where the folder should be there is a file: for root, too, a disk that cannot be written.
    (run_dir / "checkpoints").touch()
    job.capturers[0].close()
    keeper = job.clients[0].keeper_pid
    with pytest.raises(KeeperError, match=r"step 3 could not be written .* stays with it in memory"):
        job.clients[0].finish(persist=True)
    assert events("keeper_stays")[0]["reason"] == "finished"
    (run_dir / "checkpoints").unlink()
    again = make_job(world=1, attempt=1, disk=FINAL)
    assert again.clients[0].keeper_pid == keeper
    plan, _, _ = again.recover()
    assert (plan.step, plan.tier) == (3, "memory")
    assert again.state() == job.history[3]
    assert again.clients[0].finish(persist=True) == 3
    launch.wait_for_end(keeper, 30)
    assert steps_on_disk(run_dir) == [3]


def test_without_workers_it_tries_to_write_until_it_can(run_dir, make_job, events, wait_until):
    job = make_job(world=1, disk=FINAL, options={"linger_s": 0.1})
    job.run(1, 2)
    (run_dir / "checkpoints").touch()
    job.close()
    wait_until(lambda: len(events("keeper_stays")) == 2)
    assert {(row["reason"], row["step"]) for row in events("keeper_stays")} == {("no workers", 2)}
    (run_dir / "checkpoints").unlink()
    launch.wait_for_end(job.clients[0].keeper_pid, 30)
    assert steps_on_disk(run_dir) == [2]
    assert not (run_dir / "keeper.json").exists()


def test_a_stop_that_cannot_write_is_refused_and_one_that_discards_is_not(run_dir, make_job):
    job = make_job(world=1, disk=FINAL)
    job.run(1, 2)
    (run_dir / "checkpoints").touch()
    with pytest.raises(KeeperError, match="step 2 could not be written"):
        stop_keeper(run_dir)
    job.run(3)
    job.close()
    assert stop_keeper(run_dir, persist=False)
    assert not launch.is_alive(launch.read_info(run_dir))


def test_a_stop_writes_the_newest_step_first(run_dir, make_job):
    job = make_job(world=1, disk=FINAL)
    job.run(1, 2)
    job.close()
    assert stop_keeper(run_dir)
    assert steps_on_disk(run_dir) == [2]
    assert not stop_keeper(run_dir)


def test_it_does_not_leave_before_its_first_worker_came(run_dir, make_job):
    launch.start(run_dir, FINGERPRINT, 0)
    started = launch.read_info(run_dir)
    launch.wait_for_end(started.pid, 0.5)
    assert launch.is_alive(started)
    job = make_job(world=1, options={"linger_s": 0})
    assert job.clients[0].keeper_pid == started.pid
    job.run(1)
    job.close()
    launch.wait_for_end(started.pid, 30)
    assert not launch.is_alive(started)


def test_an_answer_that_cannot_be_read_fails_every_request(make_job):
    job = make_job(world=1)
    job.run(1)
    client = job.clients[0]
    client._inbox._bytes += b"\x04\0\0\0junk"
    with pytest.raises(KeeperError, match="the keeper is lost"):
        client.inventory()
    with pytest.raises(KeeperError, match="the keeper is lost"):
        client.inventory()


def test_a_keeper_that_says_nothing_is_named(make_job, monkeypatch):
    monkeypatch.setattr("checkpointing.capture._SIGN_OF_LIFE_S", 0.05)
    monkeypatch.setattr(KeeperClient, "patience_s", 0.5)
    job = make_job(world=1)
    job.run(1)
    keeper = job.clients[0].keeper_pid
    os.kill(keeper, signal.SIGSTOP)
    try:
        job.capturers[0].start(2, {}, 1, job.protections[0].fragments)
        with pytest.raises(KeeperError, match=rf"pid {keeper}\) has not said anything"):
            job.capturers[0].wait_copied()
    finally:
        os.kill(keeper, signal.SIGCONT)
    job.capturers[0].wait_sealed(2)
