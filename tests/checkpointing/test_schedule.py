"""What sealed records can restore, and which of them may be overwritten."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpointing.records import Kind
from checkpointing.schedule import (
    WHOLE,
    Held,
    Rules,
    cuts,
    is_superseded,
    needed_for,
    newest_bases,
    restorable_steps,
    wal_part,
)


def window(rotation: int, first: int, last: int) -> list[Held]:
    """All that a run in mode wal has captured: whole at ``first``, then in rotation up to ``last``."""
    held = [Held(Kind.BASE, first, (part,)) for part in range(rotation)] + [Held(Kind.EXTRAS, first)]
    for step in range(first + 1, last + 1):
        held += [Held(Kind.BASE, step, (wal_part(step, rotation),)), Held(Kind.LOG, step), Held(Kind.EXTRAS, step)]
    return held


def test_dense_records_restore_their_own_step_only():
    held = [Held(Kind.BASE, 3, (0,)), Held(Kind.EXTRAS, 3), Held(Kind.EXTRAS, 4), Held(Kind.BASE, 5, (0,))]
    assert restorable_steps(held, WHOLE) == {3}


def test_a_missing_log_hides_the_steps_behind_it_until_every_base_is_newer():
    held = [record for record in window(3, 0, 9) if record != Held(Kind.LOG, 5)]
    assert restorable_steps(held, Rules(3)) == {0, 1, 2, 3, 4, 7, 8, 9}


def test_parts_of_different_ages_are_enough_only_where_loss_is_allowed():
    held = [Held(Kind.BASE, 4, (0,)), Held(Kind.BASE, 2, (1, 2)), Held(Kind.EXTRAS, 4), Held(Kind.EXTRAS, 5)]
    assert restorable_steps(held, Rules(3, fresh=1)) == {4}
    assert restorable_steps(held, Rules(3, fresh=2)) == set()
    assert restorable_steps(held, Rules(3)) == set()


@given(st.integers(2, 9), st.integers(0, 40), st.integers(0, 30), st.integers(0, 3), st.data())
def test_overwriting_what_is_superseded_never_costs_a_step_from_the_committed_one_on(rotation, first, run, lag, data):
    rules = Rules(rotation)
    held = window(rotation, first, first + run)
    committed = max(first, first + run - lag)
    bases = newest_bases(held, committed)
    kept = [
        record for record in held
        if not is_superseded(record, committed, bases, rules) or data.draw(st.booleans(), label=str(record))
    ]  # fmt: skip
    assert restorable_steps(kept, rules) >= set(range(committed, first + run + 1))
    for step in range(committed, first + run + 1):
        assert needed_for(held, step, rules) <= set(kept)


@given(st.integers(2, 9), st.integers(0, 40), st.integers(0, 30))
def test_what_is_not_superseded_fits_the_slots(rotation, first, run):
    """A part once, the log of rotation - 1 steps: one fragment and one log more are free for the next capture."""
    rules, last = Rules(rotation), first + run
    held = window(rotation, first, last)
    bases = newest_bases(held, last)
    kept = [record for record in held if not is_superseded(record, last, bases, rules)]
    assert sum(r.kind is Kind.BASE for r in kept) <= rotation
    assert sum(r.kind is Kind.LOG for r in kept) <= rotation - 1
    assert sum(r.kind is Kind.EXTRAS for r in kept) == 1


@given(st.integers(0, 5000), st.integers(1, 20))
def test_cuts_cover_everything_in_order(elements, parts):
    bounds = cuts(elements, parts)
    assert len(bounds) == parts + 1
    assert (bounds[0], bounds[-1]) == (0, elements)
    assert all(lo <= hi for lo, hi in itertools.pairwise(bounds))
    assert all(bound % 64 == 0 for bound in bounds if bound != elements)


@pytest.mark.parametrize("rotation", [2, 3, 8])
def test_every_part_has_its_turn_once_in_a_rotation(rotation):
    assert sorted(wal_part(step, rotation) for step in range(50, 50 + rotation)) == list(range(rotation))
