"""How a drill judges: what a kill may have cost, on a CPU and on a GPU."""

from pathlib import Path
from typing import Any

import pytest

from trainer.drill import judge
from trainer.faults import KillSpec
from trainer.recipe import load_recipe

QUICKSTART = Path(__file__).resolve().parents[2] / "recipes" / "quickstart.yaml"
STEPS = 8


def rows_of(first: int, attempt: int, device: str, last: int = STEPS) -> list[dict[str, Any]]:
    """An attempt that makes the steps from ``first`` on, or dies in the update of ``last``."""
    begin = 100.0 * attempt
    start = {"kind": "start", "device": device, "spawned": begin, "imported": begin, "joined": begin}
    rows: list[dict[str, Any]] = [start, {"kind": "ready"}, {"kind": "recovered", "step": first - 1, "redone": []}]
    for step in range(first, last + 1):
        rows.append({"kind": "optimizer", "step": step})
        if last == STEPS or step < last:
            rows.append({"kind": "step", "step": step, "samples": step, "consumed": str(step)})
    ends = {"kind": "done", "state_hash": "same"} if last == STEPS else {"kind": "kill", "step": last}
    return [{"rank": 0, "attempt": attempt, "time": begin + i, **row} for i, row in enumerate([*rows, ends])]


@pytest.mark.parametrize(("device", "resumed", "passes"), [
    ("cpu", 4, True), ("cpu", 3, False), ("cuda:0", 3, True), ("cuda:0", 2, False),
])  # fmt: skip
def test_a_step_that_the_keeper_did_not_know_of_may_be_lost_on_a_gpu_alone(device, resumed, passes):
    """Killed in the update of 5: on a CPU 4 was captured, on a GPU perhaps not."""
    plan = {"kind": "recovery_plan", "rank": 0, "attempt": 1, "time": 99.0, "tier": "memory", "step": resumed}
    killed = [*rows_of(1, 0, device, last=5), plan, *rows_of(resumed + 1, 1, device)]
    recipe = load_recipe(QUICKSTART, [f"train.steps={STEPS}", "train.warmup_steps=1"])
    verdict = judge(recipe, KillSpec(0, 5, "optimizer"), rows_of(1, 0, device), killed)
    assert verdict.passed == passes, verdict.problems
    assert verdict.optimizer_steps == 5 + STEPS - resumed
