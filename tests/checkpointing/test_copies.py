"""What is copied before the state, and what after it."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from checkpointing.copies import _parted


@given(st.lists(st.integers(0, 9), max_size=12))
def test_a_log_is_parted_near_its_half_and_nothing_is_lost(sizes):
    moves = [(None, (torch.zeros(size, dtype=torch.uint8), torch.zeros(0))) for size in sizes]
    now, then = _parted(moves)
    assert [*now, *then] == moves
    before, total = sum(source.numel() for _, (source, _) in now), sum(sizes)
    assert abs(2 * before - total) == min(abs(2 * sum(sizes[:n]) - total) for n in range(len(sizes) + 1))
