"""Packing loses nothing, splits nothing, and wastes little."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.chat_packing import alone, pack


@given(st.lists(st.integers(1, 40), max_size=80))
def test_every_sample_is_in_one_row_that_has_room_for_it(lengths: list[int]) -> None:
    rows = pack(lengths, 40)
    assert sorted(sample for row in rows for sample in row) == list(range(len(lengths)))
    filled = [sum(lengths[sample] for sample in row) for row in rows]
    assert all(0 < total <= 40 for total in filled)
    assert rows == sorted(sorted(row) for row in rows) == pack(list(lengths), 40)
    # Best fit opens a row only if no other has room: any two rows would overflow together.
    assert sum(total <= 20 for total in filled) <= 1


def test_the_fullest_row_with_room_is_taken() -> None:
    assert pack([7, 3, 6, 4, 10, 1], 10) == [[0, 1], [2, 3], [4], [5]]
    assert alone([3, 9]) == [[0], [1]]


@pytest.mark.parametrize("length", [0, 11])
def test_samples_that_fit_no_row_are_a_mistake(length: int) -> None:
    with pytest.raises(ValueError, match="1 to 10"):
        pack([length], 10)
