"""Slow, full, hung and unreachable disks: said in events, never in the way of captures or of recovery from memory."""

from __future__ import annotations

import errno
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from checkpointing.audit import audit
from checkpointing.compare import compare
from checkpointing.keeper.control import keeper_status, stop_keeper
from checkpointing.keeper.diskfault import DiskFault
from checkpointing.keeper.health import DiskHealth
from checkpointing.keeper.protocol import KeeperRefused
from checkpointing.materialise import whole
from checkpointing.recover import Recovery
from checkpointing.recovery import RecoveryError, check_readable, memory_suffices, plan_recovery
from checkpointing.restore import Target
from checkpointing.storage import place_of
from checkpointing.store import Checkpoint, list_checkpoints, verify

DISK = {"every": 2, "keep_last": 2, "hung_after_s": 0.3}


def steps_on_disk(run_dir: Path) -> list[int]:
    return [step for step, _ in list_checkpoints(run_dir / "checkpoints")]


@pytest.mark.drill
def test_a_slow_disk_is_said_and_hinders_no_capture(run_dir, make_job, events, wait_until):
    # 24 kB at 20 kB/s take more than a second, many captures long.
    job = make_job(disk=DISK, options={"disk_fault": {"kind": "throttle", "bytes_per_s": 20_000, "last": 2}})
    job.begin()
    for step in range(1, 9):
        job.step(step)
    assert job.capturers[0].sealed_step == 8
    assert events("disk_written") == [], "all captures were sealed while the first write went on"
    wait_until(lambda: events("disk_slow"))
    (slow,) = events("disk_slow")
    assert (slow["step"], slow["due"]) == (2, 4)
    wait_until(lambda: [row["step"] for row in events("disk_skipped")] == [4, 6])
    wait_until(lambda: [row["step"] for row in events("disk_written")] == [2, 8])
    assert events("disk_written")[0]["seconds"] > 1
    assert events("disk_hung") == []


@pytest.mark.drill
def test_a_full_disk_is_tried_again_at_later_steps(run_dir, make_job, events, wait_until):
    job = make_job(disk=DISK, options={"disk_fault": {"kind": "full", "first": 4, "last": 6}})
    job.begin()
    for step in range(1, 7):
        job.step(step)
        wait_until(
            lambda step=step: step % 2 or step in [r["step"] for r in events("disk_written") + events("disk_failed")]
        )
    failed = events("disk_failed")
    assert [(row["step"], row["retry_after_s"]) for row in failed] == [(4, 0.0), (6, 1.0)]
    assert all("No space left" in row["error"] for row in failed)
    assert (steps_on_disk(run_dir), list((run_dir / "checkpoints").glob("*.tmp"))) == ([2], [])
    _, status = keeper_status(run_dir)
    assert status["disk"]["failures"] == 2
    assert "No space left" in status["disk"]["problem"]
    job.run(8)
    wait_until(lambda: [row["step"] for row in events("disk_skipped")] == [8])
    assert "the last 2 writes failed" in events("disk_skipped")[0]["reason"]
    wait_until(lambda: time.time() > failed[1]["time"] + 1.01)
    job.run(10)
    wait_until(lambda: steps_on_disk(run_dir) == [2, 10])


@pytest.mark.drill
def test_a_hung_disk_is_said_and_memory_recovers_without_waiting(run_dir, make_job, spawn, events, wait_until):
    job = make_job(world=1, disk=DISK, options={"disk_fault": {"kind": "hang", "seconds": 6}})
    job.begin()
    for step in range(1, 8):
        job.step(step)
    wait_until(lambda: events("disk_hung"))
    (hung,) = events("disk_hung")
    assert hung["step"] == 2
    assert 0 < hung["bytes"] < hung["total"]
    assert keeper_status(run_dir)[1]["disk"]["writing"]["hung"]
    job.wipe()
    rank = Recovery(job.clients[0], run_dir, job.target(0))
    reports = [rank.report_memory()]
    assert memory_suffices(reports)
    extras = rank.apply(plan_recovery([{"memory": steps} for steps, _ in reports]))
    assert events("disk_written") == [], "the write still hangs"
    assert job.state() == job.history[7]
    assert extras["rng"] == b"rank 0 step 7"


