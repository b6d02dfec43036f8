"""The write-ahead log: bases in rotation, gradients of every step, and redo to the very bits of the live run."""

from __future__ import annotations

import os
import signal
import threading

import pytest
import torch

from checkpointing import records
from checkpointing.keeper.control import stop_keeper
from checkpointing.keeper.protocol import KeeperError
from checkpointing.materialise import whole
from checkpointing.records import Kind, State
from checkpointing.recover import Recovery
from checkpointing.recovery import RecoveryError, plan_recovery
from checkpointing.state.gradients import StepLog
from checkpointing.store import Checkpoint, list_checkpoints, verify
from checkpointing.tensorfile import read_metadata

pytestmark = pytest.mark.drill


def slots_of(job, rank, kind):
    """Step -> view of the sealed records of a kind."""
    found = {}
    for place, view in zip(job.clients[rank].arena.places, job.clients[rank].arena.slots, strict=True):
        if place.kind is kind and records.state_of(view) is State.SEALED:
            found[records.read_header(view).step] = view
    return found


def flip(view):
    view[records.read_header(view).payload_offset + 5] ^= 0x10


def recovered(job):
    """Restore over garbage that is finite; returns the plan."""
    for buffers in job.buffers:
        for buffer in buffers:
            buffer.tensor.fill_(0.5)
    plan, extras, _ = job.recover()
    if plan.step >= 0:
        assert [e["rng"] for e in extras] == [f"rank {r} step {plan.step}".encode() for r in range(job.world)]
    return plan


@pytest.mark.parametrize("rotation", [2, 3, 7])
@pytest.mark.parametrize("last", [1, 2, 5, 11])
def test_the_newest_step_is_redone_from_bases_of_different_steps(make_wal_job, rotation, last):
    job = make_wal_job(rotation=rotation)
    job.run(*range(1, last + 1))
    plan = recovered(job)
    assert (plan.step, plan.tier) == (last, "memory")
    assert job.state() == job.history[last]
    steps = [float(opt.state[g["params"][0]]["step"]) for opt in job.optimizers for g in opt.param_groups]
    assert steps == [last] * 4


def test_gradients_that_were_clipped_after_they_were_logged_are_clipped_again(make_wal_job):
    job = make_wal_job(rotation=4, dtype="bfloat16")
    job.run(*range(1, 8))
    assert recovered(job).step == 7
    assert job.state() == job.history[7]


@pytest.mark.parametrize("in_time", [True, False])
def test_memory_that_was_reserved_is_taken_in_time_or_late(make_wal_job, monkeypatch, wait_until, in_time):
    """In time the thread that starts the capture queues its copies; late, the capture's own does. None is lost."""
    job = make_wal_job(world=1, rotation=3)
    job.run(1)
    (capturer,), (client,) = job.capturers, job.clients
    started, queued = threading.Event(), []
    acquire, queue, start = client.acquire, capturer._copies.queue, capturer.start

    def acquire_late(*args):
        assert in_time or started.wait(30)
        return acquire(*args)

    def start_then(*args, **options):
        if in_time:
            wait_until(lambda: capturer._reserved is not None)
        start(*args, **options)
        started.set()

    def noted(freight):
        queued.append(threading.current_thread().name)
        queue(freight)

    monkeypatch.setattr(client, "acquire", acquire_late)
    monkeypatch.setattr(capturer, "start", start_then)
    monkeypatch.setattr(capturer._copies, "queue", noted)
    for step in range(2, 12):
        started.clear()
        capturer.reserve(step, capturer.sealed_step, log=True)
        job.run(step)
    assert queued == [threading.current_thread().name if in_time else "capture"] * 10
    monkeypatch.undo()
    assert recovered(job).step == 11
    assert job.state() == job.history[11]


def test_what_goes_wrong_when_copies_are_queued_is_told_by_the_wait(make_wal_job, wait_until):
    job = make_wal_job(world=1)
    job.run(1)
    (capturer,) = job.capturers
    capturer.reserve(2, 1, log=True)
    wait_until(lambda: capturer._reserved is not None)
    groups = [{"step": 1.0}] * 2
    short = StepLog([torch.zeros(3), torch.zeros(77)], [], groups)
    capturer.start(2, {}, 1, job.protections[0].due(2)[:1], short, least=1)
    with pytest.raises(KeeperError, match=r"a gradient of 3 x torch\.float32 is not of the log's layout"):
        capturer.wait_copied()


def test_memory_is_not_reserved_twice(make_wal_job):
    job = make_wal_job(world=1)
    job.run(1)
    (capturer,) = job.capturers
    capturer.reserve(2, 1, log=True)
    capturer.reserve(3, 1, log=True)
    with pytest.raises(KeeperError, match="not captured yet"):
        capturer.wait_sealed(2)


