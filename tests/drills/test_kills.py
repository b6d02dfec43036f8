"""Kill real workers at every point of a step; every run must end with the bits of the undisturbed one."""

import os
import random
import shutil
import signal
import time

import numpy as np
import pytest

from checkpointing.store import list_checkpoints
from trainer import data
from trainer.drill import judge
from trainer.faults import KillSpec
from trainer.progress import Progress
from trainer.recipe import load_recipe

pytestmark = [pytest.mark.drill, pytest.mark.slow]


def verdict_of(job, kill, undisturbed):
    verdict = judge(job.recipe, kill, undisturbed, job.finish())
    assert verdict.passed, (verdict.problems, job.output.read_text()[-3000:])
    assert verdict.state_hash_killed == verdict.state_hash_undisturbed != ""
    return verdict


def final_hash(rows):
    return next(row["state_hash"] for row in rows if row["kind"] == "done")


def test_workers_killed_inside_steps_resume_from_memory_each_time(start, undisturbed):
    kills = [KillSpec(1, 3, "forward"), KillSpec(0, 6, "optimizer"), KillSpec(1, 9, "capture")]
    job = start("inside", ["checkpoint.disk.every=0"], kill=";".join(map(str, kills)))
    rows = job.finish()
    assert [(row["step"], row["at"]) for row in rows if row["kind"] == "kill"] == [(k.step, k.at) for k in kills]
    plans = [row for row in rows if row["kind"] == "recovery_plan"][1:]
    assert [plan["tier"] for plan in plans] == ["memory"] * 3
    # The capture of step 2 may or may not have been sealed in the forward of step 3; 5 and 8 must have been.
    assert plans[0]["step"] in (1, 2)
    assert [plan["step"] for plan in plans[1:]] == [5, 8]
    executed = [row["step"] for row in rows if row["kind"] == "optimizer" and row["rank"] == 0]
    assert len(executed) <= 12 + len(kills)
    assert executed[-7:] == [7, 8, 9, 9, 10, 11, 12]
    assert final_hash(rows) == final_hash(undisturbed)


def test_a_worker_killed_during_a_disk_write_resumes(start, undisturbed):
    kill = KillSpec(rank=0, step=8, at="disk")
    verdict = verdict_of(start("disk-write", kill=str(kill)), kill, undisturbed)
    assert verdict.tier == "memory"
    assert verdict.optimizer_steps <= verdict.steps + 1


def test_without_memory_a_run_resumes_from_disk(start, undisturbed):
    kill = KillSpec(rank=1, step=10, at="forward", who="both")
    job = start("from-disk", kill=str(kill))
    verdict = verdict_of(job, kill, undisturbed)
    assert verdict.tier == "disk"
    assert verdict.resumed_step in (4, 8)


def test_the_keeper_killed_alone_during_a_disk_write_does_not_disturb_training(start, undisturbed):
    kill = KillSpec(rank=0, step=8, at="disk", who="keeper")
    job = start("keeper", kill=str(kill))
    verdict = verdict_of(job, kill, undisturbed)
    assert verdict.optimizer_steps == verdict.steps
    assert len({row["pid"] for row in job.rows() if row["kind"] == "keeper_started"}) == 2


def test_kills_from_outside_at_random_times(start, undisturbed):
    """No failpoint: whichever process, wherever it happens to be, twice in one run."""
    choice = random.Random(os.getpid())
    job = start("outside")
    for attempt in range(2):
        after, rank, delay = choice.randrange(1, 6) + 5 * attempt, choice.randrange(2), choice.uniform(0, 0.1)
        wait_for_step(job, after, attempt)
        time.sleep(delay)  # not a synchronisation: the kill is meant to fall anywhere in a step
        pid = [row["pid"] for row in job.rows() if row["kind"] == "start" and row["rank"] == rank][-1]
        os.kill(pid, signal.SIGKILL)
    rows = job.finish()
    assert final_hash(rows) == final_hash(undisturbed)
    plans = [row for row in rows if row["kind"] == "recovery_plan"][1:]
    assert [plan["tier"] for plan in plans] == ["memory"] * 2
    for attempt, plan in enumerate(plans):
        begun = [r["step"] for r in rows if r["kind"] == "optimizer" and r["attempt"] == attempt]
        assert plan["step"] >= max(begun) - 1, "more than the step in flight was lost"


