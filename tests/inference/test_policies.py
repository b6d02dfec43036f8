"""Each policy against its definition, written the slow way."""

from __future__ import annotations

import subprocess
import sys
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inference import activation, reuse
from inference.activation import ExpertMap
from inference.native import opened
from inference.policies import LRFU, LRU, AgedLFU, LayeredLRU, PerLayerLRU
from inference.reuse import ExpectedReuse
from inference.shadow import Hedge, Shadow
from inference.simulate import FIXED

LAYERS, EXPERTS = 3, 5
CALLS = st.lists(
    st.tuples(
        st.integers(0, LAYERS - 1), st.lists(st.integers(0, EXPERTS - 1), min_size=1, max_size=EXPERTS, unique=True)
    ),
    min_size=1,
    max_size=30,
)


def rounds(calls):
    """(round, row, experts) of each call."""
    now, before = 0, -1
    for row, experts in calls:
        now += row <= before
        before = row
        yield now, row, experts


def told(policy, calls):
    for row, experts in calls:
        policy.use(row, experts)
    return policy


@given(CALLS)
def test_lru_scores_are_the_order_of_last_calls(calls):
    last = {(row, e): number for number, (row, experts) in enumerate(calls, 1) for e in experts}
    scores = told(LRU(LAYERS, EXPERTS), calls).scores()
    assert {k: scores[k] for k in np.ndindex(LAYERS, EXPERTS)} == {
        k: last.get(k, 0) for k in np.ndindex(LAYERS, EXPERTS)
    }


@given(CALLS)
def test_layered_lru_keeps_what_is_recent_in_rounds_and_then_what_is_next(calls):
    last = {(row, e): now for now, row, experts in rounds(calls) for e in experts}
    scores = told(LayeredLRU(LAYERS, EXPERTS), calls).scores()
    at = calls[-1][0]

    def turns(row):
        """Calls until the row's next turn, the next layer's being 0."""
        return [(at + 1 + i) % LAYERS for i in range(LAYERS)].index(row)

    keys = sorted(last, key=lambda key: (last[key], -turns(key[0])))
    found = [scores[key] for key in keys]
    assert found == sorted(found)
    assert all((scores[a] == scores[b]) == (last[a] == last[b] and a[0] == b[0]) for a in last for b in last)


@pytest.mark.parametrize("half_life", [1.0, 7.0])
@given(calls=CALLS)
def test_lrfu_halves_a_use_with_every_half_life(half_life, calls):
    scores = told(LRFU(LAYERS, EXPERTS, half_life), calls).scores()
    listed = list(rounds(calls))
    last = listed[-1][0]
    want = np.zeros((LAYERS, EXPERTS))
    for now, row, experts in listed:
        want[row, experts] += 0.5 ** ((last - now) / half_life)
    unit = scores.max() / want.max()  # scores have a scale of their own
    np.testing.assert_allclose(scores / unit, want, rtol=1e-9)


def test_counts_stay_finite_over_long_texts():
    policy = LRFU(1, 2, half_life=0.01)
    for token in range(2000):
        policy.use(0, [token % 2])
    assert np.isfinite(policy.scores()).all()
    assert policy.scores()[0, 1] > policy.scores()[0, 0]


def test_per_layer_lru_evens_the_shares_and_then_keeps_them():
    policy = told(PerLayerLRU(2, 4), [(0, [0, 1, 2]), (1, [0])])
    resident = np.zeros((2, 4), dtype=bool)
    resident[0, :3] = resident[1, 0] = True
    assert policy.victims(resident, 1).tolist() == [0]
    assert policy.victims(resident, 2).tolist() == [0, 1]
    resident[0, 0], resident[1, 1] = False, True
    policy.use(1, [1])
    evictable = resident.copy()
    assert policy.victims(evictable, 2).tolist() == [1, 4]  # the oldest of each


