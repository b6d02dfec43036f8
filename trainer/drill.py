"""Recovery drills: the same recipe undisturbed and with a real SIGKILL in the middle, and what the two ended with.

A drill passes when both runs end with the same state hash, the killed one resumed from a checkpoint, and every training
sample was seen exactly once in the steps that count. In mode pec the hashes may differ if experts came back older, and
what that lost was counted.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from checkpointing.keeper.control import stop_keeper
from trainer.data import cache_root
from trainer.events import read_events
from trainer.failpoints import KILL_VARIABLE
from trainer.faults import KillSpec
from trainer.launch import RESUMABLE
from trainer.loss_verdict import loss_problems
from trainer.recipe import RecipeError, load_recipe
from trainer.schema import Recipe
from trainer.timesplit import Seconds, split_seconds

RUN_TIMEOUT_S = 3600


@dataclass(frozen=True)
class Verdict:
    """What `planaria drill` writes to verdict.json."""

    passed: bool
    kill: str
    tier: str
    killed_step: int
    resumed_step: int
    steps_lost: int
    optimizer_steps: int
    steps: int
    seconds: Seconds
    state_hash_undisturbed: str
    state_hash_killed: str
    problems: tuple[str, ...]

    def to_json(self) -> str:
        facts = asdict(self)
        return json.dumps({"pass": facts.pop("passed"), **facts, "total_s": self.seconds.total}, indent=1)


def main(recipe_path: str, kill: KillSpec | None, json_path: str | None, overrides: Sequence[str]) -> int:
    """Run the drill and print its verdict. Returns 0 for PASS, 1 for FAIL."""
    recipe = load_recipe(recipe_path, overrides)
    kill = kill or KillSpec(rank=recipe.parallel.workers - 1, step=max(2, recipe.train.steps // 2))
    check_kill(recipe, kill)
    base = Path(recipe.log.dir) / f"{recipe.log.run}-drill"
    if (base / "recipe.yaml").exists():
        raise RecipeError([f"{base} is the folder of a run, and a drill would overwrite it; give log.run=NAME"])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(RESUMABLE))
    for name in ("undisturbed", "killed"):
        stop_keeper(base / name, persist=False)  # one of an earlier drill may still linger
    shutil.rmtree(base, ignore_errors=True)
    rows, failures = {}, []
    for name, strike in (("undisturbed", None), ("killed", kill)):
        print(f"drill: {name} run" + (f", SIGKILL at {strike}" if strike else ""), flush=True)
        # Each run keeps its checkpoints to itself: one must not find the other's.
        where = [
            f"log.dir={base}",
            f"log.run={name}",
            f"data.cache_dir={cache_root(recipe)}",
            "checkpoint.disk.url=null",
        ]
        status = run_once(recipe_path, [*overrides, *where], strike)
        if status != 0:
            failures.append(f"the {name} run exited with status {status}; see {base / name / 'events.jsonl'}")
        rows[name] = read_events(base / name)
    verdict = judge(recipe, kill, rows["undisturbed"], rows["killed"], failures)
    (base / "killed").mkdir(parents=True, exist_ok=True)
    for target in filter(None, [base / "killed" / "verdict.json", json_path]):
        Path(target).write_text(verdict.to_json() + "\n")
    print(format_verdict(verdict))
    return 0 if verdict.passed else 1


def check_kill(recipe: Recipe, kill: KillSpec) -> None:
    """Refuse a kill that cannot happen under this recipe. Raises RecipeError."""
    problems = []
    if not 0 <= kill.rank < recipe.parallel.workers:
        problems.append(f"--kill: rank={kill.rank} does not exist; the recipe has {recipe.parallel.workers} workers")
    if not 1 <= kill.step <= recipe.train.steps:
        problems.append(f"--kill: step={kill.step} is outside the recipe's 1..{recipe.train.steps}")
    every = recipe.checkpoint.disk.every
    if kill.at in ("disk", "rename") and not (every and every <= recipe.train.steps):
        problems.append(f"--kill: at={kill.at} needs checkpoints on disk; set checkpoint.disk.every")
    if kill.at == "between" and recipe.parallel.workers == 1:
        problems.append("--kill: at=between needs another worker; set parallel.workers")
    if kill.at == "alltoall" and recipe.parallel.ep == 1:
        problems.append("--kill: at=alltoall needs experts on several workers; set parallel.ep")
    if kill.at == "recovery":
        problems.append("--kill: at=recovery needs a kill before it; planaria drill matrix has these cases")
    if recipe.parallel.restarts == 0:
        problems.append("--kill: parallel.restarts is 0, so nobody would restart the workers")
    if problems:
        raise RecipeError(problems)


def run_once(recipe_path: str, overrides: Sequence[str], kill: KillSpec | None) -> int:
    """One whole training job in its own process tree."""
    environment = {name: value for name, value in os.environ.items() if name != KILL_VARIABLE}
    root = str(Path(__file__).resolve().parent.parent)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environment.get("PYTHONPATH")]))
    if kill is not None:
        environment[KILL_VARIABLE] = str(kill)
    command = [sys.executable, "-m", "trainer", "train", recipe_path, *overrides]
    with subprocess.Popen(command, env=environment) as job:
        try:
            return job.wait(timeout=RUN_TIMEOUT_S)
        finally:
            if job.poll() is None:  # the drill is being stopped: its job must not outlive it
                job.terminate()


def judge(
    recipe: Recipe,
    kill: KillSpec,
    calm: list[dict[str, Any]],
    killed: list[dict[str, Any]],
    failures: Sequence[str] = (),
) -> Verdict:
    """Compare the two runs' events. Pure: the same rows give the same verdict."""
    problems = list(failures)
    calm_done, killed_done = _last(calm, "done"), _last(killed, "done")
    strike = _first(killed, "kill")
    plan = _last(killed, "recovery_plan")
    steps = recipe.train.steps
    if strike is None:
        problems.append("the kill never happened")
    if calm_done is None or killed_done is None:
        problems.append("a run did not finish")
    hashes = [row["state_hash"] if row else "" for row in (calm_done, killed_done)]
    if hashes[0] != hashes[1]:
        problems += loss_problems(killed) if recipe.checkpoint.mode == "pec" else ["the state hashes differ"]
    worker_died = kill.who != "keeper"
    if worker_died and (plan is None or plan["tier"] == "fresh"):
        problems.append("the killed run did not resume from a checkpoint")
    executed = sum(1 for row in killed if row["kind"] == "optimizer" and row["rank"] == 0)
    reached = max((r["step"] for r in killed if r["kind"] == "optimizer" and r["attempt"] == 0), default=0)
    resumed = plan["step"] if plan and worker_died else reached
    memory = recipe.checkpoint.memory
    # On a GPU the keeper may hear of a step during the next update, which is queued by then.
    queued = any(row["kind"] == "start" and str(row.get("device")).startswith("cuda") for row in killed)
    allowed = steps + (memory.every + queued if worker_died else 0)
    if memory.enabled and kill.who != "both" and executed > allowed:
        problems.append(f"{executed} optimizer steps were executed, at most {allowed} were needed")
    problems += _sample_problems(recipe, calm, killed)
    return Verdict(
        passed=not problems,
        kill=str(kill),
        tier=plan["tier"] if plan and worker_died else "none",
        killed_step=strike["step"] if strike else -1,
        resumed_step=resumed,
        steps_lost=max(0, reached - resumed),
        optimizer_steps=executed,
        steps=steps,
        seconds=split_seconds(killed, strike, reached) if worker_died and strike else Seconds(),
        state_hash_undisturbed=hashes[0],
        state_hash_killed=hashes[1],
        problems=tuple(problems),
    )


