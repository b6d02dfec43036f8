"""Replay on a machine's clock."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inference.costmodel import PACKED_BYTES, ExpertCosts, named_profile
from inference.predictors import PREDICTORS
from inference.simulate import FIXED, Routing, replay
from inference.timeline import CHUNK_BYTES, Timeline
from tests.inference.test_foresight import EXPERTS, LAYERS, drawn, oracle, recorded

H200 = named_profile("h200")
LINK_ONLY = ExpertCosts.of(H200, 2048, 1024, 2, 0)
BOTH = ExpertCosts.of(H200, 2048, 1024, 2, 16)


def timed(index, predictor="none", policy="lru", slots=10, costs=LINK_ONLY, dense_s=1e-4, heads=None, lead=1):
    routing = Routing(index, EXPERTS, heads=heads)
    return Timeline(routing, policy, predictor, slots, costs, dense_s, lead).run(warm_up=0)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 99), slots=st.integers(2, 24), policy=st.sampled_from(sorted(FIXED)))
def test_without_prefetch_it_fetches_what_a_plain_replay_misses_and_the_clock_adds_up(seed, slots, policy):
    index = drawn(seed)[:60]
    found = timed(index, policy=policy, slots=slots)
    plain = replay(Routing(index, EXPERTS), policy, slots, warm_up=0)
    assert (found.demanded, found.resident, found.prefetched, found.computed) == (plain.misses, plain.hits, 0, 0)
    assert found.saved_share == pytest.approx(plain.hit_rate)
    calls = 60 * LAYERS
    least = calls * 1e-4 + plain.misses * LINK_ONLY.link_s
    # Beside it only what the GPU computes: at most both experts of each call.
    assert least <= found.seconds <= least + 2 * calls * LINK_ONLY.gpu_s(1) + 1e-9


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 99),
    slots=st.integers(4, 20),
    predictor=st.sampled_from(sorted(set(PREDICTORS) - {"heads", "next_gate"})),
    lead=st.integers(1, 2),
    cpu=st.booleans(),
)
def test_every_wanted_expert_is_accounted_for_once(seed, slots, predictor, lead, cpu):
    found = timed(drawn(seed)[:60], predictor, slots=slots, costs=BOTH if cpu else LINK_ONLY, lead=lead)
    assert found.resident + found.late + found.demanded + found.computed == found.wanted
    assert found.tokens == 60
    assert found.fetched >= found.demanded
    assert 0 <= found.useless <= found.prefetched
    assert found.seconds >= found.fetched * LINK_ONLY.link_s * 0.8 or cpu or found.late


def test_an_oracle_hides_fetches_where_the_link_has_time_but_avoids_none():
    index = drawn()
    heads = recorded(index, oracle(index))
    none = timed(index, heads=heads, dense_s=2e-3)
    ahead = timed(index, "heads", heads=heads, dense_s=2e-3)
    assert ahead.seconds < 0.93 * none.seconds
    assert ahead.demanded < 0.2 * none.demanded
    assert ahead.fetched > 0.95 * none.fetched
    assert ahead.saved_share < none.saved_share + 0.05


def test_a_predictor_that_guesses_blindly_is_not_followed_for_long():
    index = drawn()
    heads = recorded(index, oracle(index, doubt=0.5))
    wrong = timed(index, "heads", heads=heads)
    none = timed(index, heads=heads)
    assert wrong.prefetched < 0.1 * wrong.wanted
    assert wrong.seconds < 1.05 * none.seconds


def test_the_cpu_takes_its_share_of_the_misses_and_time_falls():
    both, link = timed(drawn(), costs=BOTH), timed(drawn())
    assert both.computed > 0.1 * both.wanted
    assert both.seconds < link.seconds


def test_packed_prefetches_travel_whole_so_a_late_piece_is_longer():
    plain, packed = (ExpertCosts.of(H200, 2048, 2048, itemsize, 0) for itemsize in (2, PACKED_BYTES))
    pieces = [Timeline(Routing(drawn(), EXPERTS), "lru", "none", 10, each, 1e-4).link for each in (plain, packed)]
    for link, finished in zip(pieces, (CHUNK_BYTES / plain.expert_bytes * plain.link_s, packed.link_s), strict=True):
        link.queue[0, 0] = link.expert_s
        link.run(1e-9)
        assert link.free_at == pytest.approx(finished), "what has begun when a demand comes is finished"
    assert not plain.packed
    assert packed.packed


def test_the_warm_up_counts_nothing():
    index = drawn()
    routing = Routing(index, EXPERTS)
    whole = Timeline(routing, "lru", "none", 10, LINK_ONLY, 1e-4).run(warm_up=0)
    half = Timeline(routing, "lru", "none", 10, LINK_ONLY, 1e-4).run(warm_up=0.5)
    assert half.tokens == len(index) // 2
    assert half.wanted == np.prod(index.shape) // 2
    assert half.seconds < 0.55 * whole.seconds