def test_training_goes_on_from_a_redone_step_as_if_nothing_had_happened(make_wal_job):
    calm = make_wal_job(world=1)
    calm.run(*range(1, 10))
    calm.run(10, 11, 12)
    want = calm.history[12]
    recovered(calm)
    for capturer in calm.capturers:
        capturer.close()
    calm.begin()
    calm.run(13)
    disturbed = calm.history[13]
    recovered(calm)
    assert calm.state() == disturbed != want


def test_a_step_that_only_one_rank_has_is_discarded_and_the_one_before_is_redone(make_wal_job):
    job = make_wal_job()
    job.run(1, 2, 3, 4)
    log_less = job.protections[0].due(5)[:1]
    job.capturers[0].start(5, {"rng": b""}, 4, log_less)
    job.capturers[0].wait_sealed(5)
    assert recovered(job).step == 4
    assert job.state() == job.history[4]


def test_a_flip_in_a_log_hides_all_steps_that_need_it(make_wal_job, events):
    job = make_wal_job(rotation=3)
    job.run(*range(1, 8))
    flip(slots_of(job, 1, Kind.LOG)[7])
    assert recovered(job).step == 6
    assert job.state() == job.history[6]
    (row,) = events("quarantined")
    assert (row["coordinate"], row["step"]) == ("dp0001", 7)


def test_a_flip_in_the_newest_base_is_bridged_by_the_part_s_older_base(make_wal_job):
    """Nothing is lost: the log reaches back to the base before, if that has not been overwritten yet."""
    job = make_wal_job(rotation=3)
    job.run(*range(1, 8))
    flip(slots_of(job, 0, Kind.BASE)[7])
    plan = recovered(job)
    assert plan.step in (6, 7)
    assert job.state() == job.history[plan.step]


def die_after(pipe, make_wal_job, last, options):
    torch.set_num_threads(1)  # a forked process has none of its parent's compute threads
    job = make_wal_job(**options)
    for step in range(1, last):
        job.run(step)
    job.step(last, wait=False)
    pipe.send("copied")
    pipe.recv()


def test_what_is_copied_when_the_worker_dies_is_sealed_by_the_keeper(run_dir, make_wal_job, wal_job_class, spawn):
    worker = spawn(die_after, make_wal_job, 6, {"rotation": 4})
    worker.expect("copied")
    os.kill(worker.process.pid, signal.SIGKILL)
    worker.end(-signal.SIGKILL)
    job = make_wal_job(rotation=4, attempt=1)
    assert recovered(job).step == 6
    torch.set_num_threads(1)
    calm = wal_job_class(run_dir / "calm", rotation=4)
    calm.run(*range(1, 7))
    assert job.state() == calm.history[6]
    calm.close()
    stop_keeper(run_dir / "calm", persist=False)


DISK = {"every": 4, "keep_last": 2}


def test_whole_steps_go_to_disk_while_the_rotation_goes_on(run_dir, make_wal_job, events, wait_until):
    job = make_wal_job(rotation=3, disk=DISK, whole=(4, 8, 12))
    for step in range(1, 14):
        job.run(step)
        wait_until(lambda step=step: step % 4 or step in [s for s, _ in list_checkpoints(run_dir / "checkpoints")])
    wait_until(lambda: [s for s, _ in list_checkpoints(run_dir / "checkpoints")] == [8, 12])
    assert all(Checkpoint.open(path).is_whole for _, path in list_checkpoints(run_dir / "checkpoints"))
    assert not events("backpressure")
    assert not events("disk_skipped")
    assert recovered(job).step == 13
    assert job.state() == job.history[13]


def test_a_keeper_that_leaves_in_the_middle_of_a_window_writes_it_and_its_log(run_dir, make_wal_job):
    job = make_wal_job(rotation=4, disk=DISK, whole=(4,))
    job.run(*range(1, 8))
    history, state = job.history, job.state()
    job.close()
    assert stop_keeper(run_dir)
    step, path = list_checkpoints(run_dir / "checkpoints")[-1]
    assert step == 7
    assert not Checkpoint.open(path).is_whole
    again = make_wal_job(rotation=4, disk=DISK, attempt=1)
    plan = recovered(again)
    assert (plan.step, plan.tier) == (7, "disk")
    assert again.state() == state == history[7]