@pytest.mark.drill
def test_checkpoints_lie_behind_a_url(run_dir, make_job, events, wait_until, tmp_path):
    url = f"dir::file://{tmp_path / 'elsewhere'}"
    place = place_of(url)
    disk = {**DISK, "url": url, "permanent_every": 4}
    job = make_job(disk=disk, options={"kill": {"at": "disk", "step": 2, "pids": ["keeper"]}})
    job.begin()
    for step in range(1, 11):
        job.step(step)
        wait_until(lambda step=step: step % 2 or step in [s for s, _ in list_checkpoints(place)])
    wait_until(lambda: [row["steps"] for row in events("disk_removed")] == [[2], [6]])
    assert [step for step, _ in list_checkpoints(place)] == [4, 8, 10]
    assert Checkpoint.open(place / "step-4").manifest["metadata"]["permanent"]
    assert not (run_dir / "checkpoints").exists()
    for client in job.clients:
        client.discard(after_step=-1)
    job.wipe()
    ranks = [Recovery(c, run_dir, job.target(rank), checkpoints=place) for rank, c in enumerate(job.clients)]
    # discard() took all newer ones away: what was abandoned is still there, but is not restored.
    assert [rank.report() for rank in ranks] == [{"memory": [], "disk": []}] * 2
    (place / "step-10" / "manifest.abandoned.json").copy_to(place / "step-10" / "manifest.json")
    ranks = [Recovery(None, run_dir, job.target(rank), checkpoints=place) for rank in range(2)]
    plan = plan_recovery([rank.report() for rank in ranks])
    assert [rank.apply(plan)["rng"] for rank in ranks] == [b"rank 0 step 10", b"rank 1 step 10"]
    assert job.state() == job.history[10]


@pytest.mark.drill
def test_a_window_of_the_log_lies_behind_a_url_like_any_other(run_dir, make_wal_job, tmp_path):
    place = place_of(f"dir::file://{tmp_path / 'elsewhere'}")
    job = make_wal_job(rotation=4, disk={**DISK, "every": 4, "url": str(place)}, whole=(4,))
    job.run(*range(1, 8))
    history = job.history
    job.close()
    assert stop_keeper(run_dir)
    window = Checkpoint.open(list_checkpoints(place)[-1][1])
    assert window.has_log
    assert audit(window.path) == []
    with pytest.raises(RecoveryError, match="window of the log"):
        list(compare(window, window))
    found = list(compare(whole(window, tmp_path / "a"), whole(window, tmp_path / "b")))
    assert found
    assert all(f.equal for f in found)
    job.make_state()
    ranks = [Recovery(None, run_dir, job.target(rank), checkpoints=place) for rank in range(2)]
    plan = plan_recovery([rank.report() for rank in ranks])
    for rank in ranks:
        rank.apply(plan)
    assert (plan.step, job.state()) == (7, history[7])


@pytest.mark.drill
def test_a_url_without_its_package_is_refused(run_dir, make_job):
    with pytest.raises(KeeperRefused, match="adlfs"):
        make_job(world=1, disk={**DISK, "url": "abfs://box/c"})


def test_no_run_begins_afresh_while_its_checkpoints_cannot_be_read(tmp_path, monkeypatch):
    place = place_of(f"memory://{tmp_path.name}")

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("no route to host")

    monkeypatch.setattr(type(place.fs), "info", refuse)
    rank = Recovery(None, tmp_path, Target([], "dp0000"), checkpoints=place)
    report = rank.report()
    assert report == {"memory": [], "disk": []}
    assert "no route to host" in rank.problems[0]
    # Another rank that can read it must not go on without this one, be it afresh or from an older step.
    for theirs in ([], [5]):
        plan = plan_recovery([report, {"memory": [], "disk": theirs}])
        with pytest.raises(RecoveryError, match=r"no route to host.*going on without it could cost what it holds"):
            check_readable(plan, [rank.unreadable, ""])
    check_readable(plan_recovery([{"memory": [7]}] * 2), [rank.unreadable, ""])