def wait_for_step(job, step, attempt):
    deadline = time.monotonic() + 100
    while not any(r["kind"] == "step" and r["step"] >= step and r["attempt"] == attempt for r in job.rows()):
        assert time.monotonic() < deadline, job.output.read_text()[-2000:]
        assert job.process.poll() is None, job.output.read_text()[-2000:]
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("name", "settings", "tier", "resumed"),
    [
        ("every third step", ["checkpoint={mode: dense, memory: {every: 3}}"], "memory", (6,)),
        ("disk alone", ["checkpoint.memory.enabled=false", "checkpoint.disk.every=3"], "disk", (3, 6)),
    ],
)
def test_sparser_checkpoints_lose_more_steps_but_no_bits(start, undisturbed, name, settings, tier, resumed):
    job = start(name.replace(" ", "-"), settings, kill="rank=1,step=8,at=optimizer")
    rows = job.finish()
    plan = [row for row in rows if row["kind"] == "recovery_plan"][-1]
    assert plan["tier"] == tier
    assert plan["step"] in resumed
    assert final_hash(rows) == final_hash(undisturbed)


def test_one_worker_recovers_from_its_keeper(start):
    alone = ["parallel.workers=1", "parallel.ep=1"]
    calm = start("alone", alone).finish()
    kill = KillSpec(rank=0, step=6, at="capture")
    verdict = verdict_of(start("alone-killed", alone, kill=str(kill)), kill, calm)
    assert (verdict.tier, verdict.resumed_step) == ("memory", 5)


def test_the_chain_of_consumed_samples_is_the_one_the_recipe_implies(undisturbed, folder):
    """Rebuilt here from the order alone: ids and tokens of rank 0, micro-batch by micro-batch."""
    recipe = load_recipe(folder / "undisturbed" / "recipe.yaml")
    dataset, chain = data.load(recipe, rank=1).train, Progress()
    for step in range(1, 13):
        for micro in range(2):
            ids = [8 * (step - 1) + 4 * micro + i for i in range(2)]
            rows = [dataset[data.sample_order(i, len(dataset), recipe.train.seed)] for i in ids]
            chain.consume(ids, np.stack(rows).tobytes())
    last = [row for row in undisturbed if row["kind"] == "step"][-1]
    assert (last["samples"], last["consumed"]) == (96, chain.consumed)


def test_a_resume_on_edited_text_is_refused(start, folder, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("one two three four five six seven eight nine ten\n" * 400)
    (tmp_path / "other.txt").write_text("a b c d e f g h i j k l m n o p\n" * 400)
    settings = [
        f"data={{source: files, include: ['{tmp_path}/*.txt'], tokenizer: {{kind: bytes}}, sequence_length: 32}}"
    ]
    job = start("edited", [*settings, f"data.cache_dir={tmp_path}", "train.steps=4"])
    job.finish()
    text.write_text("eins zwei drei vier\n" * 900)
    again = start("edited", [*settings, f"data.cache_dir={tmp_path}", "train.steps=4"])
    assert again.wait() == 2
    assert "data: was" in again.output.read_text()


def test_a_damaged_checkpoint_is_set_aside_aloud_and_an_older_one_used(undisturbed, folder, start):
    run = folder / "damaged"
    shutil.copytree(folder / "undisturbed", run)
    (_, older), (_, newest) = list_checkpoints(run / "checkpoints")
    file = newest / "dp0000.safetensors"
    blob = bytearray(file.read_bytes())
    blob[len(blob) // 2] ^= 4
    file.write_bytes(blob)
    job = start("damaged")
    rows = job.finish()
    assert final_hash(rows[len(undisturbed) :]) == final_hash(undisturbed)
    assert [row["step"] for row in rows if row["kind"] == "recovery_plan"][-1] == int(older.name.removeprefix("step-"))
    assert newest.with_name(newest.name + ".corrupt").exists()
    assert "dp0000.safetensors" in job.output.read_text()
