from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference.prefetch import AbsentChances, worth_fetching

SHARES = st.floats(0, 1)


@given(chance=SHARES, victim=SHARES, delay=st.floats(0, 2))
def test_the_likelier_the_better_and_the_dearer_the_worse(chance, victim, delay):
    if worth_fetching(chance, victim, fetch_s=1.0, delay_s=delay):
        assert worth_fetching(min(chance + 0.1, 1.0), victim, fetch_s=1.0, delay_s=delay)
        assert worth_fetching(chance, victim / 2, fetch_s=1.0, delay_s=delay)
        assert worth_fetching(chance, victim, fetch_s=1.0, delay_s=delay / 2)
        assert worth_fetching(chance, victim, fetch_s=3.0, delay_s=3 * delay) == worth_fetching(
            chance, victim, fetch_s=1.0, delay_s=delay
        )


@pytest.mark.parametrize(
    ("chance", "victim", "delay", "worth"),
    [
        (0.0, 0.0, 0.0, False),
        (0.1, 0.0, 0.0, True),  # a free slot and an idle link: any chance will do
        (0.1, 0.0, 1.0, False),
        (0.6, 0.0, 1.0, True),
        (0.6, 1.0, 1.0, False),
        (0.7, 1.0, 1.0, True),
        (1.0, 1.0, 5.0, True),
    ],
)
def test_known_cases(chance, victim, delay, worth):
    assert worth_fetching(chance, victim, fetch_s=1.0, delay_s=delay) is worth


@pytest.mark.parametrize(("comes", "low", "high"), [(0.0, 0.0, 0.03), (0.3, 0.15, 0.45), (1.0, 0.9, 1.0)])
def test_chances_of_absent_experts_are_what_came_of_them(comes, low, high):
    """A predictor says 0.8 of each of three experts; what is absent comes less often, or always."""
    rng, absent, said = np.random.default_rng(0), AbsentChances(2, 4), np.full(3, 0.8)
    np.testing.assert_allclose(absent.chances(1, said), said)
    for call in range(200):
        absent.ask(call, 5, 1, [3, 8, 9], said)
        absent.answer(call, 5, [e for e in (3, 8, 9) if rng.random() < comes] + [1, 2])
    assert ((absent.chances(1, said) >= low) & (absent.chances(1, said) <= high)).all()
    np.testing.assert_allclose(absent.chances(2, said), said)


def test_places_are_counted_apart_and_a_call_of_another_layer_says_nothing():
    absent, said = AbsentChances(1, 4), np.full(2, 0.5)
    for call in range(100):
        absent.ask(call, 0, 1, [3, 8], said)
        absent.answer(call, 0, [3])
    first, second = absent.chances(1, said)
    assert first > 0.95
    assert second < 0.05
    before = absent.chances(1, said)
    absent.ask(100, 0, 1, [3, 8], said)
    absent.answer(100, 1, [8])
    np.testing.assert_allclose(absent.chances(1, said), before)
