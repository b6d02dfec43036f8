"""The plan card says what every checkpoint mode would cost, from measurements if there are any."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from checkpointing.cost import Bandwidths, Partition, StepTimes, budget_share, wal_memory
from trainer.mode_plan import Share, basis_of, budget_of, mode_rows
from trainer.plan import PlanError, plan_run
from trainer.plan_card import card
from trainer.recipe import load_recipe
from trainer.schema import Recipe

QUICKSTART = Path(__file__).resolve().parents[2] / "recipes" / "quickstart.yaml"
UNLIMITED = 1 << 60
MEASURED = {"kind": "bandwidth", "device_to_host": None, "host_copy": 2e9, "hash": 4e9, "disk": 1e8}


def quickstart(*overrides: str) -> Recipe:
    return load_recipe(QUICKSTART, overrides)


def attempt(seconds: list[float], optimizer_s: float, number: int = 0) -> list[dict[str, Any]]:
    """Rows as the loop writes them: ``optimizer`` before the update, ``step`` after it, of two ranks."""
    rows: list[dict[str, Any]] = []
    for step, duration in enumerate(seconds, 1):
        common = {"attempt": number, "step": step}
        rows += [{"kind": "optimizer", "rank": rank, "time": 100.0 * step + rank * 7, **common} for rank in range(2)]
        end = 100.0 * step + optimizer_s
        rows.append({"kind": "step", "rank": 0, "time": end, "seconds": duration, "stall_copied_s": 0.5, **common})
    return rows


def rows_of(recipe: Recipe, budget: int = UNLIMITED, events: list[dict[str, Any]] | None = None) -> dict[str, str]:
    share = plan_run(recipe).share
    return dict(mode_rows(recipe, share, basis_of(recipe, share, events or []), budget))


def test_share_is_what_a_worker_trains() -> None:
    plan = plan_run(quickstart())
    assert plan.share.parameters == plan.optimizer_bytes // 12
    assert plan.share.experts == plan.total["experts"] // 2
    assert (plan.share.num_experts, plan.share.moe_layers, plan.share.top_k) == (32, 4, 4)


@pytest.mark.parametrize("mode", ["wal", "dense", "pec"])
def test_each_mode_has_a_row_and_the_recipes_is_marked(mode: str) -> None:
    rows = rows_of(quickstart(f"checkpoint.mode={mode}"))
    assert [name.strip("* ") for name in rows] == ["capture", "wal", "dense", "pec", "disk"]
    assert [name for name in rows if name.startswith("*")] == [f"* {mode}"]
    for name, text in rows.items():
        if name not in ("capture", "  disk"):
            assert all(part in text for part in ("a step", "of memory", "predicted stall", "restore")), text
            assert ("exact" in text) == ("pec" not in name), text


def test_what_was_not_measured_is_said_to_be_assumed() -> None:
    recipe = quickstart()
    share = plan_run(recipe).share
    steps = attempt([9.0] * 5 + [1.5, 1.7, 1.6], optimizer_s=0.1)
    assert basis_of(recipe, share).note == "assumed bandwidth and step time"
    assert basis_of(recipe, share, [MEASURED]).note == "assumed step time"
    assert basis_of(recipe, share, steps).note == "assumed bandwidth"
    basis = basis_of(recipe, share, [*steps, MEASURED])
    assert basis.note == "measured in this run"
    assert basis.rates == Bandwidths(None, 2e9, 4e9, 1e8)
    on_device = [{**MEASURED, "device_to_host": 5e10, "device_sums": True}]
    assert basis_of(recipe, share, on_device).rates == Bandwidths(5e10, 2e9, 4e9, 1e8, device_sums=True)
    assert not basis_of(recipe, share).rates.device_sums
    assert basis_of(quickstart("parallel.device=cuda"), share).rates.device_sums
    assert "4 GB/s hashed" in rows_of(recipe, events=[MEASURED])["capture"]
    assert "hashed by the GPU" in rows_of(recipe, events=on_device)["capture"]
    # Without the stall a step takes 1.1 s; the first steps of a run are not typical.
    assert basis.times.step == pytest.approx(1.1)
    assert basis.times.forward_backward == pytest.approx(1.0)
    # A GPU's host queues the update before the gradients are there.
    late = [row | {"gradients_there": 100.0 * row["step"] + 0.04} if row["kind"] == "step" else row for row in steps]
    assert basis_of(recipe, share, late).times.forward_backward == pytest.approx(1.04)


def test_steps_are_paired_within_their_attempt() -> None:
    recipe = quickstart()
    share = plan_run(recipe).share
    torn = [row for row in attempt([3.0] * 9, 0.2) if row["kind"] == "optimizer"]
    again = attempt([2.5] * 9, 0.4, number=1)
    times = basis_of(recipe, share, torn + again).times
    assert (times.step, times.forward_backward) == (pytest.approx(2.0), pytest.approx(1.6))


def test_an_assumed_step_follows_from_the_work() -> None:
    def assumed(*overrides: str) -> StepTimes:
        recipe = quickstart(*overrides)
        return basis_of(recipe, plan_run(recipe).share).times

    once, twice = assumed(), assumed("train.global_batch_size=16")
    assert twice.step == pytest.approx(2 * once.step)
    assert assumed("parallel.device=cuda").step < once.step / 100


def test_the_budget_is_the_machines_shared_by_its_workers() -> None:
    assert budget_of(quickstart("checkpoint.memory.budget_gib=3"), 1) == 3 * (1 << 30) // 2
    assert budget_of(quickstart(), 1 << 34) == budget_share(1 << 34, 2)
    assert budget_of(quickstart(), None) > 1 << 50


def test_a_budget_binds_and_one_too_small_is_refused() -> None:
    recipe = quickstart("checkpoint.mode=wal", "checkpoint.memory.budget_gib=0.01")
    with pytest.raises(PlanError, match=r"mode wal at rotation \d+ needs [\d,]+ bytes .*budget_gib"):
        card(recipe, num_files=1, num_bytes=1)
    auto = card(quickstart("checkpoint.mode=wal"), num_files=1, num_bytes=1, available=1 << 20)
    assert auto.count("does not fit here") == 3
    slow = [{**MEASURED, "host_copy": 6e7}]
    free = rows_of(quickstart("checkpoint.mode=wal"), events=slow)["* wal"]
    partition = Partition(plan_run(quickstart()).share.parameters, 4, disk=True)
    tight = rows_of(quickstart("checkpoint.mode=wal"), wal_memory(partition, 3), slow)["* wal"]
    assert "bound by the copy" in free
    assert "bound by the memory budget" in tight


def test_the_recipes_own_numbers_are_priced() -> None:
    assert (
        "rotation 9, as the recipe says"
        in rows_of(quickstart("checkpoint.mode=wal", "checkpoint.wal.rotation=9"))["* wal"]
    )
    assert (
        "every 7 steps, as the recipe says"
        in rows_of(quickstart("checkpoint.mode=dense", "checkpoint.memory.every=7"))["* dense"]
    )
    pec = rows_of(quickstart("checkpoint.mode=pec", "checkpoint.pec.k_snapshot=8", "train.steps=10000"))["* pec"]
    assert "8 of 32 experts a layer every 1 steps, as the recipe says" in pec
    assert "a fault loses 0.01% of the tokens" in pec, "3/2 of 10,000 steps"


def test_pec_says_at_once_when_the_run_is_too_short_for_it() -> None:
    pec = ("checkpoint.mode=pec", "checkpoint.pec.k_snapshot=1", "train.steps=20", "train.warmup_steps=0")
    assert "so at once: " in (grown := rows_of(quickstart(*pec))["* pec"])
    assert grown.endswith("K=16 from now on")
    assert rows_of(quickstart(*pec, "train.steps=10"))["* pec"].endswith("going on in mode wal")
    fixed = rows_of(quickstart(*pec, "checkpoint.pec.dynamic_k=false", "checkpoint.pec.fallback=dense"))["* pec"]
    assert "going on in mode dense" in fixed


def test_gradients_are_counted_in_the_dtype_of_training() -> None:
    single = rows_of(quickstart("checkpoint.mode=wal", "checkpoint.wal.rotation=4"))["* wal"]
    half = rows_of(quickstart("checkpoint.mode=wal", "checkpoint.wal.rotation=4", "parallel.dtype=bf16"))["* wal"]
    parameters = plan_run(quickstart()).share.parameters
    assert f"{parameters * 7 / 2**20:.1f} MiB a step" in single
    assert f"{parameters * 5 / 2**20:.1f} MiB a step" in half


def test_a_run_whose_experts_do_not_train_has_no_pec() -> None:
    recipe = quickstart()
    share = Share(parameters=1000, experts=0, num_experts=32, moe_layers=4, active=10**6, top_k=4)
    assert "no routed experts train" in dict(mode_rows(recipe, share, basis_of(recipe, share), UNLIMITED))["  pec"]


def test_a_disk_too_slow_for_its_interval_is_named() -> None:
    slow = {**MEASURED, "disk": 1e6}
    assert "it delays the next one, due after 50" in rows_of(quickstart(), events=[slow])["  disk"]
    assert "delays" not in rows_of(quickstart(), events=[MEASURED])["  disk"]
    assert "  disk" not in rows_of(quickstart("checkpoint.disk.every=0"), events=[MEASURED])
    unknown = {name: value for name, value in MEASURED.items() if name != "disk"}
    assert "  disk" not in rows_of(quickstart(), events=[unknown])
