"""Partial experts with a real keeper: what memory and disk restore, how old each expert is, and what is shared."""

from __future__ import annotations

import os
import signal

import pytest

from checkpointing import records
from checkpointing.audit import audit
from checkpointing.keeper.control import stop_keeper
from checkpointing.keeper.protocol import KeeperRefused
from checkpointing.partial import Ages, Experts, select
from checkpointing.protection import pec, wal
from checkpointing.records import Kind, State
from checkpointing.recover import Recovery
from checkpointing.recovery import plan_recovery
from checkpointing.restore import Target
from checkpointing.store import Checkpoint, list_checkpoints, verify
from moe.refs import ExpertRef

pytestmark = pytest.mark.drill

EXPERTS = Experts((0, 1), 4, ep=2)
DISK = {"every": 4, "keep_last": 2}


def ages_after(last: int, k: int = 1) -> Ages:
    ages = Ages.unsaved(EXPERTS).saved(0, EXPERTS.all())
    for step in range(1, last + 1):
        ages = ages.saved(step, select(EXPERTS, step, k))
    return ages


def recovered(job):
    """Restore over other bytes; returns the plan and the ages that the ranks say they will restore."""
    job.wipe()
    ranks = [Recovery(client, job.run_dir, job.target(rank)) for rank, client in enumerate(job.clients)]
    plan = plan_recovery([rank.report() for rank in ranks])
    ages = {ref: step for rank in ranks for ref, step in rank.expert_steps(plan).items()}
    extras = [rank.apply(plan) for rank in ranks]
    assert [e["rng"] for e in extras] == [f"rank {r} step {plan.step}".encode() for r in range(job.world)]
    return plan, ages


def slots_of(job, rank, part, step):
    for place, view in zip(job.clients[rank].arena.places, job.clients[rank].arena.slots, strict=True):
        if place.kind is Kind.BASE and records.state_of(view) is State.SEALED:
            header = records.read_header(view)
            if header.step == step and records.parts_of(view, header) == (part,):
                return view
    raise AssertionError(f"part {part} of step {step} is not there")


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("last", [1, 3, 9])
def test_a_step_comes_back_with_experts_as_old_as_the_selection_says(make_pec_job, k, last):
    job = make_pec_job(k=k)
    job.run(*range(1, last + 1))
    plan, ages = recovered(job)
    assert (plan.step, plan.tier) == (last, "memory")
    assert ages == ages_after(last, k).steps
    assert job.state() == job.expected(last, ages)
    assert (job.state() == job.history[last]) == (k == 4)


def test_a_damaged_copy_of_an_expert_is_replaced_by_its_older_one_or_the_step_is_given_up(make_pec_job, events):
    """Never by bytes that do not verify; what is no expert's is of the restored step, whatever is damaged."""
    job = make_pec_job()
    job.run(*range(1, 6))
    parts = job.protections[0].experts
    ref = next(ref for ref in select(EXPERTS, 5, 1) if ref in parts.experts)
    (part,) = [n for n in parts.numbers([ref]) if n >= parts.fresh]
    view = slots_of(job, 0, part, 5)
    view[records.read_header(view).payload_offset + 3] ^= 1
    plan, ages = recovered(job)
    assert events("quarantined")
    assert ages[ref] < 5
    assert plan.step in (4, 5)
    assert job.state() == job.expected(plan.step, ages)


def test_a_damaged_chunk_of_the_rest_hides_its_step(make_pec_job):
    job = make_pec_job()
    job.run(*range(1, 6))
    view = slots_of(job, 1, 0, 5)
    view[records.read_header(view).payload_offset + 3] ^= 1
    plan, ages = recovered(job)
    assert plan.step == 4
    assert job.state() == job.expected(4, ages)


def test_the_keeper_killed_alone_keeps_all_experts(make_pec_job):
    job = make_pec_job()
    job.run(1, 2, 3)
    os.kill(job.clients[0].keeper_pid, signal.SIGKILL)
    job.run(4, 5)
    plan, ages = recovered(job)
    assert plan.step == 5
    assert ages == ages_after(5).steps
    assert job.state() == job.expected(5, ages)


def on_disk(run_dir):
    return [step for step, _ in list_checkpoints(run_dir / "checkpoints")]


def disk_run(run_dir, make_pec_job, wait_until, last, **options):
    """Steps up to ``last``, each write awaited; every expert is written with the first."""
    job = make_pec_job(disk=DISK, **options)
    job.begin()
    for step in range(1, last + 1):
        job.step(step, whole_on_disk=step == 4)
        if step % 4 == 0:
            wait_until(lambda step=step: step in on_disk(run_dir))
    return job


