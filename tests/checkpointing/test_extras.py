"""Random streams: every draw shows in what is captured, and what is captured restores them."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from checkpointing.state.extras import capture_rng, restore_rng, seed_streams

DRAWS = {
    "python": random.random,
    "python's normal": lambda: random.gauss(0, 1),
    "numpy": np.random.rand,
    "numpy's normal": np.random.randn,  # every other one leaves the words as they are
    "torch": lambda: float(torch.rand(1)),
}


@given(st.lists(st.sampled_from(sorted(DRAWS)), max_size=12), st.lists(st.sampled_from(sorted(DRAWS)), min_size=1))
def test_a_capture_restores_what_is_drawn_next(before, after):
    seed_streams(7, "test", 0)
    capture_rng()
    for name in before:
        DRAWS[name]()
        capture_rng()  # what an earlier one remembers must not stand for a later one
    captured = capture_rng()
    drawn = [DRAWS[name]() for name in after]
    assert capture_rng() != captured
    restore_rng(captured)
    assert capture_rng() == captured
    assert [DRAWS[name]() for name in after] == drawn


def test_a_missing_stream_is_an_error():
    captured = capture_rng()
    del captured["rng.numpy"]
    with pytest.raises(KeyError):
        restore_rng(captured)
