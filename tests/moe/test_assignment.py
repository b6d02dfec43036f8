"""Two parts' orders of pairs become the order of both; and an order of which only the first places are wanted."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from moe.assignment import join, sort_pairs

ROWS = st.lists(st.lists(st.integers(-1, 5), min_size=2, max_size=2), max_size=12)


@given(first=ROWS, second=ROWS)
def test_two_orders_become_what_sorting_all_rows_finds(first, second):
    index = torch.tensor([*first, *second], dtype=torch.long).view(-1, 2)
    found = [sort_pairs(rows, 5) for rows in (*index.split([len(first), len(second)]), index)]
    one, other, want = (f.assignment(int(f.counts_L.sum())) for f in found)
    got = join(one, other)
    for name in ("pair_N", "slot_RK", "counts_L", "ends_L"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name
    assert got.complete == want.complete


@given(rows=ROWS, size=st.integers(0, 30))
def test_of_an_order_that_is_cut_no_expert_has_places_behind_the_cut(rows, size):
    """What runs on a device would read and write there."""
    found = sort_pairs(torch.tensor(rows, dtype=torch.long).view(-1, 2), 5)
    early = found.early(size)
    assert early.ends_L.tolist() == [min(end, size) for end in found.ends_L.tolist()]
    assert torch.equal(early.pair_N, found.pair_S[:size])
