from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inference.predictors import PREDICTORS, Lookahead, MapMatch, NoPrediction, SameAsLast, TraceMatch

LAYERS, EXPERTS, TOP_K = 4, 16, 3


def decode(predictor, index_TLK, ahead=None):
    """One sequence, token by token; the suggestions of every call, by (token, row)."""
    predictor.begin()
    made = {}
    for token, index_LK in enumerate(index_TLK):
        for row, index_K in enumerate(index_LK):
            predictor.observe(row, np.unique(index_K), None if ahead is None else ahead[token, row])
            made[token, row] = predictor.suggest(row)
    return made


def sequence(tokens, seed, base=None):
    rng = np.random.default_rng(seed)
    if base is not None:
        return np.tile(base, (tokens, 1, 1))
    return np.stack([[rng.permutation(EXPERTS)[:TOP_K] for _ in range(LAYERS)] for _ in range(tokens)])


@pytest.mark.parametrize("name", PREDICTORS)
@settings(max_examples=15, deadline=None)
@given(lead=st.integers(1, 6), seed=st.integers(0, 99))
def test_suggestions_are_of_the_calls_ahead_and_their_chances_never_rise(name, lead, seed):
    predictor = PREDICTORS[name](LAYERS, EXPERTS, TOP_K, lead)
    ahead = np.random.default_rng(seed).random((6, LAYERS, LAYERS, EXPERTS))
    for (_, row), suggestions in decode(predictor, sequence(6, seed), ahead).items():
        distances = [one.distance for one in suggestions]
        assert distances == sorted(set(distances))
        assert all(1 <= distance <= min(lead, LAYERS) for distance in distances)
        for one in suggestions:
            assert one.row == (row + one.distance) % LAYERS
            assert sorted(one.experts_N) == list(range(EXPERTS))
            assert ((one.chance_N >= 0) & (one.chance_N <= 1)).all()
            assert (np.diff(one.chance_N) <= 1e-12).all()


def test_none_suggests_nothing():
    assert not any(decode(NoPrediction(LAYERS, EXPERTS, TOP_K), sequence(3, 0)).values())


def test_the_same_as_last_is_right_about_a_text_that_repeats_and_its_chances_become_certain():
    base = sequence(1, 5)[0]
    predictor = SameAsLast(LAYERS, EXPERTS, TOP_K)
    made = decode(predictor, sequence(200, 0, base))
    last = made[199, 1][0]
    assert set(last.experts_N[:TOP_K]) == set(base[2])
    assert last.chance_N[TOP_K - 1] > 0.95
    assert last.chance_N[TOP_K] < 0.01
    assert predictor.recall == 1


def test_chances_are_counted_not_believed():
    """Scores that are sure of themselves and wrong half of the time must come out at about one half."""
    rng = np.random.default_rng(3)
    index_TLK = sequence(400, 1)
    ahead = np.zeros((400, LAYERS, 1, EXPERTS))
    for token in range(400):
        for row in range(LAYERS - 1):
            right = rng.random() < 0.5
            guess = index_TLK[token, row + 1] if right else np.setdiff1d(range(EXPERTS), index_TLK[token, row + 1])[:3]
            ahead[token, row, 0, guess] = 1.0
        ahead[token, LAYERS - 1] = np.nan  # nothing is known across tokens
    predictor = Lookahead(LAYERS, EXPERTS, TOP_K)
    made = decode(predictor, index_TLK, ahead)
    assert made[399, LAYERS - 1] == []
    assert 0.3 < made[399, 0][0].chance_N[0] < 0.7
    assert 0.4 < predictor.recall < 0.6


def test_a_lookahead_without_scores_says_nothing():
    predictor = Lookahead(LAYERS, EXPERTS, TOP_K, lead=2)
    predictor.observe(0, [1, 2, 3])
    assert predictor.suggest(0) == []
    predictor.observe(1, [1, 2, 3], np.eye(1, EXPERTS))
    assert [one.distance for one in predictor.suggest(1)] == [1]


@pytest.mark.parametrize("kind", [TraceMatch, MapMatch])
def test_matched_traces_recall_what_followed(kind):
    """Two habits that begin with different experts: the first layer tells which one it is."""
    habits = [sequence(1, seed)[0] for seed in (1, 2)]
    predictor = kind(LAYERS, EXPERTS, TOP_K, lead=LAYERS - 1)
    for number in range(12):
        decode(predictor, sequence(4, 0, habits[number % 2]))
    for habit in habits:
        predictor.begin()
        predictor.observe(0, np.unique(habit[0]))
        for one in predictor.suggest(0):
            assert set(one.experts_N[:TOP_K]) == set(habit[one.row]), one.distance


def test_a_new_sequence_is_not_judged_by_the_last_ones_suggestions():
    predictor = SameAsLast(LAYERS, EXPERTS, TOP_K)
    decode(predictor, sequence(3, 0))
    wanted = predictor.wanted
    predictor.begin()
    predictor.observe(0, [0, 1, 2])
    assert predictor.wanted == wanted
    assert predictor.suggest(3 - 1) == [], "nothing of layer 3 is known yet"
