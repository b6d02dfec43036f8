"""SGD and Lion survive as AdamW does: killed runs end with the undisturbed bits, from the log and from the disk."""

import subprocess
import sys

import pytest

from trainer.drill import judge
from trainer.faults import KillSpec

pytestmark = [pytest.mark.drill, pytest.mark.slow]

RATES = {"sgd": ["train.optimizer=sgd", "train.lr=0.1"], "lion": ["train.optimizer=lion", "train.lr=1e-3"]}


@pytest.mark.parametrize("optimizer", RATES)
def test_a_killed_run_ends_with_the_undisturbed_bits(start, optimizer):
    undisturbed = start(f"{optimizer}-whole", RATES[optimizer])
    rows = undisturbed.finish()
    losses = {row["step"]: row["loss"] for row in rows if row["kind"] == "heldout"}
    assert losses[12] < losses[0] - 0.1
    kills = [KillSpec(1, 7, "optimizer"), KillSpec(0, 10, "forward", who="both")]
    job = start(f"{optimizer}-killed", RATES[optimizer], kill=";".join(map(str, kills)))
    verdict = judge(job.recipe, kills[0], rows, job.finish())
    assert verdict.state_hash_killed == verdict.state_hash_undisturbed != ""
    plans = [row for row in job.rows() if row["kind"] == "recovery_plan"][1:]
    assert [(plan["tier"], plan["step"]) for plan in plans] == [("memory", 6), ("disk", 8)]


def test_deepspeeds_folders_hold_adams_state_only(start, tmp_path):
    job = start("lion-exported", RATES["lion"])
    job.finish()
    command = [sys.executable, "-m", "trainer", "checkpoint", "export", str(job.run_dir), str(tmp_path / "out")]
    done = subprocess.run([*command, "--deepspeed"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2, done.stderr
    assert "holds the state of Lion" in done.stderr
    assert not (tmp_path / "out").exists()
