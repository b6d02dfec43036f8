"""Interval arithmetic, against sets of single elements."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpointing.units import Range, overlaps, uncovered

ranges = st.builds(
    lambda unit, kind, lo, size: Range(unit, kind, lo, lo + size),
    st.sampled_from(["L00.E000.up", "model.norm.weight"]),
    st.sampled_from(["master", "exp_avg"]),
    st.integers(0, 30),
    st.integers(0, 12),
)


def elements(some: list[Range]) -> Counter[tuple[str, str, int]]:
    return Counter((r.unit, r.kind, i) for r in some for i in range(r.lo, r.hi))


def assert_canonical(some: list[Range]) -> None:
    assert some == sorted(some)
    for a, b in itertools.pairwise(some):
        assert a.key != b.key or a.hi < b.lo


@given(ranges)
def test_text_and_back(r):
    assert Range.parse(str(r)) == r


@pytest.mark.parametrize("text", ["", "u", "u#k", "u#k[0:4]", "u#k[4:0)", "#k[0:4)", "u#k[-1:4)", "u#k[0:4) "])
def test_other_text_is_refused(text):
    with pytest.raises(ValueError, match=r"range"):
        Range.parse(text)


@given(st.lists(ranges), st.lists(ranges))
def test_uncovered_is_the_set_difference(needed, have):
    missing = uncovered(needed, have)
    assert_canonical(missing)
    assert set(elements(missing)) == set(elements(needed)) - set(elements(have))


@given(st.lists(ranges))
def test_overlaps_are_the_elements_named_twice(some):
    twice = overlaps(some)
    assert_canonical(twice)
    assert set(elements(twice)) == {e for e, count in elements(some).items() if count > 1}
