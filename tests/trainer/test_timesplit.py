"""The parts of a recovery's time, from rows as real runs write them."""

import pytest

from trainer.timesplit import Seconds, split_seconds


def row(time, kind, attempt=0, rank=0, step=None, **fields):
    return {"time": time, "kind": kind, "attempt": attempt, "rank": rank, "step": step, **fields}


BEFORE = [
    row(0.0, "start", spawned=-9.0, imported=-4.0, joined=-3.0),
    row(1.0, "step", step=6),
    row(10.0, "kill", step=7),
    row(10.1, "worker_exit", worker=1),
    row(10.3, "workers_ended"),
]


def attempt(at, number):
    """Two ranks; the slower of them counts."""
    rows = [row(at + 6.5, "start", number, rank, spawned=at + 0.5 + rank / 8, imported=at + 5 + rank, joined=at + 6.25)
            for rank in (0, 1)]  # fmt: skip
    return [
        *rows,
        row(at + 7, "recover_begin", number),
        row(at + 8, "recovered", number),
        row(at + 9, "recovered", number),
    ]


def test_the_parts_follow_each_other_and_sum_up():
    rows = [*BEFORE, *attempt(10, 1), row(20.0, "step", 1, step=7), row(21.0, "step", 1, step=8)]
    found = split_seconds(rows, BEFORE[2], reached=7)
    assert found.detect == pytest.approx(0.1)
    assert found.teardown == pytest.approx(0.2)
    assert found.spawn == pytest.approx(0.325)
    assert found.imports == pytest.approx(5.375)
    assert found.join == pytest.approx(0.25)
    assert found.build == pytest.approx(0.75)
    assert found.load == pytest.approx(2.0)
    assert found.redo == pytest.approx(1.0)
    assert found.total == pytest.approx(10.0)
    assert str(found).startswith("10.0 s = detect 0.10 + teardown 0.20")


def test_an_attempt_that_died_while_recovering_counts_as_the_time_before_the_next_one():
    again = [row(18.0, "workers_ended", 1), *attempt(20, 2), row(30.5, "step", 2, step=7)]
    found = split_seconds([*BEFORE, *attempt(10, 1)[:2], *again], BEFORE[2], reached=7)
    assert (found.detect, found.total) == (pytest.approx(0.1), pytest.approx(20.5))
    assert found.imports == pytest.approx(5.375)


def test_a_run_that_never_came_back_took_no_time():
    assert split_seconds(BEFORE[:3], BEFORE[2], reached=7) == Seconds()
