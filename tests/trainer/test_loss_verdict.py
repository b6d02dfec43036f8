"""The drill's verdict on mode pec: what differs must have been said and counted."""

from __future__ import annotations

from typing import Any

import pytest

from trainer.loss_verdict import loss_problems

PLAN = {"kind": "recovery_plan", "attempt": 1, "tier": "memory", "step": 5}
AGES = {"kind": "expert_ages", "attempt": 1, "lines": ["L00: E000 step 5, E001 step 3 (-2)"]}
METER = {"kind": "plt", "attempt": 1, "plt": 0.02, "max_plt": 0.0375, "mode": "pec"}


def test_a_loss_that_is_listed_and_metered_is_no_problem():
    assert loss_problems([PLAN, AGES, METER]) == []


@pytest.mark.parametrize(
    ("rows", "word"),
    [
        ([PLAN, METER], "ages"),
        ([PLAN, AGES], "meter"),
        ([PLAN, METER, {**AGES, "attempt": 0}], "attempt 1"),
        ([PLAN, METER, {**AGES, "lines": ["L00: E000 step 5, E001 step 5"]}], "although"),
        ([PLAN, AGES, {**METER, "plt": 0.04}], "still pec"),
    ],
)
def test_what_is_not_said_is_a_problem(rows: list[dict[str, Any]], word: str):
    assert any(word in problem for problem in loss_problems(rows))


def test_a_run_that_turned_exact_may_have_passed_its_limit():
    assert loss_problems([PLAN, AGES, {**METER, "plt": 0.04, "mode": "wal"}]) == []
