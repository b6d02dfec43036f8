"""The keeper as a process: single, detached from its starter, and not the only copy of anything."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from checkpointing import records
from checkpointing.keeper import launch, memory
from checkpointing.keeper.client import KeeperClient
from checkpointing.keeper.control import stop_keeper
from checkpointing.keeper.protocol import Inbox, KeeperError, KeeperRefused, TooLittleMemory, receive_one, send_all
from checkpointing.records import Kind, State, state_of
from checkpointing.slots import ArenaShape, Pool

ROOT = Path(__file__).resolve().parents[2]
FINGERPRINT = "0123456789abcdef"

pytestmark = pytest.mark.drill


def start_in_own_group(run_dir: Path) -> None:
    """Start a keeper from a process group that is then killed as launchers kill theirs."""
    program = (
        "import os, signal, sys; from pathlib import Path; from checkpointing.keeper.launch import start;"
        f"start(Path(sys.argv[1]), '{FINGERPRINT}', 60); os.killpg(0, signal.SIGKILL)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(run_dir)], cwd=ROOT, start_new_session=True, timeout=60, check=False
    )
    assert done.returncode == -signal.SIGKILL


def test_two_starters_get_one_keeper(run_dir, events):
    threads = [threading.Thread(target=launch.start, args=(run_dir, FINGERPRINT, 60)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(events("keeper_started")) == 1
    info = launch.read_info(run_dir)
    assert launch.is_alive(info)
    assert (run_dir / "keeper.json").stat().st_mode & 0o777 == 0o600
    assert Path(info.socket).stat().st_mode & 0o777 == 0o600


def test_the_keeper_outlives_its_starters_group_and_imports_no_torch(run_dir):
    start_in_own_group(run_dir)
    info = launch.read_info(run_dir)
    assert launch.is_alive(info)
    maps = Path(f"/proc/{info.pid}/maps").read_text()
    assert "libtorch" not in maps
    assert os.getsid(info.pid) not in (os.getsid(0), info.pid)
    for fd in (0, 1, 2):
        assert os.readlink(f"/proc/{info.pid}/fd/{fd}") in (os.devnull, str(run_dir / "keeper.log"))


@pytest.mark.parametrize("theirs", [{}, {"records": 3}])
def test_a_keeper_of_other_records_is_refused_with_what_to_do(run_dir, make_job, theirs):
    make_job().run(1)
    file = run_dir / "keeper.json"
    values = json.loads(file.read_text())
    assert values.pop("records") == records.VERSION == 2
    file.write_text(json.dumps(values | theirs))
    try:
        with pytest.raises(KeeperRefused, match=r"of version [13], not 2: 'planaria keeper stop "):
            launch.connect_or_start(run_dir, FINGERPRINT, 60)
    finally:
        launch.write_info(run_dir, launch.KeeperInfo(**values, records=records.VERSION))


def test_a_wrong_token_and_another_recipe_are_refused(run_dir, make_job):
    job = make_job(world=1)
    sock, _ = launch.connect(run_dir)
    with sock:
        send_all(sock, {"op": "inventory", "id": 1, "token": "guess"})
        answer, _ = receive_one(sock, Inbox())
    assert answer["refused"]
    assert "token" in answer["error"]
    with pytest.raises(KeeperRefused, match="another run folder"):
        KeeperClient.attach(run_dir, "dp0001", ["dp0001"], job.protections[0].shape, "f" * 16)


def test_a_coordinate_of_a_living_worker_is_not_given_away(run_dir, make_job, spawn):
    job = make_job(world=1, attempt=3)

    def intrude(pipe, attempt):
        try:
            KeeperClient.attach(run_dir, "dp0000", ["dp0000"], job.protections[0].shape, FINGERPRINT, attempt=attempt)
            pipe.send("attached")
        except KeeperRefused as error:
            pipe.send("refused" if "living process" in str(error) else str(error))

    spawn(intrude, 3).expect("refused")
    job.run(1)


def test_too_little_memory_is_refused_with_the_bytes(run_dir, make_job, events):
    job = make_job(world=1)
    shape = job.clients[0].arena.shape
    count = memory.available_bytes() // shape.base.slot_bytes + 1000
    larger = replace(shape, base=replace(shape.base, count=count))
    with pytest.raises(TooLittleMemory, match=r"needs [\d,]+ bytes .* are available"):
        KeeperClient.attach(run_dir, "dp0001", ["dp0000", "dp0001"], larger, FINGERPRINT)
    job.run(1)


def test_a_keeper_that_had_no_memory_for_anyone_leaves_at_once(run_dir, wait_until):
    count = memory.available_bytes() // (1 << 20) + 1000
    too_large = ArenaShape(Pool(count, 0, 1 << 20), Pool(0, 0, 0), 1)
    with pytest.raises(TooLittleMemory):
        KeeperClient.attach(run_dir, "dp0000", ["dp0000"], too_large, FINGERPRINT, linger_s=600)
    wait_until(lambda: launch.read_info(run_dir) is None)


def test_a_long_run_folder_gets_a_short_socket(tmp_path):
    folder = tmp_path / ("long" * 30)
    launch.start(folder, FINGERPRINT, 60)
    try:
        info = launch.read_info(folder)
        assert len(info.socket) <= 107
        assert not info.socket.startswith(str(folder))
        sock, _ = launch.connect(folder)
        sock.close()
    finally:
        assert stop_keeper(folder)
    assert not Path(info.socket).exists()


def test_it_leaves_when_it_has_no_workers_for_too_long(run_dir, make_job, events):
    job = make_job(world=1, options={"linger_s": 0.2})
    job.run(1, 2)
    pid = job.clients[0].keeper_pid
    job.close()
    launch.wait_for_end(pid, 30)
    assert events("keeper_exit")[0]["reason"] == "no workers"
    assert not (run_dir / "keeper.json").exists()


def test_finish_ends_it_once_all_workers_are_done(run_dir, make_job, events):
    job = make_job(disk={"every": 0, "keep_last": 2})
    job.run(1, 2, 3)
    for capturer in job.capturers:
        capturer.close()
    steps = []
    threads = [threading.Thread(target=lambda c=c: steps.append(c.finish(persist=True))) for c in job.clients]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert steps == [3, 3]
    launch.wait_for_end(job.clients[0].keeper_pid, 30)
    assert events("worker_gone") == []
    assert (run_dir / "checkpoints" / "step-3" / "manifest.json").exists()
    with pytest.raises(KeeperError, match="closed"):
        job.clients[0].inventory()


def test_killed_alone_it_is_replaced_and_nothing_is_lost(run_dir, make_job, events):
    job = make_job()
    job.run(1, 2, 3)
    first = job.clients[0].keeper_pid
    os.kill(first, signal.SIGKILL)
    job.run(4, 5)
    assert {c.keeper_pid for c in job.clients} != {first}
    assert len({c.keeper_pid for c in job.clients}) == 1
    assert {row["coordinate"] for row in events("keeper_adopted")} == {"dp0000", "dp0001"}
    job.wipe()
    plan, extras, _ = job.recover()
    assert (plan.step, plan.tier) == (5, "memory")
    assert job.state() == job.history[5]
    assert extras[1]["rng"] == b"rank 1 step 5"


def test_killed_while_a_capture_is_half_way_the_capture_is_kept(run_dir, make_job, events):
    kills = []

    def reached(point, step):
        if step == 3 and not kills:
            kills.append(job.clients[0].keeper_pid)
            os.kill(kills[0], signal.SIGKILL)

    job = make_job(reached=reached)
    job.run(1, 2, 3, 4)
    assert kills
    plan, _, _ = job.recover()
    assert plan.step == 4
    assert job.state() == job.history[4]


def test_back_pressure_is_visible_and_ends(run_dir, make_job, events):
    job = make_job(world=2)
    job.begin()
    slow, fast = job.capturers
    for step in (1, 2, 3, 4):
        fast.start(step, {}, -1, job.protections[1].fragments)
        if step < 4:
            fast.wait_sealed(step)
    # The other rank has nothing sealed, so that nothing is committed and all three generations are taken.
    while not events("backpressure"):
        assert fast.sealed_step <= 3
    slots = job.clients[1].arena.slots
    assert [state_of(s) for s, p in zip(slots, job.clients[1].arena.shape.slots(), strict=True)
            if p.kind is Kind.BASE] == [State.SEALED] * 3  # fmt: skip
    for step in (1, 2):
        slow.start(step, {}, -1, job.protections[0].fragments)
        slow.wait_sealed(step)
    fast.wait_sealed(4)
    row = events("backpressure")[0]
    assert (row["coordinate"], row["step"]) == ("dp0001", 4)
