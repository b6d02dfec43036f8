"""Whether a run in mode ``pec`` whose state differs from the undisturbed run's has said all that it lost (no torch)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def loss_problems(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """What is wrong with the events of a killed run, in words.

    Each recovery must have listed the age of every expert and metered the tokens lost; some expert must have come back
    older, since nothing else may differ; and ``max_plt`` must not have been passed in mode ``pec``.
    """
    rows = list(rows)
    problems = []
    plans = [row for row in rows if row["kind"] == "recovery_plan" and row["tier"] != "fresh"]
    for plan in plans:
        for kind, what in (("expert_ages", "list its experts' ages"), ("plt", "meter the tokens it lost")):
            if not any(row["kind"] == kind and row["attempt"] == plan["attempt"] for row in rows):
                problems.append(f"the recovery of attempt {plan['attempt']} did not {what}")
    ages = [line for row in rows if row["kind"] == "expert_ages" for line in row["lines"]]
    if not any("(-" in line for line in ages):
        problems.append("the state hashes differ, although every expert came back at the restored step")
    meters = [row for row in rows if row["kind"] == "plt"]
    problems += [
        f"{row['plt']:.2%} of the tokens are lost, max_plt is {row['max_plt']:.2%}, and the mode is still pec"
        for row in meters
        if row["plt"] >= row["max_plt"] and row["mode"] == "pec"
    ]
    return problems
