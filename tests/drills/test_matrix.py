"""The drill matrix in its reduced form: real kills at places that single drills do not try, and flipped bits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.forked import run_planaria
from trainer.matrix import reduced_cases

RECIPE = Path(__file__).parent / "drill.yaml"
pytestmark = [pytest.mark.drill, pytest.mark.slow]


def test_the_reduced_matrix_passes(tmp_path):
    settings = [f"log.dir={tmp_path}", "log.run=reduced", f"data.cache_dir={tmp_path / 'cache'}"]
    command = [sys.executable, "-m", "trainer", "drill", "matrix", str(RECIPE), *settings, "--reduced"]
    done = subprocess.run(
        [*command, "--json", str(tmp_path / "verdicts")],
        capture_output=True, text=True, timeout=280, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    verdicts = [json.loads(path.read_text()) for path in (tmp_path / "verdicts").iterdir()]
    assert {v["case"] for v in verdicts} == {case.name for case in reduced_cases(2)}
    assert all(v["state_hash_equal"] and not v["leftovers"] for v in verdicts)
    assert {v["tier"] for v in verdicts} == {"memory", "disk", "none"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--only", "no-such"], "names are like 2.kill.optimizer.rank1.both"),
        (["checkpoint.memory.enabled=false"], "needs checkpoint.memory.enabled=true"),
        (["--ranks", "2,x"], "is not a whole number"),
    ],
)
def test_what_cannot_be_tried_is_refused(tmp_path, arguments, words):
    done = run_planaria("drill", "matrix", RECIPE, f"log.dir={tmp_path}", *arguments)
    assert (done.returncode, words in done.stderr) == (2, True), done.stderr
