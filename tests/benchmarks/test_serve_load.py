from __future__ import annotations

import pytest

pytest.importorskip("openai", reason="the extra 'dev' is not installed")

from benchmarks.serve_load import Tally, judge

NOTHING_LEFT = {"planaria_answers_running": 0, "planaria_answers_waiting": 0, "planaria_kv_blocks_used": 0}
FLAT = [(float(second), 400e6) for second in range(10)]


def test_a_good_run_has_nothing_wrong():
    assert judge(Tally(), FLAT, NOTHING_LEFT, 0) == []


def test_errors_leftovers_status_and_growth_are_each_said():
    tally = Tally()
    tally.errors["APITimeoutError: late"] = 3
    grown = [(second, size + 50e6 * (second > 7)) for second, size in FLAT]
    wrong = judge(tally, grown, NOTHING_LEFT | {"planaria_answers_running": 2}, -15)
    assert [line.split(";")[0] for line in wrong] == [
        "3 times APITimeoutError: late",
        "2 answers or blocks are left over",
        "the server ended with status -15",
        "memory grew from 400 to 450 MB in the second half",
    ]
