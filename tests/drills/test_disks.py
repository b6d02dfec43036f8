"""Real runs on disks that are elsewhere, full, or too slow: the bits are those of the undisturbed run."""

import shutil

import pytest

from checkpointing.storage import place_of
from checkpointing.store import list_checkpoints, verify
from trainer.failpoints import DISK_VARIABLE

pytestmark = [pytest.mark.drill, pytest.mark.slow]


def final_hash(rows):
    return [row["state_hash"] for row in rows if row["kind"] == "done"][-1]


def plans(rows):
    return [(row["step"], row["tier"]) for row in rows if row["kind"] == "recovery_plan"]


def test_a_lost_machine_loses_nothing_that_lies_elsewhere(start, undisturbed, folder):
    url = f"dir::file://{folder / 'elsewhere'}"
    settings = [f"checkpoint.disk.url={url}", "checkpoint.disk.permanent_every=8"]
    fault = {DISK_VARIABLE: "kind=full,first=4,last=4"}
    job = start("on-a-url", settings, kill="rank=1,step=10,at=forward,who=both", environment=fault)
    rows = job.finish()
    assert plans(rows) == [(-1, "fresh"), (8, "disk")], "step 4 found no room, and hindered nothing"
    assert [row["step"] for row in rows if row["kind"] == "disk_failed"] == [4]
    assert final_hash(rows) == final_hash(undisturbed)
    assert not (job.run_dir / "checkpoints").exists()
    assert [step for step, _ in list_checkpoints(place_of(url))] == [8, 12]
    assert all(verify(path) == [] for _, path in list_checkpoints(place_of(url)))
    shutil.rmtree(job.run_dir)
    again = start("on-another-machine", settings)
    rows = again.finish()
    assert plans(rows) == [(12, "disk")]
    assert final_hash(rows) == final_hash(undisturbed)
    other = start("of-another-recipe", [*settings, "train.seed=1"])
    assert other.wait() == 2
    assert "was written by a run of recipe" in other.output.read_text()


def test_a_slow_disk_hinders_neither_training_nor_recovery(start, undisturbed):
    fault = {DISK_VARIABLE: "kind=throttle,bytes_per_s=20000,last=4"}
    job = start("slow-disk", kill="rank=0,step=9,at=optimizer", environment=fault)
    rows = job.finish()
    assert plans(rows) == [(-1, "fresh"), (8, "memory")]
    assert final_hash(rows) == final_hash(undisturbed)
    written = [row for row in rows if row["kind"] == "disk_written"]
    assert [row["step"] for row in written] == [4, 12]
    recovered = max(row["time"] for row in rows if row["kind"] == "recovered")
    assert written[0]["time"] > recovered, "the write went on through kill and recovery"
    assert [row["step"] for row in rows if row["kind"] == "disk_slow"] == [4]
