"""What two ranks expect of each other must be the same number, whatever each of them saw."""

from hypothesis import given
from hypothesis import strategies as st

from moe.traffic import Traffic

counts = st.integers(0, 1 << 20)


@given(there=counts, back=counts, pairs=st.tuples(counts, counts))
def test_two_ranks_agree_on_what_leaves_ahead_and_have_places_for_the_same_again(there, back, pairs):
    first, second = Traffic(None, 0, 2), Traffic(None, 1, 2)
    first.note(pairs[0], [0, there], [0, back])
    second.note(pairs[1], [back, 0], [there, 0])
    assert first.ahead == second.ahead >= max(there, back)
    assert (first.splits(), second.splits()) == ([0, first.ahead], [first.ahead, 0])
    assert first.leaving >= there
    assert second.leaving >= back
    assert [first.pairs >= pairs[0], second.pairs >= pairs[1]] == [True, True]


@given(sent=st.lists(counts, min_size=3, max_size=8), received=st.lists(counts, min_size=3, max_size=8))
def test_among_more_ranks_nothing_leaves_before_it_is_counted(sent, received):
    traffic = Traffic(None, 0, len(sent))
    traffic.note(5, sent, received)
    assert traffic.ahead == 0
    assert traffic.leaving >= sum(sent)
    assert traffic.pairs > 5