def disk_ages(last: int, k: int = 1, k_persist: int = 1) -> Ages:
    ages = ages_after(4, k)
    for step in range(8, last + 1, 4):
        ages = ages.persisted(ages_after(step, k), select(EXPERTS, step // 4, k_persist))
    return ages


def test_a_checkpoint_on_disk_shares_the_experts_that_it_does_not_hold_anew(run_dir, make_pec_job, wait_until, events):
    job = disk_run(run_dir, make_pec_job, wait_until, 12)
    wait_until(lambda: on_disk(run_dir) == [8, 12])
    steps = dict(list_checkpoints(run_dir / "checkpoints"))
    assert not any(problem for path in steps.values() for problem in verify(path))
    shared = list(steps[12].glob("*.experts-4.safetensors"))
    assert shared
    assert all((steps[8] / path.name).stat().st_ino == path.stat().st_ino for path in shared)
    written = [row["bytes"] for row in events("disk_written")]
    assert max(written[1:]) < 0.7 * written[0]
    history, state = job.history, job.state()
    job.close()
    stop_keeper(run_dir, persist=False)
    again = make_pec_job(disk=DISK, attempt=1)
    again.history = history
    plan, ages = recovered(again)
    assert (plan.step, plan.tier) == (12, "disk")
    assert ages == disk_ages(12).steps
    assert again.state() == again.expected(12, ages) != state


def test_a_folder_is_complete_when_the_one_it_shares_files_with_is_gone(run_dir, make_pec_job, wait_until):
    job = disk_run(run_dir, make_pec_job, wait_until, 24)
    wait_until(lambda: on_disk(run_dir) == [20, 24])
    (_, path) = list_checkpoints(run_dir / "checkpoints")[-1]
    # Every expert has been written anew since step 4: nothing of it is needed any more.
    assert not list(path.glob("*.experts-4.safetensors"))
    checkpoint = Checkpoint.open(path)
    assert not checkpoint.is_whole
    assert not checkpoint.has_log
    assert audit(path) == []
    ages = disk_ages(24).steps
    for unit in ("L00.E000.up", "L01.E003.up", "model.embed.weight"):
        assert checkpoint.assemble(unit, "master").size in (300, 1800)
    assert {r.step for r in checkpoint.records if r.kind is Kind.BASE} >= set(ages.values())
    job.close()


def test_a_damaged_shared_file_is_not_carried_on(run_dir, make_pec_job, wait_until, events):
    job = disk_run(run_dir, make_pec_job, wait_until, 8)
    (_, path) = list_checkpoints(run_dir / "checkpoints")[-1]
    victim = next(path.glob("dp0000.experts-4.safetensors"))
    blob = bytearray(victim.read_bytes())
    blob[-1] ^= 1
    victim.write_bytes(blob)
    for step in range(9, 13):
        job.step(step)
    wait_until(lambda: 12 in on_disk(run_dir))
    newest = dict(list_checkpoints(run_dir / "checkpoints"))[12]
    assert verify(newest) == []
    assert not list(newest.glob("dp0000.experts-4.safetensors"))
    assert list(newest.glob("dp0001.experts-4.safetensors"))


def test_a_leaving_keeper_writes_the_newest_copy_of_every_expert(run_dir, make_pec_job, wait_until):
    job = disk_run(run_dir, make_pec_job, wait_until, 10)
    history = job.history
    job.close()
    assert stop_keeper(run_dir)
    again = make_pec_job(disk=DISK, attempt=1)
    again.history = history
    plan, ages = recovered(again)
    assert (plan.step, plan.tier) == (10, "disk")
    assert ages == ages_after(10).steps
    assert again.state() == again.expected(10, ages)


def reshape_all(job, protections):
    for capturer in job.capturers:
        capturer.close()
    for client, protection in zip(job.clients, protections, strict=True):
        client.reshape(protection.shape, protection.rules)
    job.protections = protections


@pytest.mark.parametrize("captured", [0, 1, 2])
def test_memory_of_another_shape_replaces_the_former_only_when_all_workers_hold_a_step_in_it(
    make_pec_job, events, captured
):
    """Workers that die before go back to the former, those that die after have the new."""
    job = make_pec_job()
    job.run(1, 2, 3)
    larger = [pec(buffers, EXPERTS, 4, True, False) for buffers in job.buffers]
    reshape_all(job, larger)
    assert [row["both"] for row in events("reshaped")] == [True, True]
    Job = type(job)
    super(Job, job).begin()
    for rank in range(captured):
        job.capturers[rank].start(3, {"rng": f"rank {rank} step 3".encode()}, -1, larger[rank].fragments)
        job.capturers[rank].wait_sealed(3)
    history = job.history
    job.close()
    again = make_pec_job(attempt=1, options={"any_shape": True})
    again.history = history
    held = [client.arena.shape == p.shape for client, p in zip(again.clients, larger, strict=True)]
    assert held == [captured == 2] * 2
    plan, ages = recovered(again)
    assert plan.step == 3
    assert set(ages.values()) == ({3} if captured == 2 else set(ages_after(3).steps.values()))
    assert again.state() == again.expected(3, ages)
    again.close()


def test_the_switch_to_an_exact_mode_replaces_memory_and_rules(make_pec_job):
    job = make_pec_job()
    job.run(1, 2)
    exact = [wal(buffers, 3, "float32", False) for buffers in job.buffers]
    reshape_all(job, exact)
    assert all(client.rules == p.rules for client, p in zip(job.clients, exact, strict=True))
    super(type(job), job).begin()
    for rank, capturer in enumerate(job.capturers):
        capturer.start(2, {"rng": f"rank {rank} step 2".encode()}, -1, exact[rank].fragments)
    for capturer in job.capturers:
        capturer.wait_sealed(2)
    plan, ages = recovered(job)
    assert plan.step == 2
    assert set(ages.values()) == {2}
    assert job.state() == job.history[2]


def test_without_any_shape_other_memory_is_refused(make_pec_job):
    job = make_pec_job()
    job.run(1)
    job.close()
    with pytest.raises(KeeperRefused, match="stop the keeper first"):
        make_pec_job(k=4, attempt=1)


def test_a_record_of_an_unknown_expert_is_not_restored_as_one(make_pec_job):
    job = make_pec_job(world=1, experts=Experts((0, 1), 2))
    job.run(1, 2)
    target = Target(job.buffers[0], "dp0001")
    recovery = Recovery(job.clients[0], job.run_dir, target)
    assert recovery.report()["memory"] == []
    assert ExpertRef(0, 0) in job.protections[0].experts.experts