def _sample_problems(recipe: Recipe, calm: list[dict[str, Any]], killed: list[dict[str, Any]]) -> list[str]:
    """The steps that count, each by its last execution, must have consumed what the undisturbed run's did.

    ``consumed`` chains the ids and tokens of everything before it, so one equal link means that no sample was skipped,
    repeated or altered up to there.
    """
    want, got = (
        {row["step"]: (row["samples"], row["consumed"]) for row in rows if row["kind"] == "step"}
        for rows in (calm, killed)
    )
    wrong = [step for step in range(1, recipe.train.steps + 1) if got.get(step) != want.get(step)]
    return [f"steps {wrong} did not consume the samples of the undisturbed run"] if wrong else []


def _first(rows: list[dict[str, Any]], kind: str) -> dict[str, Any] | None:
    return next((row for row in rows if row["kind"] == kind), None)


def _last(rows: list[dict[str, Any]], kind: str) -> dict[str, Any] | None:
    return next((row for row in reversed(rows) if row["kind"] == kind), None)


def format_verdict(verdict: Verdict) -> str:
    lines = [
        f"{'PASS' if verdict.passed else 'FAIL'}: killed at {verdict.kill}, resumed from {verdict.tier} "
        f"at step {verdict.resumed_step}, {verdict.steps_lost} step(s) lost",
        f"  optimizer steps over all attempts: {verdict.optimizer_steps} for {verdict.steps}",
        f"  recovery {verdict.seconds}",
        f"  state hash undisturbed {verdict.state_hash_undisturbed}",
        f"  state hash killed      {verdict.state_hash_killed}",
        *(f"  problem: {problem}" for problem in verdict.problems),
    ]
    return "\n".join(lines)