def test_a_window_on_disk_becomes_a_whole_checkpoint_by_redo(run_dir, make_wal_job, tmp_path):
    job = make_wal_job(rotation=4, disk=DISK, whole=(4,))
    job.run(*range(1, 8))
    want = {b.name + str(r): b.tensor.clone() for r, buffers in enumerate(job.buffers) for b in buffers}
    units = [
        (span.range, b.name + str(r), span.offset) for r, bs in enumerate(job.buffers) for b in bs for span in b.spans
    ]
    job.close()
    assert stop_keeper(run_dir)
    window = Checkpoint.open(list_checkpoints(run_dir / "checkpoints")[-1][1])
    done = whole(window, tmp_path / "scratch")
    assert done.is_whole
    assert (done.step, verify(done.path)) == (7, [])
    for named, buffer, offset in units:
        assert torch.equal(torch.from_numpy(done.read(named)), want[buffer][offset : offset + named.size]), named
    assert done.extras("dp0001")["rng"] == b"rank 1 step 7"
    assert whole(done, tmp_path / "unused") is done
    told = [read_metadata(c.file_of(name))["partitions"] for c in (window, done) for name in c.manifest["coordinates"]]
    assert len(set(told)) == len(told) // 2, "an export needs to know how the partitions lay"


def test_a_log_of_another_torch_is_redone_only_on_request(run_dir, make_wal_job, tmp_path):
    job = make_wal_job(rotation=4, disk=DISK, options={"metadata": {"device": "cuda", "torch": "1.0"}})
    job.run(1, 2, 3)
    job.close()
    assert stop_keeper(run_dir)
    window = Checkpoint.open(list_checkpoints(run_dir / "checkpoints")[-1][1])
    with pytest.raises(RecoveryError, match=r"by torch 1\.0.*--inexact"):
        whole(window, tmp_path / "scratch")
    assert whole(window, tmp_path / "scratch", inexact=True).is_whole


def test_the_keeper_killed_alone_keeps_the_window(make_wal_job):
    job = make_wal_job(rotation=3)
    job.run(1, 2, 3, 4)
    os.kill(job.clients[0].keeper_pid, signal.SIGKILL)
    job.run(5, 6)
    assert recovered(job).step == 6
    assert job.state() == job.history[6]


def test_memory_of_an_older_course_does_not_block_a_new_window(run_dir, make_wal_job, wait_until):
    job = make_wal_job(rotation=3, disk=DISK, whole=(4, 8))
    job.run(*range(1, 10))
    wait_until(lambda: [s for s, _ in list_checkpoints(run_dir / "checkpoints")] == [4, 8])
    for rank in range(2):
        for view in slots_of(job, rank, Kind.LOG).values():
            flip(view)
        for view in slots_of(job, rank, Kind.EXTRAS).values():
            flip(view)
    plan = recovered(job)
    assert (plan.step, plan.tier) == (8, "disk")
    assert job.state() == job.history[8]
    for capturer in job.capturers:
        capturer.close()
    job.begin()
    job.run(9, 10, 11)
    assert recovered(job).step == 11


def test_a_part_left_with_an_old_base_is_captured_again_before_the_log_is_full(make_wal_job):
    """Else the steps to redo would outgrow the slots of the log, and no capture would ever find room again."""
    job = make_wal_job(rotation=3)
    job.run(*range(1, 9))
    flip(slots_of(job, 1, Kind.BASE)[8])
    targets = [job.target(rank) for rank in range(2)]
    ranks = [Recovery(client, job.run_dir, t) for client, t in zip(job.clients, targets, strict=True)]
    plan = plan_recovery([rank.report() for rank in ranks])
    for rank in ranks:
        rank.apply(plan)
    assert (plan.step, targets[1].applied) == (8, [6, 7, 8])
    outgrown = [p.outgrown(8, t.bases) for p, t in zip(job.protections, targets, strict=True)]
    assert [[f.parts for f in fragments] for fragments in outgrown] == [[], [(8 % 3,)]]
    for capturer in job.capturers:
        capturer.close()
    job.begin()
    job.capturers[1].start(8, {"rng": b"rank 1 step 8", "empty": b""}, -1, outgrown[1])
    job.capturers[1].wait_copied()
    job.run(*range(9, 15))
    assert recovered(job).step == 14
    assert job.state() == job.history[14]


def test_without_gradients_a_skipped_step_is_a_step(make_wal_job):
    job = make_wal_job(world=1, rotation=3)
    job.run(1, 2)
    before = job.state()
    groups = [{"lr": 1.0, "step": 2.0}] * 2
    job.capturers[0].start(3, {"rng": b"rank 0 step 3"}, 2, job.protections[0].due(3)[:1], StepLog([], [], groups))
    job.capturers[0].wait_copied()
    job.run(4)
    plan = recovered(job)
    assert plan.step == 4
    assert job.state() == job.history[4] != before


def test_gradients_are_not_changed_by_redo(make_wal_job):
    """Twice the same recovery: redo reads records and leaves them as they are."""
    job = make_wal_job(rotation=5)
    job.run(*range(1, 9))
    recovered(job)
    first = [b.tensor.clone() for buffers in job.buffers for b in buffers]
    recovered(job)
    assert all(torch.equal(a, b.tensor) for a, b in zip(first, [b for bs in job.buffers for b in bs], strict=True))
