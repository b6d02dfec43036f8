"""The arithmetic from raw figures to ratios."""

import math
import random

import pytest

from benchmarks.report import extra_seconds, fastest_quarter, interval, noise, paired_costs, summarise, tables


def block(arm, durations, stalls=None, drain_s=0.5):
    return {"arm": arm, "durations": durations, "stalls": stalls or [0.0] * len(durations), "drain_s": drain_s}


OFF = block("off", [1.0, 1.0, 9.0])  # one outlier, which a median must not feel


def test_cost_is_of_the_blocks_on_both_sides():
    slow_off = block("off", [2.0, 2.0, 2.0])
    blocks = [OFF, block("wal", [1.65, 1.65, 1.65]), slow_off, block("wal", [2.2, 2.2, 7.0])]
    assert paired_costs(blocks, "wal") == pytest.approx([0.1, 0.1])
    assert paired_costs(blocks, "dense") == []
    assert paired_costs([block("dense", [1.0]), block("wal", [1.0])], "wal") == [], "nothing to compare with"


def test_the_interval_of_a_median_holds_it_as_often_as_it_says():
    assert interval([3.0, 1.0, 2.0]) == (1.0, 3.0)
    draw, held = random.Random(7), 0
    for _ in range(400):
        low, high = interval([draw.expovariate(1.0) for _ in range(50)])
        held += low <= math.log(2) <= high
    assert 0.92 <= held / 400 <= 0.99


def test_the_fastest_quarter_feels_no_slow_steps():
    blocks = [block("off", [1.0, 1.1, 5.0, 9.0]), block("wal", [3.0]), block("off", [1.2, 7.0, 7.0, 7.0])]
    assert fastest_quarter(blocks, "off") == 1.2
    assert fastest_quarter(blocks, "wal") == 3.0


def test_extra_seconds_count_every_step_until_the_save_is_safe():
    blocks = [OFF, block("deepspeed save", [6.0, 1.5, 1.0])]
    assert extra_seconds(blocks, "deepspeed save") == pytest.approx([5.5])


def test_noise_is_the_spread_of_blocks_without_checkpoints():
    assert noise([OFF, OFF, block("wal", [5.0]), OFF]) == 0.0
    spread = noise([block("off", [v]) for v in (0.9, 1.0, 1.0, 1.1)])
    assert 0.0 < spread <= 0.1


def result(**changes):
    found = {"total_s": 2.0, "attach_s": 0.5, "verify_s": 0.1, "apply_s": 1.2, "pin_s": 0.2, "redo_s": 0.3}
    found |= {"restore_s": 1.4, "check_s": 0.25}
    wal = found | {"weights_s": 0.1, "copy_s": 1.1, "redone": 7, "nbytes": 10_000_000_000, "exact": True}
    blocks = [OFF, block("wal", [1.02] * 3, [0.01] * 3), OFF, block("dcp async", [4.0, 1.0], [3.0, 0.0])]
    return {
        "tokens_per_step": 100,
        "state_bytes_per_rank": 12_000_000_000,
        "world": 1,
        "ceilings": {"device": {"d2h": 50.0, "h2d": 10.0}, "memcpy": {1: 8.0}, "xxh3_128": {1: 20.0}, "disk": {}},
        "arms": {"wal": {"bytes_per_step_per_rank": 5_000_000_000}},
        "blocks": blocks,
        "recoveries": {"wal": [wal], "dcp async": [{"total_s": 8.0, "exact": True}]},
        "skipped": {"deepspeed save": "the time ran out"},
    } | changes


def test_summary_compares_each_arm_with_wal():
    summary = summarise(result())
    assert summary["off_step_s"] == 1.0
    assert summary["tokens_per_s"] == 100
    wal, dcp = summary["rows"]["wal"], summary["rows"]["dcp async"]
    assert wal["cost"] == pytest.approx(0.02)
    assert wal["cost_interval"] == pytest.approx((0.02, 0.02))
    assert wal["cost_fastest_quarter"] == pytest.approx(0.02)
    assert wal["capture_alone_gbps"] == pytest.approx(10.0)
    assert dcp["extra_s_per_save"] == pytest.approx(3.0)
    assert dcp["stall_s_over_wal"] == pytest.approx(300)
    assert dcp["steps_between_saves"] == pytest.approx(150)
    assert summary["recoveries"]["wal"]["floor_s"] == pytest.approx(1.0)
    assert summary["recoveries"]["wal"]["copy_over_floor"] == pytest.approx(1.1)
    assert summary["recoveries"]["dcp async"]["total_s_over_wal"] == pytest.approx(4.0)


def test_no_ratio_to_a_cost_that_is_lost_in_noise():
    blocks = [OFF, block("wal", [0.99] * 3, [0.01] * 3), OFF, block("dcp async", [4.0, 1.0], [3.0, 0.0])]
    found = result(blocks=blocks)
    summary = summarise(found)
    assert summary["rows"]["dcp async"]["extra_s_per_save_over_wal"] is None
    assert summary["rows"]["dcp async"]["stall_s_over_wal"] == pytest.approx(300)
    assert "dcp async" in tables(found | {"summary": summary})


def test_one_wrong_load_makes_the_row_wrong():
    wrong = result(recoveries={"dcp async": [{"total_s": 1.0, "exact": True}, {"total_s": 1.0, "exact": False}]})
    assert summarise(wrong)["recoveries"]["dcp async"]["exact"] is False
    assert "NO" in tables(wrong | {"summary": summarise(wrong)})


def test_tables_name_what_was_left_out():
    text = tables(result() | {"summary": summarise(result())})
    assert "left out: deepspeed save: the time ran out" in text
    assert "every step" in text
    assert "0.500    1.400    0.100    0.250   0.200    1.200   0.300" in text  # as the head of the table has them


def test_nothing_measured_is_said():
    assert tables({"summary": summarise(result(blocks=[]))}) == "nothing was measured"
