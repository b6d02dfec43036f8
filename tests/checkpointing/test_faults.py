"""The keeper's failpoints: each strikes once, at its place, and those that only wait are let go."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest

from checkpointing.keeper.faults import Faults


@pytest.fixture
def victim():
    process = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    yield process
    process.kill()
    process.wait(10)
    process.stdin.close()


@pytest.fixture
def rows():
    return []


@pytest.fixture
def faults(rows):
    return Faults(lambda kind, step, **fields: rows.append((kind, step, fields["at"], fields["coordinate"])))


def killed(process):
    return process.wait(10) == -signal.SIGKILL


@pytest.mark.parametrize("point", ["sealed", "disk"])
def test_it_strikes_once_at_or_after_its_step(faults, rows, victim, point):
    faults.arm("dp0001", {"at": point, "step": 4, "pids": [victim.pid]})
    faults.reached(point, 3)
    faults.reached("rename", 9)
    faults.reached(point, 9, "dp0000")
    assert not rows
    faults.reached(point, 5)
    faults.reached(point, 6)
    assert rows == [("kill", 5, point, "dp0001")]
    assert killed(victim)


def test_a_later_attempt_replaces_what_was_armed(faults, rows):
    faults.arm("dp0000", {"at": "seal", "step": 1, "pids": [-1]})
    faults.arm("dp0000", None)
    faults.before_seal(2, "dp0000")
    assert not rows


def test_a_seal_is_held_back_until_another_coordinate_has_sealed(faults, rows, victim):
    faults.arm("dp0001", {"at": "between", "step": 4, "pids": [victim.pid]})
    faults.before_seal(3, "dp0001")
    holder = threading.Thread(target=faults.before_seal, args=(4, "dp0001"))
    holder.start()
    faults.reached("sealed", 3, "dp0000")
    assert holder.is_alive()
    assert not rows
    faults.reached("sealed", 4, "dp0000")
    holder.join(10)
    assert not holder.is_alive()
    assert rows == [("kill", 4, "between", "dp0001")]
    assert killed(victim)


def test_the_rename_that_makes_a_checkpoint_exist_is_struck_before_it_happens(tmp_path):
    """In a process of its own: what listens to renames stays for good."""
    (tmp_path / "step-8.tmp").mkdir()
    (tmp_path / "other").mkdir()
    code = (
        "import os, sys\n"
        "from checkpointing.keeper.faults import Faults\n"
        "faults = Faults(lambda *a, **k: print('struck', flush=True))\n"
        "faults.arm('dp0000', {'at': 'rename', 'step': 4, 'pids': ['keeper']})\n"
        "os.rename('other', 'another')\n"
        "os.rename('step-8.tmp', 'step-8')\n"
    )
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True,
                          timeout=60, check=False)  # fmt: skip
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, "struck\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["another", "step-8.tmp"]
