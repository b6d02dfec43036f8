"""`planaria drill matrix`: carry out the cases, a verdict for each, and one table at the end."""

from __future__ import annotations

import fcntl
import json
import os
import random
import shutil
import signal
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from checkpointing.keeper.control import stop_keeper
from checkpointing.keeper.events import append_event
from checkpointing.keeper.protocol import KeeperError
from trainer import damage, scenarios
from trainer.launch import FAILED, RESUMABLE
from trainer.matrix import (
    Case,
    PlannedRun,
    Strike,
    all_cases,
    matching,
    planned_runs,
    reduced_cases,
)
from trainer.matrix_jobs import Bench, Job, MatrixError
from trainer.matrix_verdict import CaseVerdict, Evidence, judge_run, of_kind, summary
from trainer.recipe import RecipeError, load_recipe
from trainer.schema import Recipe

_ATTEMPT_S = 15.0  # of a run's time limit, for each worker pair and attempt


def main(
    recipe_path: str,
    overrides: Sequence[str],
    ranks: Sequence[int] = (),
    only: str = "",
    reduced: bool = False,
    json_dir: str | None = None,
    resume: bool = False,
) -> int:
    """Run the matrix. Returns 0 if every case passed, else 1. Raises RecipeError.

    Args:
        ranks: counts of workers: everything at the first (default: the recipe's), a choice of kills at the others.
        only: a pattern of case names.
        resume: keep an earlier call's undisturbed runs, and leave out the cases that passed in it.
    """
    recipe = load_recipe(recipe_path, overrides)
    base = Path(recipe.log.dir).resolve() / f"{recipe.log.run}-matrix"
    if (base / "recipe.yaml").exists():
        raise RecipeError([f"{base} is the folder of a run, and a matrix would overwrite it; give log.run=NAME"])
    _check(recipe)
    counts = list(ranks) or [recipe.parallel.workers]
    cases = reduced_cases(counts[0]) if reduced else all_cases(counts, recipe.parallel.ep > 1)
    cases = matching(cases, only) if only else cases
    if not cases:
        raise RecipeError([f"--only: no case's name matches {only!r}; names are like 2.kill.optimizer.rank1.both"])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(RESUMABLE))
    verdicts_dir = Path(json_dir) if json_dir else base / "verdicts"
    passed = _passed(verdicts_dir) if resume else set()
    if not resume:
        _clear(base)
    verdicts_dir.mkdir(parents=True, exist_ok=True)
    left = [case for case in cases if case.name not in passed]
    print(
        f"drill matrix: {len(left)} cases" + (f", {len(cases) - len(left)} passed before" if resume else ""), flush=True
    )
    started = time.monotonic()
    bench = Bench(recipe_path, list(overrides), base)
    try:
        verdicts = _Matrix(bench, verdicts_dir).run(left)
    except MatrixError as error:
        print(error, file=sys.stderr)
        return FAILED
    finally:
        bench.close()
    print(summary(verdicts, time.monotonic() - started))
    return 0 if all(v.passed for v in verdicts) else 1


def _check(recipe: Recipe) -> None:
    """Refuse a recipe whose runs could not be compared. Raises RecipeError."""
    checkpoint, problems = recipe.checkpoint, []
    if checkpoint.mode == "pec":
        problems.append(
            "drill matrix: checkpoint.mode pec restores experts of different ages, and no two runs have equal bits; "
            "give checkpoint.mode=wal or dense"
        )
    if not checkpoint.memory.enabled:
        problems.append("drill matrix: needs checkpoint.memory.enabled=true, which most of its cases are about")
    if problems:
        raise RecipeError(problems)


def _passed(folder: Path) -> set[str]:
    found = set()
    for path in folder.glob("*.json"):
        verdict = json.loads(path.read_text())
        if verdict["pass"]:
            found.add(verdict["case"])
    return found


def _clear(base: Path) -> None:
    """Keepers of an earlier matrix that was killed may still linger."""
    for info in base.glob("*/keeper.json"):
        with suppress(KeeperError, OSError):
            stop_keeper(info.parent, persist=False, timeout_s=5)
    shutil.rmtree(base, ignore_errors=True)