@pytest.mark.parametrize("name", sorted(FIXED))
@settings(max_examples=30)
@given(calls=CALLS, seed=st.integers(0, 99), data=st.data())
def test_victims_may_go_and_are_as_many_as_asked_for(name, calls, seed, data):
    policy = told(FIXED[name](LAYERS, EXPERTS), calls)
    evictable = np.random.default_rng(seed).random((LAYERS, EXPERTS)) < 0.6
    count = data.draw(st.integers(0, int(evictable.sum())))
    found = policy.victims(evictable, count)
    assert len(set(found.tolist())) == count
    assert evictable.reshape(-1)[found].all()
    assert found.tolist() == policy.victims(evictable, count).tolist()


def test_aged_lfu_forgets():
    policy = AgedLFU(1, 3, half_life=4.0)
    for _ in range(20):
        policy.use(0, [0])
    for _ in range(20):
        policy.use(0, [1])
    assert policy.scores()[0, 1] > policy.scores()[0, 0] > policy.scores()[0, 2]


def test_policies_do_not_import_torch():
    code = "import sys, inference.policies, inference.simulate; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


@contextmanager
def nothing_compiled():
    with pytest.MonkeyPatch.context() as patch:
        for module in (activation, reuse):
            patch.setattr(module, "opened", lambda: "no compiler")
        yield


def drawn(rounds, layers, experts, choices):
    """(row, experts) of calls that stay with what was used, and have favourites."""
    rng, scores_LE = np.random.default_rng(5), 0.0
    favour_LE = rng.gumbel(size=(layers, experts))
    for _ in range(rounds):
        scores_LE = 0.7 * scores_LE + favour_LE / 2 + rng.gumbel(size=(layers, experts))
        for row in range(layers):
            yield row, np.argsort(-scores_LE[row])[:choices]


needs_compiler = pytest.mark.skipif(isinstance(opened(), str), reason="no C compiler")


@needs_compiler
@given(CALLS, st.integers(1, 4))
def test_the_compiled_map_is_the_python_one(calls, memory):
    with nothing_compiled():
        plain = told(ExpertMap(LAYERS, EXPERTS, memory), calls)
    compiled = told(ExpertMap(LAYERS, EXPERTS, memory), calls)
    assert (compiled.scores() == plain.scores()).all()
    assert compiled._match == plain._match


@needs_compiler
@given(CALLS)
def test_the_compiled_chances_are_the_python_ones(calls):
    with nothing_compiled():
        plain = ExpectedReuse(LAYERS, EXPERTS)
    compiled = ExpectedReuse(LAYERS, EXPERTS)
    assert (plain._compiled, bool(compiled._compiled)) == (None, True)
    for number, (row, experts) in enumerate(calls):
        for policy in (plain, compiled):
            policy.use(row, experts)
            if number % 7 == 6:
                policy.begin()
        np.testing.assert_allclose(compiled.scores(), plain.scores(), rtol=1e-4)
    np.testing.assert_allclose(compiled.weights_F, plain.weights_F, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(compiled._followed_LES, plain._followed_LES, rtol=1e-5)


@needs_compiler
def test_what_is_evicted_does_not_depend_on_a_compiler():
    """Additions differ in order: of two experts that are alike up to rounding the other may go, but here none does."""
    expected = []
    with nothing_compiled():
        shadow, hedge = Shadow(ExpectedReuse(6, 32), 40), Hedge(6, 32, 40, stride=4)
        for call in drawn(250, 6, 32, 4):
            missed = shadow.use(*call)
            hedge.use(*call)
            expected.append((missed, shadow.resident_LE.copy(), hedge.leader, dict(hedge.misses)))
    shadow, hedge = Shadow(ExpectedReuse(6, 32), 40), Hedge(6, 32, 40, stride=4)
    for call, (missed, resident_LE, leader, misses) in zip(drawn(250, 6, 32, 4), expected, strict=True):
        assert shadow.use(*call) == missed
        assert (shadow.resident_LE == resident_LE).all()
        hedge.use(*call)
        assert (hedge.leader, hedge.misses) == (leader, misses)
