"""The command line as a user meets it: in processes of its own."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.forked import run_planaria
from trainer import cli

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = "recipes/quickstart.yaml"


@pytest.mark.parametrize(
    "commands",
    [
        [["--help"], ["drill", "--help"], ["keeper", "stop", "--help"], ["validate", QUICKSTART]],
        [["validate", QUICKSTART, "train.stepz=1"], ["checkpoint", "ls", "recipes"]],
        [["checkpoint", "verify", "memory://empty"], ["checkpoint", "rm", "memory://empty", "4"]],
    ],
    ids=["help and validate", "mistakes", "no checkpoint"],
)
def test_no_torch_before_it_is_needed(commands: list[list[str]]) -> None:
    """Nor deepspeed, transformers or datasets, which take seconds to import: not by any of the commands so far."""
    code = """
import json, sys
from trainer.cli import main
for command in json.loads(sys.argv[1]):
    try:
        main(command)
    except SystemExit:
        pass
    heavy = {"torch", "deepspeed", "transformers", "datasets", "tokenizers"} & set(sys.modules)
    print("\\nHEAVY", *command, sorted(heavy))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(commands)], cwd=ROOT, capture_output=True, text=True, timeout=60,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = [line for line in done.stdout.splitlines() if line.startswith("HEAVY")]
    assert found == [" ".join(["HEAVY", *command, "[]"]) for command in commands]


def test_help_names_every_verb() -> None:
    done = run_planaria("--help")
    assert done.returncode == 0
    for verb in ("train", "validate", "drill", "export", "checkpoint", "keeper", "generate"):
        assert re.search(rf"^    {verb}\b", done.stdout, re.MULTILINE), done.stdout
    assert "local_rank" not in done.stdout


def test_validate_prints_the_card() -> None:
    done = run_planaria("validate", QUICKSTART, "train.steps=123", "log.run=mine")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    for part in ("runs/mine", "2 workers, ep 2, ZeRO-1", "  experts\n", "123 steps", "per worker"):
        assert part in done.stdout, done.stdout


def test_validate_warns_on_stderr() -> None:
    done = run_planaria("validate", QUICKSTART, "checkpoint={memory: {enabled: false}}")
    assert done.returncode == 0
    assert done.stderr.startswith("warning: checkpoint: memory is off")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["validate", "no/such.yaml"], "no/such.yaml: no such file"),
        (["validate", "recipes"], "recipes: a folder"),
        (["train", "tests/broken_recipes/typo.yaml"], "typo.yaml:25: unknown key train.warmup_step"),
        (["validate", QUICKSTART, "train.lr=fast"], "argument 'train.lr=fast': train.lr must be a number"),
        (["validate", QUICKSTART, "oops"], "argument 'oops': not an override"),
        (["validate", QUICKSTART, "data.include=[nothing/*.py]"], "pattern 'nothing/*.py' matches no file"),
        (["validate", "recipes/quickstart-lora.yaml", "model.path=no/folder"], "model.path: no no/folder/config.json"),
        (["drill", QUICKSTART, "--kill", "rank=x,step=1"], "kill: rank='x' is not a whole number"),
        (["drill", QUICKSTART, "--kill", ""], "kill: '' is no field"),
        (["generate", "dir", "--prompt", "x", "--expert-budget", "2"], "'2' is not a number from 0 to 1"),
        (["generate", "dir", "--prompt", "x", "--max-new-tokens", "0"], "'0' is not a whole number above 0"),
        (["generate", "dir"], "--prompt"),
        (["export", "runs/only-one"], "OUT"),
        (["export", "a", "b", "c=d"], "unrecognized arguments: c=d"),
        (["validate", QUICKSTART, "--fast"], "unrecognized arguments: --fast"),
        (["keeper", "feed", "runs/x"], "invalid choice: 'feed'"),
        (["fly"], "invalid choice: 'fly'"),
        ([], "VERB"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_a_users_mistake_is_status_2_without_a_traceback(arguments: list[str], part: str) -> None:
    done = run_planaria(*arguments)
    assert done.returncode == 2, done.stderr
    assert part in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_that_cannot_be_written_is_one_line(unbuffered: str) -> None:
    command = [sys.executable, "-m", "trainer", "validate", QUICKSTART]
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    reader, writer = os.pipe()
    os.close(reader)  # as `| head -1` does when it has its line
    for out, status, said in (
        (os.open("/dev/full", os.O_WRONLY), 1, "standard output: No space left on device"),
        (writer, 141, ""),
    ):
        done = subprocess.run(
            command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.PIPE, text=True, timeout=60, check=False
        )
        os.close(out)
        assert done.returncode == status
        assert done.stderr.startswith(said)
        assert len(done.stderr.splitlines()) == bool(said)


INTERRUPTED_WHILE_IMPORTED = """
import builtins, os, signal
imported = builtins.__import__
def interrupted(name, *rest):
    if name == "trainer.refusal":
        os.kill(os.getpid(), signal.SIGINT)
    return imported(name, *rest)
builtins.__import__ = interrupted
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell in the background has it ignored
from trainer.__main__ import main
main()
"""


def test_ctrl_c_while_modules_are_imported_leaves_no_traceback() -> None:
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED_WHILE_IMPORTED], cwd=ROOT, capture_output=True, text=True, timeout=60,
        check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")