class _Matrix:
    def __init__(self, bench: Bench, folder: Path) -> None:
        self._bench, self._folder = bench, folder
        self._verdicts: list[CaseVerdict] = []

    def run(self, cases: Sequence[Case]) -> list[CaseVerdict]:
        packed = [case for case in cases if case.kind in ("kill", "flip")]
        for ranks in dict.fromkeys(case.ranks for case in cases):
            started = time.monotonic()
            rows = self._bench.calm(ranks)
            steps = max(row["step"] for row in of_kind(rows, "step"))
            print(f"undisturbed, {ranks} workers: {steps} steps, {time.monotonic() - started:.1f} s", flush=True)
            for run in planned_runs([case for case in packed if case.ranks == ranks], steps):
                self._kill(run)
            for case in cases:
                if case.ranks == ranks and case not in packed:
                    self._record(scenarios.carry_out(case, self._bench))
        return self._verdicts

    def _kill(self, run: PlannedRun) -> None:
        shutil.rmtree(self._bench.base / run.name, ignore_errors=True)
        allowed = 60 + _ATTEMPT_S * len(run.attempts) * max(1.0, run.ranks / 2)
        started = time.monotonic()
        job = self._bench.start(run.name, run.ranks, kills=run.kills, seconds_allowed=allowed)
        flips = _Flips(run, job)
        status, problems = job.wait(flips.strike)
        if status != 0 and not problems:
            problems = [f"the run {run.name} exited with status {status}; {job.last_words()}"]
        evidence = Evidence(job.recipe, self._bench.calm(run.ranks), job.rows(), tuple(problems + flips.problems),
                            job.leftovers())  # fmt: skip
        print(f"{run.name}: {len(run.attempts) + 1} attempts, {time.monotonic() - started:.1f} s", flush=True)
        for verdict in judge_run(run, evidence):
            self._record(verdict)

    def _record(self, verdict: CaseVerdict) -> None:
        if verdict.case.split(".")[1] == "opening" and verdict.passed:
            return
        self._verdicts.append(verdict)
        (self._folder / f"{verdict.case}.json").write_text(verdict.to_json() + "\n")
        words = "pass" if verdict.passed else "FAIL: " + "; ".join([*verdict.problems, *verdict.leftovers])
        print(f"  {verdict.case}: {words} ({verdict.wall_s:.1f} s)", flush=True)


class _Flips:
    """Flips a bit once the workers that a kill ends are gone, before those that follow look at what is there.

    For that it queues for the lock of the run, which the first worker holds for its life: the next one waits for it.
    """

    def __init__(self, run: PlannedRun, job: Job) -> None:
        strikes = [strikes[-1] for strikes in run.attempts]
        self._waiting = next((strike for strike in strikes if strike.case.where), None)
        self._job = job
        self._lock = threading.Event()
        self._queued: threading.Thread | None = None
        self._fd = -1
        self.problems: list[str] = []

    def strike(self) -> None:
        if self._waiting is None:
            return
        rows = self._job.rows()
        if self._queued is None and of_kind(rows, "recovered"):
            self._fd = os.open(self._job.run_dir / "run.lock", os.O_RDWR | os.O_CLOEXEC)
            self._queued = threading.Thread(target=self._queue, daemon=True)
            self._queued.start()
        if self._lock.is_set() and of_kind(rows, "kill") and self._flip(self._waiting):
            self._waiting = None
            os.close(self._fd)

    def _queue(self) -> None:
        fcntl.flock(self._fd, fcntl.LOCK_EX)
        self._lock.set()

    def _flip(self, strike: Strike) -> bool:
        """False if it is too early."""
        folder, choice = self._job.run_dir, random.Random(strike.case.name)
        try:
            if strike.case.where == "disk":
                step, where = damage.flip_on_disk(folder, choice)
            elif damage.workers_attached(folder):
                return False
            else:
                step, where = damage.flip_in_memory(folder, choice)
        except (damage.DamageError, KeeperError, OSError) as error:
            self.problems.append(f"{strike.case.name}: no bit could be flipped: {error}")
            return True
        append_event(folder, "flip", step, tier=strike.case.where, where=where)
        return True
