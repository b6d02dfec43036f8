from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference.prefetch import worth_fetching

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