def test_every_problem_is_printed() -> None:
    done = run_planaria("validate", "tests/broken_recipes/everything.yaml", "train.epochs=1", "train.seed=-1")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 6
    assert done.stdout == ""


def test_world_of_another_size_is_refused() -> None:
    done = run_planaria("validate", QUICKSTART, RANK="0", WORLD_SIZE="3")
    assert done.returncode == 2
    assert "WORLD_SIZE=3" in done.stderr
    assert "parallel.workers=2" in done.stderr
    assert run_planaria("validate", QUICKSTART, RANK="1", WORLD_SIZE="2").returncode == 0


def test_a_worker_restarted_after_a_users_mistake_leaves_at_once(tmp_path: Path) -> None:
    refusal = tmp_path / "refusal"
    refusal.write_text("said before")
    done = run_planaria("train", QUICKSTART, RANK="0", WORLD_SIZE="2", PLANARIA_REFUSAL=str(refusal))
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "")


def parsed(*arguments: str) -> argparse.Namespace:
    return cli._parse(arguments)


def test_launchers_rank_argument_is_ignored() -> None:
    for spelling in ("--local_rank=0", "--local-rank=1"):
        arguments = parsed(spelling, "train", "r.yaml", "a.b=1")
        assert (arguments.verb, arguments.recipe, arguments.overrides) == ("train", "r.yaml", ["a.b=1"])


def test_overrides_may_stand_around_options() -> None:
    arguments = parsed("drill", "r.yaml", "a=1", "--kill", "rank=0,step=1", "b=2", "--json", "v.json", "c=3")
    assert arguments.overrides == ["a=1", "b=2", "c=3"]
    assert arguments.kill == "rank=0,step=1"
    assert arguments.json == "v.json"


def test_errors_that_are_ours_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    """A ValueError of the standard library is a mistake in planaria, not of its user."""

    def broken(arguments: argparse.Namespace) -> int:
        return int("x")

    monkeypatch.setattr(cli, "_validate", broken)
    with pytest.raises(ValueError, match="invalid literal"):
        cli.main(["validate", QUICKSTART])


HOLD_STEPS = """
import sys, torch
from checkpointing.capture import Capturer
from checkpointing.keeper.client import KeeperClient
from checkpointing.protection import dense
from checkpointing.state.buffers import StateBuffer, StateSpan
from checkpointing.units import Range
buffers = [StateBuffer("b", torch.arange(8.0), (StateSpan(Range("norm", "master", 0, 8), 0),))]
p = dense(buffers, 3)
client = KeeperClient.attach(sys.argv[1], "dp0000", ["dp0000"], p.shape, "f" * 16, disk={"every": 0, "keep_last": 2})
capturer = Capturer(client, buffers)
for step in (1, 2):
    capturer.start(step, {}, step - 1, p.fragments)
    capturer.wait_copied()
    capturer.wait_sealed(step)
client.close()
print(client.keeper_pid)
"""


@pytest.mark.drill
@pytest.mark.parametrize("discard", [False, True])
def test_a_lingering_keeper_is_shown_and_stopped(tmp_path: Path, discard: bool) -> None:
    done = subprocess.run(
        [sys.executable, "-c", HOLD_STEPS, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=60,
        check=True,
    )  # fmt: skip
    shown = run_planaria("keeper", "status", str(tmp_path))
    assert shown.stdout == f"keeper {done.stdout.strip()}\ndp0000  no worker, sealed steps 1, 2\n"
    (tmp_path / "checkpoints").touch()  # no folder can be made there
    refused = run_planaria("keeper", "stop", str(tmp_path))
    assert refused.returncode == 1
    assert "step 2 could not be written" in refused.stderr
    (tmp_path / "checkpoints").unlink()
    stopped = run_planaria("keeper", "stop", str(tmp_path), *(["--discard"] if discard else []))
    assert (stopped.returncode, stopped.stdout) == (0, f"{tmp_path}: its keeper is stopped\n")
    assert (tmp_path / "checkpoints" / "step-2").exists() is not discard
    for action in ("stop", "status"):
        absent = run_planaria("keeper", action, str(tmp_path))
        assert (absent.returncode, absent.stderr) == (1, f"{tmp_path}: no keeper runs\n")


STILL_ABLE_TO_FORK = """
import os
from trainer import cli
cli._launcher()
os.environ["OMP_NUM_THREADS"] = "1"
import trainer.worker
from trainer import engine
engine.preload()
print(len(os.listdir("/proc/self/task")))
"""


@pytest.mark.slow
def test_the_launcher_has_one_thread_after_importing_what_workers_need() -> None:
    """With more it could not fork them, and every recovery would import torch again."""
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    done = subprocess.run(
        [sys.executable, "-c", STILL_ABLE_TO_FORK], cwd=ROOT, env=environment, capture_output=True, text=True,
        timeout=60, check=True,
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == "1"
