"""Routing counts: what they say, and that two readers, padding and drops do not disturb each other."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.refs import ExpertRef
from moe.stats import RoutingMeter, RoutingStats


def stats_of(counts, dropped=None):
    counts_ME = torch.tensor(counts)
    layers = tuple(range(1, 1 + len(counts)))
    return RoutingStats(layers, counts_ME, torch.tensor(dropped or [0] * len(counts)))


def test_figures_by_hand():
    stats = stats_of([[4, 4, 4, 4], [16, 0, 0, 0], [6, 2, 0, 0]], [0, 0, 8])
    assert stats.max_load == 4.0
    assert stats.dead == 5
    assert stats.dead_experts[:2] == (ExpertRef(2, 1), ExpertRef(2, 2))
    third = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(4)
    torch.testing.assert_close(stats.entropy_M, torch.tensor([1.0, 0.0, third], dtype=torch.float64))
    spread = math.sqrt((4**2 + 0 + 2**2 + 2**2) / 4) / 2
    torch.testing.assert_close(stats.cv_M, torch.tensor([0.0, math.sqrt(3), spread], dtype=torch.float64))
    assert stats.figures()["tokens"][2] == [6, 2, 0, 0]
    assert stats.brief() == "busiest expert 4.0x, load CV 1.73, 5 dead, 16.7% dropped"


def test_a_layer_in_which_nothing_was_routed_has_finite_figures():
    stats = stats_of([[0, 0], [3, 3]])
    assert stats.entropy_M.tolist() == [0.0, 1.0]
    assert stats.cv_M.tolist() == [0.0, 0.0]
    assert stats.dead == 2


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 6),
    st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6), st.booleans()), max_size=20),
    st.integers(1, 4),
)
def test_counts_are_those_of_real_tokens_however_they_are_split(num_experts, rows, micros):
    """Padding is not counted, drops are counted apart, and micro-batches add up."""
    rows = [(min(a, num_experts), min(b, num_experts), valid) for a, b, valid in rows]
    meter = RoutingMeter(drained=True)
    for i in range(micros):
        part = rows[i::micros]
        index_TK = torch.tensor([[a, b] for a, b, _ in part], dtype=torch.int64).view(-1, 2)
        meter.add(4, index_TK, num_experts, torch.tensor([valid for *_, valid in part], dtype=torch.bool))
    real = [e for a, b, valid in rows if valid for e in (a, b)]
    stats = meter.take()
    assert stats.layers == (4,)
    assert stats.counts_ME.tolist() == [[real.count(e) for e in range(num_experts)]]
    assert stats.dropped == real.count(num_experts)
    assert meter.drain([3, 4], num_experts).tolist() == [[0] * num_experts, *stats.counts_ME.tolist()]


def test_readers_are_independent_and_start_again_from_zero():
    meter = RoutingMeter(drained=True)
    meter.add(0, torch.tensor([[0, 1]]), 3)
    assert meter.take().counts_ME.tolist() == [[1, 1, 0]]
    assert meter.take() is None
    meter.add(0, torch.tensor([[2, 1]]), 3)
    drained = meter.drain([0], 3)
    assert drained.tolist() == [[1, 2, 1]]
    assert drained.is_contiguous(), "it is summed over all ranks where it lies"
    assert meter.drain([0], 3).tolist() == [[0, 0, 0]]
    assert meter.take().counts_ME.tolist() == [[0, 1, 1]]


def test_counts_that_are_known_add_to_those_of_choices():
    """In any order, for both readers, and the caller's own tensor stays as it is."""
    meter, known = RoutingMeter(drained=True), torch.tensor([3, 0, 1])
    for _ in range(2):
        meter.add_counts(5, known)
        meter.add(5, torch.tensor([[0, 3]]), 3)
    assert known.tolist() == [3, 0, 1]
    assert meter.drain([5], 3).tolist() == [[8, 0, 2]]
    meter.add(5, torch.tensor([[1, 2]]), 3)
    meter.add_counts(5, known)
    assert meter.drain([5], 3).tolist() == [[3, 1, 2]]
    stats = meter.take()
    assert (stats.counts_ME.tolist(), stats.dropped) == ([[11, 1, 4]], 2)
    meter.add(5, torch.tensor([[1, 2]]), 3)  # the first of both readers
    meter.add_counts(5, known)
    assert meter.take().counts_ME.tolist() == meter.drain([5], 3).tolist() == [[3, 1, 2]]


def test_ranks_are_summed_in_one_call():
    meter = RoutingMeter()
    for layer in (0, 1):
        meter.add(layer, torch.tensor([[0, 2], [1, 2]]), 2)
    calls = []

    def total(counts):
        calls.append(counts.shape)
        return counts * 3

    stats = meter.take(total)
    assert calls == [(2, 3)]
    assert stats.counts_ME.tolist() == [[3, 3]] * 2
    assert stats.dropped_M.tolist() == [6, 6]
