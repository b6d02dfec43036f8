"""Eviction by what lookahead heads say."""

from __future__ import annotations

import numpy as np
import pytest

from inference.foresight import HORIZONS, ForeseenReuse
from inference.policies import LRU
from inference.recorded_heads import RecordedHeads
from inference.reuse import ExpectedReuse
from inference.shadow import WITH_HEADS, Hedge, Shadow
from inference.simulate import BYPASS, FORESEEN, Routing, compare, gap_closed, replay

LAYERS, EXPERTS, TOKENS = 3, 8, 300


def drawn(seed=0):
    """Routing that nothing in the past tells: each token draws two of eight experts in each layer."""
    rng = np.random.default_rng(seed)
    return np.stack([[rng.permutation(EXPERTS)[:2] for _ in range(LAYERS)] for _ in range(TOKENS)])


def oracle(index_TLK, doubt=0.0, seed=1):
    """Log odds [T,L,2,L,E] of one who knows the future, ``doubt`` of his answers wrong."""
    used = np.zeros((TOKENS + 8, LAYERS, EXPERTS), dtype=bool)
    for token, index_LK in enumerate(index_TLK):
        for row, index_K in enumerate(index_LK):
            used[token, row, index_K] = True
    ahead = np.zeros((TOKENS, LAYERS, 2, LAYERS, EXPERTS))
    for token in range(TOKENS):
        for row in range(LAYERS):
            for target in range(LAYERS):
                first = token if target > row else token + 1
                for i, horizon in enumerate(HORIZONS):
                    ahead[token, row, i, target] = used[first : first + horizon, target].any(0)
    wrong = np.random.default_rng(seed).random(ahead.shape) < doubt
    return np.where(ahead.astype(bool) ^ wrong, 4.0, -4.0)


def misses(policy, index_TLK, ahead=None, slots=9):
    shadow, missed = Shadow(policy, slots), 0
    for token, index_LK in enumerate(index_TLK):
        for row, index_K in enumerate(index_LK):
            if ahead is not None:
                policy.foresee(ahead[token, row])
            missed += shadow.use(row, np.unique(index_K))
    return missed


def test_an_oracle_comes_close_to_belady_where_the_past_tells_nothing():
    index = drawn()
    foreseen = misses(ForeseenReuse(LAYERS, EXPERTS), index, oracle(index))
    routing = Routing(index, EXPERTS)
    best = replay(routing, "belady", 9, warm_up=0).misses
    without = min(misses(ExpectedReuse(LAYERS, EXPERTS), index), misses(LRU(LAYERS, EXPERTS), index))
    assert (without - foreseen) / (without - best) > 0.6


def test_heads_that_talk_nonsense_are_soon_ignored():
    # The first half of the experts is popular: the past tells something, the heads nothing.
    index = np.where(drawn() < 6, drawn() % 4, drawn())
    nonsense = oracle(index, doubt=0.5)
    told = misses(ForeseenReuse(LAYERS, EXPERTS), index, nonsense, slots=12)
    assert told <= 1.05 * misses(ExpectedReuse(LAYERS, EXPERTS), index, slots=12)


def test_expected_reuse_learns_which_expert_follows_which():
    """Experts are drawn, but behind each even one comes the next odd one."""
    rng = np.random.default_rng(0)
    policy, expert = ExpectedReuse(1, 16), 0
    for _ in range(1500):
        expert = int(rng.integers(16)) if expert % 2 else expert + 1
        policy.use(0, [expert])
    policy.use(0, [6])
    ranked = np.argsort(policy.scores()[0])
    assert ranked[-1] == 7
    chance = -1 / policy.scores()[0]
    assert chance[7] > 3 * np.median(chance)


def test_without_heads_it_is_expected_reuse():
    index = drawn()
    policy, plain = ForeseenReuse(LAYERS, EXPERTS), ExpectedReuse(LAYERS, EXPERTS)
    for index_LK in index[:50]:
        for row, index_K in enumerate(index_LK):
            policy.use(row, index_K)
            plain.use(row, index_K)
            assert np.array_equal(policy.scores(), plain.scores())


def test_what_heads_said_of_an_earlier_call_is_not_taken_for_this_one():
    index = drawn()
    policy, plain = ForeseenReuse(LAYERS, EXPERTS), ExpectedReuse(LAYERS, EXPERTS)
    policy.foresee(oracle(index)[0, 0])
    for row in (0, 1):
        policy.use(row, index[0, row])
        plain.use(row, index[0, row])
    assert np.array_equal(policy.scores(), plain.scores())


def test_chances_learn_what_log_odds_are_worth():
    """Heads that are right nine times in ten but say so with log odds of 4: chances come to nine in ten."""
    index = drawn()
    ahead = oracle(index, doubt=0.1)
    policy = ForeseenReuse(LAYERS, EXPERTS)
    said, came = [], []
    for token, index_LK in enumerate(index[:-1]):
        for row, index_K in enumerate(index_LK):
            policy.foresee(ahead[token, row])
            policy.use(row, index_K)
        if token > 100:
            confident = ahead[token, LAYERS - 1, 0, 0] > 0
            said.append(policy.chances()[0, 0][confident])
            came.append(np.isin(np.flatnonzero(confident), index[token + 1, 0]))
    assert np.concatenate(said).mean() == pytest.approx(np.concatenate(came).mean(), abs=0.05)


def recorded(index_TLK, ahead):
    """Heads whose codes pick each token's own log odds: rank as many as there are tokens."""
    codes = np.tile(np.eye(TOKENS, dtype=np.float16)[:, None], (1, LAYERS, 1))
    outward = ahead.swapaxes(0, 1).reshape(LAYERS, TOKENS, -1).astype(np.float32)
    gates = np.full((TOKENS, LAYERS, EXPERTS), np.nan, dtype=np.float16)
    return RecordedHeads(codes, outward, np.zeros((LAYERS, outward.shape[2]), dtype=np.float32), gates)


def test_a_replay_tells_policies_what_was_recorded_and_the_hedge_follows_the_best():
    index = drawn()
    ahead = oracle(index, doubt=0.05)
    routing = Routing(index, EXPERTS, heads=recorded(index, ahead))
    (found,) = compare(routing, [0.4]).values()
    rates = {one.policy: one.hit_rate for one in found}
    assert replay(routing, FORESEEN, 10, warm_up=0).misses == misses(
        ForeseenReuse(LAYERS, EXPERTS), index, ahead, slots=10
    )
    fixed = max(rate for name, rate in rates.items() if name not in ("belady", BYPASS, "hedge"))
    assert rates["hedge"] > fixed - 0.01
    assert gap_closed(rates["hedge"], rates["lru"], rates[BYPASS]) > 0.3


def test_a_hedge_passes_on_what_heads_say():
    index = drawn()
    ahead = oracle(index)
    hedge = Hedge(LAYERS, EXPERTS, 9, WITH_HEADS)
    assert hedge.uses_heads
    assert not Hedge(LAYERS, EXPERTS, 9).uses_heads
    alone = misses(ForeseenReuse(LAYERS, EXPERTS), index, ahead)
    assert misses(hedge, index, ahead) == pytest.approx(alone, rel=0.02)