@pytest.mark.drill
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
def test_a_disk_that_is_really_full(run_dir, make_job, events, wait_until):
    folder = run_dir / "checkpoints"
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", str(folder)]
    if subprocess.run(mount, timeout=30, check=False, capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount")
    try:
        job = make_job(disk={"every": 2, "keep_last": 5, "hung_after_s": 9})
        job.begin()
        for step in range(1, 9):
            job.step(step)
            wait_until(
                lambda step=step: (
                    step % 2 or step in [r["step"] for r in events("disk_written") + events("disk_failed")]
                )
            )
        written, (failed, *_) = [row["step"] for row in events("disk_written")], events("disk_failed")
        assert written
        assert failed["step"] == written[-1] + 2
        assert "are free" in failed["error"]
        assert steps_on_disk(run_dir) == written
        assert all(verify(folder / f"step-{step}") == [] for step in written)
        assert not list(folder.glob("*.tmp"))
        assert job.capturers[0].sealed_step == 8
    finally:
        for client in job.clients:
            client.close()
        subprocess.run(["umount", "-l", str(folder)], timeout=30, check=True)


class Timers:
    """Timers that go off when they are told to."""

    def __init__(self) -> None:
        self.set: dict[str, tuple[float, Any]] = {}

    def __call__(self, name: str, seconds: float | None, function: Any = None) -> None:
        self.set.pop(name, None)
        if seconds is not None:
            self.set[name] = (seconds, function)

    def fire(self) -> None:
        ((name, (_, function)),) = self.set.items()
        del self.set[name]
        function()


def test_failures_are_followed_by_ever_longer_pauses(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("checkpointing.keeper.health.time.monotonic", lambda: now[0])
    rows: list[tuple[str, int]] = []
    health = DiskHealth(Timers(), lambda kind, step, **_: rows.append((kind, step)))
    pauses = []
    for step in range(12):
        assert health.ready(step), "a first failure costs no pause"
        health.started(step)
        pauses.append(health.ended("full"))
        now[0] += pauses[-1]
    assert pauses == [0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 300.0, 300.0]
    health.started(12)
    health.ended("full")
    assert not health.ready(13)
    assert not health.ready(13), "each rank's seal asks"
    assert not health.ready(14)
    assert rows == [("disk_skipped", 13), ("disk_skipped", 14)]
    now[0] += 300
    health.started(15)
    assert health.ended("") == 0
    assert health.ready(16)


def test_a_write_without_progress_is_hung_and_one_that_moves_again_is_not(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("checkpointing.keeper.health.time.monotonic", lambda: now[0])
    rows: list[str] = []
    timers = Timers()
    health = DiskHealth(timers, lambda kind, step, **_: rows.append(kind))
    health.hung_after_s = 10
    health.started(2)
    now[0] = 9
    health.progress(1, 4)
    now[0] = 10
    timers.fire()
    assert (rows, timers.set["disk health"][0]) == ([], 9)
    for now[0] in (19.5, 29.5):
        timers.fire()
    assert rows == ["disk_hung"], "said once"
    health.progress(2, 4)
    now[0] = 30
    timers.fire()
    assert rows == ["disk_hung", "disk_resumed"]
    health.behind(2)
    health.behind(4)
    health.behind(6)
    assert rows[2:] == ["disk_slow"]
    health.ended("")
    assert timers.set == {}


def test_faults_strike_their_steps_only():
    full = DiskFault({"kind": "full", "first": 4, "last": 6})
    for step in (3, 7):
        full.strike(step, 9, 10)
    full.strike(4, 4, 10)
    with pytest.raises(OSError, match="No space left") as raised:
        full.strike(4, 5, 10)
    assert raised.value.errno == errno.ENOSPC
    slept: list[float] = []
    hang = DiskFault({"kind": "hang", "seconds": 7}, slept.append)
    for written in range(11):
        hang.strike(4, written, 10)
    assert slept == [7.0], "once in each write"
    slow = DiskFault({"kind": "throttle", "bytes_per_s": 100}, slept.append)
    slow.strike(4, 50, 100)
    assert slept[1] == pytest.approx(0.5, abs=0.1)
    assert DiskFault.parse(None) is None
