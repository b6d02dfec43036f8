"""Judging the cases of a drill matrix by the events of their runs. Pure: the same rows give the same verdicts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from trainer.faults import AFTER_OPTIMIZER
from trainer.matrix import PlannedRun, Strike
from trainer.schema import Recipe
from trainer.timesplit import Seconds, split_seconds

Row = dict[str, Any]


@dataclass(frozen=True)
class CaseVerdict:
    """What becomes ``CASE.json``.

    Attributes:
        tier: what the attempt after the kill was restored from; ``none`` if no worker was started again.
        steps_lost: completed steps that were done again.
        wall_s: of the case; for one of several in a run, from its attempt's start to the next one's recovery.
        leftovers: processes, shared memory, locks and ports that outlived the run; in words.
    """

    case: str
    problems: tuple[str, ...] = ()
    kill: str = ""
    tier: str = "none"
    recovered_step: int = -1
    steps_lost: int = 0
    seconds: Seconds | None = None
    wall_s: float = 0.0
    state_hash_undisturbed: str = ""
    state_hash: str = ""
    leftovers: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return not self.problems and not self.leftovers

    def with_problems(self, *problems: str) -> CaseVerdict:
        return replace(self, problems=(*self.problems, *problems))

    def to_json(self) -> str:
        facts = asdict(self)
        equal = self.state_hash == self.state_hash_undisturbed != ""
        total = {"recovery_s": self.seconds.total} if self.seconds else {}
        return json.dumps({"pass": self.passed, **facts, "state_hash_equal": equal, **total}, indent=1)


@dataclass(frozen=True)
class Evidence:
    """All that is known of a run of several kills, and of the undisturbed one."""

    recipe: Recipe
    calm: Sequence[Row]
    rows: Sequence[Row]
    failures: tuple[str, ...] = ()
    leftovers: tuple[str, ...] = ()

    @property
    def hashes(self) -> tuple[str, str]:
        return final_hash(self.calm), final_hash(self.rows)


def final_hash(rows: Sequence[Row]) -> str:
    """The state hash of the last end of a run; empty if it did not end."""
    return next((row["state_hash"] for row in reversed(rows) if row["kind"] == "done"), "")


def of_kind(rows: Sequence[Row], kind: str, attempt: int | None = None) -> list[Row]:
    return [row for row in rows if row["kind"] == kind and attempt in (None, row["attempt"])]


def judge_run(run: PlannedRun, evidence: Evidence) -> list[CaseVerdict]:
    """A verdict for each case of the run. What went wrong with the whole run is a problem of each of them."""
    calm, end = evidence.hashes
    shared = [*evidence.failures]
    if calm != end or not calm:
        shared.append("the state hashes differ" if end else "the run did not finish")
    verdicts = []
    for attempt, strikes in enumerate(run.attempts):
        for strike in strikes:
            verdict = _judge(strike, attempt, evidence)
            verdicts.append(replace(verdict.with_problems(*shared), state_hash_undisturbed=calm, state_hash=end,
                                    leftovers=evidence.leftovers))  # fmt: skip
    return verdicts


def _judge(strike: Strike, attempt: int, evidence: Evidence) -> CaseVerdict:
    verdict = CaseVerdict(strike.case.name, kill=str(strike.kill))
    struck = [row for row in of_kind(evidence.rows, "kill", attempt) if row["at"] == strike.kill.at]
    if not struck:
        return verdict.with_problems("the kill never happened")
    if strike.case.ends_attempt:
        return _judge_restart(verdict, strike, attempt, struck[0], evidence)
    return _judge_quiet(verdict, attempt, struck[0], evidence)


def _judge_quiet(verdict: CaseVerdict, attempt: int, struck: Row, evidence: Evidence) -> CaseVerdict:
    """The keeper died alone: another must take over, and the same workers go on."""
    after = [row for row in evidence.rows if row["time"] >= struck["time"]]
    problems = []
    if not of_kind(after, "keeper_started"):
        problems.append("no other keeper was started")
    goes_on = [*of_kind(after, "step", attempt), *of_kind(after, "done", attempt)]
    if not goes_on:
        problems.append("training did not go on in the same attempt")
    problems += _diverged(attempt, evidence)
    seconds = max(0.0, min((row["time"] for row in goes_on), default=struck["time"]) - struck["time"])
    return replace(verdict, wall_s=seconds).with_problems(*problems)


def _judge_restart(verdict: CaseVerdict, strike: Strike, attempt: int, struck: Row, evidence: Evidence) -> CaseVerdict:
    rows = evidence.rows
    flip = strike.case.kind == "flip"  # alone in its run; what is damaged after it was verified costs one attempt more
    plans = [row for row in of_kind(rows, "recovery_plan", None if flip else attempt + 1) if row["attempt"] > attempt]
    if not plans:
        return verdict.with_problems("the workers were not started again")
    plan = plans[-1]
    completed = _completed(strike, attempt, rows, struck)
    seconds = split_seconds(_window(rows, struck, plan["attempt"]), struck, completed)
    started = min((row["time"] for row in of_kind(rows, "start", attempt)), default=struck["time"])
    verdict = replace(
        verdict,
        tier=plan["tier"],
        recovered_step=max(plan["step"], 0),
        steps_lost=max(0, completed - max(plan["step"], 0)),
        seconds=seconds,
        wall_s=plan["time"] - started,
    )
    problems = _diverged(plan["attempt"], evidence)
    if flip:
        problems += _flip_problems(verdict, struck, plan, evidence)
    else:
        problems += _loss_problems(verdict, strike, attempt, struck, completed, evidence)
    return verdict.with_problems(*problems)


def _window(rows: Sequence[Row], struck: Row, attempt: int) -> list[Row]:
    """From the kill to the end of the attempt after it, without later ones."""
    return [row for row in rows if row["time"] >= struck["time"] and row["attempt"] <= attempt]


def _completed(strike: Strike, attempt: int, rows: Sequence[Row], struck: Row) -> int:
    """The newest step that was complete when the kill came."""
    known = [row["step"] for row in of_kind(rows, "recovery_plan", attempt)]
    known += [row["step"] for row in of_kind(rows, "step", attempt) if row["time"] <= struck["time"]]
    if strike.kill.at in AFTER_OPTIMIZER:
        known.append(struck["step"])
    return max(known, default=0)


def _loss_problems(
    verdict: CaseVerdict, strike: Strike, attempt: int, struck: Row, completed: int, evidence: Evidence
) -> list[str]:
    """At most what the tiers promise, and never older than what was proved to be there."""
    checkpoint = evidence.recipe.checkpoint
    before = [row for row in evidence.rows if row["time"] <= struck["time"]]
    written = [row["step"] for row in of_kind(before, "disk_written") if row["step"] <= completed]
    proved = [*written]
    if strike.kill.who == "worker" and checkpoint.memory.enabled:
        allowed = checkpoint.memory.every
        proved += [row["committed"] for row in of_kind(before, "step", attempt)]
        proved += [row["step"] for row in of_kind(before, "recovery_plan", attempt)]
        where = "memory"
    else:
        every = checkpoint.disk.every
        due = completed - completed % every if every else 0
        # Steps that were done while the newest one due was still being written are lost with it.
        allowed = every + (completed - due if due not in written else 0)
        where = "disk"
    problems = []
    if verdict.steps_lost > allowed:
        problems.append(f"{verdict.steps_lost} completed steps were lost, {where} allows {allowed}")
    if verdict.recovered_step < max(proved, default=0):
        problems.append(f"step {max(proved)} was proved to be there, step {verdict.recovered_step} was restored")
    return problems


def _flip_problems(verdict: CaseVerdict, struck: Row, plan: Row, evidence: Evidence) -> list[str]:
    """The flip came before the plan, was detected, and cost no more than the next older copy."""
    flips = [row for row in of_kind(evidence.rows, "flip") if struck["time"] <= row["time"] <= plan["time"]]
    if not flips:
        return ["no bit was flipped between the kill and the recovery"]
    set_aside = [row for row in of_kind(evidence.rows, "quarantined") if flips[0]["time"] <= row["time"]]
    # Without its manifest a checkpoint does not exist, which needs no more words.
    unseen = not set_aside and (flips[0]["tier"] == "memory" or plan["step"] == flips[0]["step"])
    problems = ["the flipped bit was not detected"] if unseen else []
    allowed = 2 * evidence.recipe.checkpoint.disk.every + 2
    if verdict.steps_lost > allowed:
        problems.append(f"{verdict.steps_lost} completed steps were lost, the next older copy is {allowed} old at most")
    return problems


def _diverged(attempt: int, evidence: Evidence) -> list[str]:
    """The steps of an attempt must have the losses and the samples of the undisturbed run, to the last bit."""
    want = {row["step"]: _course(row) for row in of_kind(evidence.calm, "step")}
    wrong = [row["step"] for row in of_kind(evidence.rows, "step", attempt) if _course(row) != want.get(row["step"])]
    return [f"attempt {attempt} left the undisturbed run's course at step {min(wrong)}"] if wrong else []


def _course(row: Row) -> tuple[Any, ...]:
    return row["loss"], row["grad_norm"], row["samples"], row["consumed"]


def summary(verdicts: Sequence[CaseVerdict], total_s: float) -> str:
    """A line for each case, and what they come to."""
    width = max((len(v.case) for v in verdicts), default=4)
    lines = [f"{'case':<{width}}  result  tier    step  lost  recovery   seconds"]
    for v in verdicts:
        lines.append(f"{v.case:<{width}}  {_columns(v)}")
        lines += [f"    {problem}" for problem in (*v.problems, *v.leftovers)]
    passed = sum(v.passed for v in verdicts)
    word = "PASS" if passed == len(verdicts) else "FAIL"
    lines.append(f"{word}: {passed} of {len(verdicts)} cases in {total_s:.0f} s")
    return "\n".join(lines)


def _columns(v: CaseVerdict) -> str:
    recovery = f"{v.seconds.total:8.1f}" if v.seconds else "       -"
    step = f"{v.recovered_step:4d}" if v.recovered_step >= 0 else "   -"
    return f"{'pass' if v.passed else 'FAIL':<6}  {v.tier:<6}  {step}  {v.steps_lost:4d}  {recovery}  {v.wall_s:8.1f}"
