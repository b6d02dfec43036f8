"""Which checkpoint is the best is known from a file that survives whatever else happens."""

import math

import pytest

from checkpointing.heldout import best_of, losses_of, record


def test_losses_add_up_and_the_lowest_is_the_best(tmp_path):
    assert losses_of(tmp_path) == {}
    for step, loss in ((0, 9.0), (10, 2.0), (5, 3.0), (20, 2.0), (30, 4.0)):
        record(tmp_path, step, loss, "4 sequences")
    losses = losses_of(tmp_path)
    assert losses == {0: 9.0, 5: 3.0, 10: 2.0, 20: 2.0, 30: 4.0}
    assert best_of(losses, [5, 10, 20, 30]) == 10, "the earlier of two that are equal"
    assert best_of(losses, [5, 30, 40]) == 5
    assert best_of(losses, [40]) is None
    record(tmp_path, 10, 1.5, "4 sequences")
    assert losses_of(tmp_path)[10] == 1.5, "a step that was run again"


def test_losses_over_other_samples_are_not_compared(tmp_path):
    record(tmp_path, 5, 1.0, "4 sequences")
    record(tmp_path, 10, 2.0, "8 sequences")
    assert losses_of(tmp_path) == {10: 2.0}


@pytest.mark.parametrize("text", ["", "{", "[]", '{"losses": 3}', '{"over": "x", "losses": {"a": 1}}'])
def test_a_damaged_file_holds_nothing(tmp_path, text):
    (tmp_path / "heldout.json").write_text(text)
    assert losses_of(tmp_path) == {}
    record(tmp_path, 5, 1.0, "x")
    assert losses_of(tmp_path) == {5: 1.0}


def test_a_loss_that_is_no_number_is_never_the_best(tmp_path):
    record(tmp_path, 5, math.nan, "x")
    record(tmp_path, 6, 3.0, "x")
    assert best_of(losses_of(tmp_path), [5, 6]) == 6
