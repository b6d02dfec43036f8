"""The drill matrix's table, its packing into runs, and its verdicts, all without a process."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.faults import KEEPER_POINTS, POINTS, VICTIMS, KillSpec, format_attempts, parse_attempts
from trainer.matrix import (
    DISK_EVERY,
    Case,
    PlannedRun,
    Strike,
    all_cases,
    kill_cases,
    matching,
    planned_runs,
    reduced_cases,
    settings,
)
from trainer.matrix_verdict import CaseVerdict, Evidence, judge_run, summary
from trainer.recipe import load_recipe

RECIPE = Path(__file__).parent.parent / "drills" / "drill.yaml"
STEPS = 32
EVERY_KILL = kill_cases(2, POINTS)


def test_the_matrix_has_every_point_on_every_rank_with_every_victim_and_no_case_twice() -> None:
    cases = all_cases([2, 4])
    names = [case.name for case in cases]
    assert len(set(names)) == len(names)
    kills = {(case.at, case.rank, case.who) for case in cases if case.kind == "kill" and case.ranks == 2}
    assert kills == {(at, rank, who) for at in POINTS for rank in range(2) for who in VICTIMS}
    assert sum(case.kind == "flip" for case in cases) == 20
    assert {case.at for case in cases if case.ranks == 4} >= {"alltoall", "optimizer", "between", "disk", "recovery"}


def test_what_cannot_happen_is_no_case() -> None:
    alone = all_cases([1], expert_parallel=False)
    assert not {"alltoall", "between"} & {case.at for case in alone}
    assert "swapped-files" not in {case.kind for case in alone}


def test_cases_are_chosen_by_pattern() -> None:
    cases = all_cases([2])
    assert [c.name for c in matching(cases, "2.kill.seal.rank1.*")] == [f"2.kill.seal.rank1.{who}" for who in VICTIMS]
    assert {c.kind for c in matching(cases, "latest,sigterm")} == {"stale-latest", "empty-latest", "sigterm"}
    assert not matching(cases, "nothing")


@given(st.lists(st.sampled_from(EVERY_KILL), unique=True, min_size=1), st.integers(1, 14))
def test_packing_gives_every_case_one_kill_that_can_happen(cases: list[Case], longest: int) -> None:
    runs = planned_runs(cases, STEPS, longest)
    packed = [strike.case for run in runs for strikes in run.attempts for strike in strikes]
    assert sorted(c.name for c in packed if c.kind != "opening") == sorted(c.name for c in cases)
    for run in runs:
        assert parse_attempts(format_attempts(run.kills)) == run.kills
        assert run.attempts[0][0].case.at != "recovery", "nothing to recover from"
        reached = 0
        for index, strikes in enumerate(run.attempts):
            assert len(strikes) <= 2
            assert strikes[-1].case.ends_attempt or index == len(run.attempts) - 1, "nobody starts the workers again"
            for before, after in pairwise(strikes):
                assert not before.case.ends_attempt
                assert not after.case.in_keeper, "the second keeper knows nothing of it"
            for strike in strikes:
                if strike.case.at == "recovery":
                    assert reached >= 2 * DISK_EVERY, "if all are killed before, nothing is there to be recovered"
                else:
                    assert reached < strike.kill.step < STEPS
                    reached = strike.kill.step
                if strike.case.at in ("disk", "rename"):
                    assert strike.kill.step % DISK_EVERY == 0, "nothing is written at that step"


def test_a_flip_has_a_run_alone_and_checkpoints_to_fall_back_to() -> None:
    runs = planned_runs([c for c in reduced_cases(2) if c.kind == "flip"], STEPS)
    assert [len(run.attempts) for run in runs] == [1, 1]
    assert all(run.attempts[0][0].kill.step > 2 * DISK_EVERY for run in runs)


def test_more_ranks_still_accumulate_gradients() -> None:
    recipe = load_recipe(RECIPE, settings(load_recipe(RECIPE), 4))
    assert (recipe.parallel.workers, recipe.parallel.ep, recipe.accumulation) == (4, 2, 2)


# Verdicts


def row(time: float, kind: str, attempt: int, step: int, **fields: Any) -> dict[str, Any]:
    return {"time": time, "rank": 0, "attempt": attempt, "step": step, "kind": kind, **fields}


def step_row(time: float, attempt: int, step: int, committed: int = 0, loss: float = 1.0) -> dict[str, Any]:
    return row(time, "step", attempt, step, loss=loss / step, grad_norm=1.0, samples=8 * step, consumed=str(step),
               committed=committed)  # fmt: skip


CALM = [*(step_row(step, 0, step) for step in range(1, 13)), row(13, "done", 0, 12, state_hash="ab")]
KILLED = [
    row(0, "start", 0, 0, spawned=0, imported=0, joined=0),
    row(0, "recovery_plan", 0, -1, tier="fresh"),
    *(step_row(step, 0, step, step - 1) for step in range(1, 7)),
    row(6.5, "kill", 0, 7, at="optimizer"),
    row(7, "start", 1, 0, spawned=6.8, imported=6.9, joined=7),
    row(7.1, "recovery_plan", 1, 6, tier="memory"),
    *(step_row(step + 0.2, 1, step, step - 1) for step in range(7, 13)),
    row(13, "done", 1, 12, state_hash="ab"),
]


def run_of(at: str = "optimizer", who: str = "worker") -> PlannedRun:
    case = Case("kill", 2, at, 1, who)
    return PlannedRun("kills", 2, ((Strike(case, KillSpec(1, 7, at, who)),),))


def judged(rows: list[dict[str, Any]], run: PlannedRun | None = None, **facts: Any) -> CaseVerdict:
    recipe = load_recipe(RECIPE)
    (verdict,) = judge_run(run or run_of(), Evidence(recipe, CALM, rows, **facts))
    return verdict


def test_a_recovery_without_loss_passes() -> None:
    verdict = judged(KILLED)
    assert verdict.passed, verdict.problems
    assert (verdict.tier, verdict.recovered_step, verdict.steps_lost) == ("memory", 6, 0)
    assert '"state_hash_equal": true' in verdict.to_json()
    assert "PASS: 1 of 1" in summary([verdict], 1.0)


def changed(kind: str, attempt: int, **fields: Any) -> list[dict[str, Any]]:
    return [{**r, **fields} if (r["kind"], r["attempt"]) == (kind, attempt) else r for r in KILLED]


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        (changed("done", 1, state_hash="cd"), "the state hashes differ"),
        (KILLED[:-1], "the run did not finish"),
        ([r for r in KILLED if r["kind"] != "kill"], "the kill never happened"),
        ([r for r in KILLED if r["attempt"] == 0], "the workers were not started again"),
        (changed("recovery_plan", 1, step=4), "2 completed steps were lost, memory allows 1"),
        (changed("recovery_plan", 1, step=4), "step 5 was proved to be there, step 4 was restored"),
        (changed("step", 1, loss=2.0), "attempt 1 left the undisturbed run's course at step 7"),
        (changed("step", 1, consumed="x"), "attempt 1 left the undisturbed run's course at step 7"),
    ],
)
def test_what_is_wrong_is_said(rows: list[dict[str, Any]], problem: str) -> None:
    verdict = judged(rows)
    assert not verdict.passed
    assert problem in verdict.problems
    assert "FAIL: 0 of 1" in summary([verdict], 1.0)


def test_leftovers_and_a_failed_run_fail_every_case() -> None:
    assert not judged(KILLED, leftovers=("process 7 is left",)).passed
    assert not judged(KILLED, failures=("the run exited with status 1",)).passed


def test_without_a_keeper_the_disk_interval_may_be_lost_but_not_what_is_on_disk() -> None:
    on_disk = row(4.5, "disk_written", 0, 4)
    rows = sorted([*changed("recovery_plan", 1, step=4, tier="disk"), on_disk], key=lambda r: r["time"])
    assert judged(rows, run_of(who="both")).passed
    older = [{**r, "step": 2} if r["kind"] == "recovery_plan" and r["attempt"] else r for r in rows]
    assert "step 4 was proved to be there, step 2 was restored" in judged(older, run_of(who="both")).problems


def test_a_keeper_killed_alone_needs_another_and_no_restart() -> None:
    rows = [r | {"attempt": 0} for r in KILLED if r["kind"] not in ("recovery_plan", "start")]
    run = run_of(who="keeper")
    assert "no other keeper was started" in judged(rows, run).problems
    rows.insert(8, row(6.6, "keeper_started", 0, 0))
    assert judged(rows, run).passed
    stopped = [r for r in rows if r["time"] <= 6.6]
    assert "training did not go on in the same attempt" in judged(stopped, run).problems


def test_a_flip_must_be_seen_before_the_recovery_and_detected() -> None:
    run = run_of()
    case = replace(run.attempts[0][0].case, kind="flip", where="memory")
    run = PlannedRun("flips", 2, ((Strike(case, KillSpec(1, 7)),),))
    rows = changed("kill", 0, at="forward")
    assert judged(rows, run).problems == ("no bit was flipped between the kill and the recovery",)
    rows = sorted([*rows, row(6.6, "flip", 0, 6, tier="memory")], key=lambda r: r["time"])
    assert judged(rows, run).problems == ("the flipped bit was not detected",)
    rows = sorted([*rows, row(6.9, "quarantined", 0, 6)], key=lambda r: r["time"])
    assert judged(rows, run).passed


def test_points_of_the_keeper_are_points() -> None:
    assert set(KEEPER_POINTS) < set(POINTS)
