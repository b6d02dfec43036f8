"""Mode pec with real kills: experts come back older, all that is lost is said and counted, and the run turns exact."""

from __future__ import annotations

import pytest

from checkpointing.records import Kind
from checkpointing.store import Checkpoint, list_checkpoints, verify
from tests.checkpointing.placement import imbalance
from trainer.drill import judge
from trainer.faults import KillSpec

pytestmark = [pytest.mark.drill, pytest.mark.slow]

# One expert of four per capture: a fault loses about (4/1 - 1)/2 of 12 steps, an eighth; with two a twenty-fourth.
LOSSY = "checkpoint={mode: pec, pec: {k_snapshot: 1, max_plt: 0.19}, wal: {rotation: 3}, linger_s: 20}"
ROUTED = 8 * 32 * 2  # token copies per step and layer


def kills(*steps: int) -> str:
    return ";".join(str(KillSpec(1 - i % 2, step, "optimizer")) for i, step in enumerate(steps))


def of_kind(rows, kind):
    return [row for row in rows if row["kind"] == kind]


@pytest.fixture(scope="module")
def killed_twice(start):
    return start("pec-twice", [LOSSY], kill=kills(6, 9)).finish()


def test_k_grows_with_the_first_loss_and_the_second_turns_the_run_exact(killed_twice):
    plans = of_kind(killed_twice, "recovery_plan")[1:]
    assert [(plan["step"], plan["tier"]) for plan in plans] == [(5, "memory"), (8, "memory")]
    first, second, third = of_kind(killed_twice, "plt")
    assert (first["k"], first["plt"], first["mode"]) == (1, 0, "pec")
    assert (second["k"], second["faults"], second["mode"]) == (2, 1, "pec")
    assert (third["faults"], third["mode"]) == (2, "wal")
    assert 0 < second["plt"] < third["plt"] < third["max_plt"]
    assert second["counted"] == [5 * ROUTED] * 2
    assert third["counted"] == [8 * ROUTED] * 2
    (changed,) = of_kind(killed_twice, "mode_changed")
    assert (changed["mode"], changed["attempt"]) == ("wal", 2)
    assert [row["both"] for row in of_kind(killed_twice, "reshaped")] == [True] * 4


def test_both_ranks_capture_equally_many_bytes(killed_twice):
    """One expert of each of two layers, or two, over two ranks: K x layers divides by the EP degree."""
    steps = {row["step"] for row in of_kind(killed_twice, "pec_bytes")}
    assert steps == {1, 2, 3, 4, 5, 6, 7, 8}
    for step in steps:
        ranks = {r["rank"]: r["bytes"] for r in of_kind(killed_twice, "pec_bytes") if r["step"] == step}
        assert imbalance(ranks.values()) <= 1.05


def test_every_expert_s_age_is_listed_before_it_is_restored(killed_twice):
    ages = of_kind(killed_twice, "expert_ages")
    assert [row["step"] for row in ages] == [5, 8]
    for row in ages:
        assert len(row["lines"]) == 2
        assert all(line.count("step") == 4 and "(-" in line for line in row["lines"])
        mine = [r for r in of_kind(killed_twice, "recovered") if (r["attempt"], r["rank"]) == (row["attempt"], 0)]
        assert row["time"] <= mine[0]["time"]


def test_after_the_switch_a_kill_costs_no_bit(start, killed_twice):
    rows = start("pec-thrice", [LOSSY], kill=kills(6, 9, 11)).finish()
    assert of_kind(rows, "recovery_plan")[-1]["step"] == 10
    assert of_kind(rows, "recovered")[-1]["redone"]
    assert of_kind(rows, "plt")[-1]["plt"] == of_kind(killed_twice, "plt")[-1]["plt"]
    assert of_kind(rows, "done")[0]["state_hash"] == of_kind(killed_twice, "done")[0]["state_hash"]


def test_without_memory_experts_of_the_disk_s_ages_come_back_and_the_end_is_whole(start, undisturbed):
    kill = KillSpec(1, 10, "optimizer", "both")
    settings = ["checkpoint={mode: pec, pec: {k_snapshot: 2, max_plt: 0.9}, disk: {every: 3}, linger_s: 20}"]
    job = start("pec-disk", settings, kill=str(kill))
    rows = job.finish()
    verdict = judge(job.recipe, kill, undisturbed, rows)
    assert verdict.passed, verdict.problems
    assert verdict.tier == "disk"
    assert verdict.state_hash_killed != verdict.state_hash_undisturbed
    step, path = list_checkpoints(job.run_dir / "checkpoints")[-1]
    assert step == 12
    assert verify(path) == []
    assert {r.step for r in Checkpoint.open(path).records if r.kind is Kind.BASE} == {12}
    again = start("pec-disk", settings).finish()
    assert of_kind(again, "done")[-1]["state_hash"] == verdict.state_hash_killed


def test_a_run_too_short_to_lose_anything_is_exact_from_its_start(start, undisturbed):
    job = start("pec-short", ["checkpoint={mode: pec, pec: {k_snapshot: 1, fallback: dense}}"], kill=kills(7))
    rows = job.finish()
    assert of_kind(rows, "mode_changed")[0]["mode"] == "dense"
    assert of_kind(rows, "done")[0]["state_hash"] == of_kind(undisturbed, "done")[0]["state_hash"]
    assert of_kind(rows, "plt")[-1]["lost"] == 0
