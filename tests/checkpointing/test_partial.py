"""Which experts a checkpoint holds: all of them in turn, equally many bytes on every rank, the same on all ranks."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from checkpointing.cost import Bandwidths, BudgetError, StepTimes
from checkpointing.partial import (
    Ages,
    Experts,
    SparsePartition,
    choose_k,
    pec_bytes,
    pec_memory,
    select,
    select_loaded,
    turn,
)
from checkpointing.units import Range, expert_of, overlaps, uncovered
from moe.refs import ExpertRef
from tests.checkpointing.placement import bytes_per_rank, imbalance, zero_placement

TENSORS = {"gate_up_proj": 2 * 24, "down_proj": 24}


@st.composite
def models(draw: st.DrawFn, replicas: tuple[int, ...] = (1,)) -> Experts:
    ep = draw(st.sampled_from([1, 2, 3, 4, 8]))
    layers = draw(st.integers(1, 9))
    first = draw(st.integers(0, 3))
    return Experts(
        tuple(range(first, first + layers)), ep * draw(st.integers(1, 8)), ep, draw(st.sampled_from(replicas))
    )


def divisible(experts: Experts, layers: int) -> st.SearchStrategy[int]:
    """K of which ep divides K x layers."""
    unit = experts.ep // math.gcd(experts.ep, layers)
    return st.integers(1, experts.count // unit).map(lambda n: n * unit)


@given(models(), st.data())
def test_every_expert_is_held_once_in_a_round(experts: Experts, data: st.DataObject) -> None:
    k, first = data.draw(st.integers(1, experts.count)), data.draw(st.integers(0, 50))
    rounds = -(-experts.count // k)
    held = Counter(ref for c in range(first, first + rounds) for ref in select(experts, c, k))
    assert set(held) == set(experts.all())
    if experts.count % k == 0:
        assert set(held.values()) == {1}


@given(models(), st.data())
def test_each_checkpoint_has_k_different_experts_of_each_layer(experts: Experts, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, experts.count))
    chosen = select(experts, data.draw(st.integers(0, 1000)), k)
    assert len(set(chosen)) == len(chosen)
    assert Counter(ref.layer for ref in chosen) == dict.fromkeys(experts.layers, k)
    assert list(chosen) == sorted(chosen)


@given(models())
def test_turns_are_a_permutation_that_alternates_ranks(experts: Experts) -> None:
    order = [turn(experts, i) for i in range(experts.count)]
    assert sorted(order) == list(range(experts.count))
    block = experts.count // experts.ep
    assert [expert // block for expert in order] == [i % experts.ep for i in range(experts.count)]


@given(models(), st.data())
@settings(max_examples=200)
def test_every_ep_rank_has_equally_many_bytes(experts: Experts, data: st.DataObject) -> None:
    """The issue's bound is 1.05; where K x layers divides by ep, the order gives 1."""
    k = data.draw(divisible(experts, len(experts.layers)))
    placement = zero_placement(experts, TENSORS)
    loads = bytes_per_rank(select(experts, data.draw(st.integers(0, 100)), k), placement)
    assert len(set(loads.values())) == 1
    assert imbalance(loads.values()) == 1.0


@given(models(), st.sampled_from([2, 3, 4]), st.data())
@settings(max_examples=200, deadline=None)
def test_and_every_worker_when_each_holds_whole_layers(some: Experts, replicas: int, data: st.DataObject) -> None:
    """An EP rank's experts are cut over ``replicas`` workers in layer order: with whole layers on each, and K times the
    layers of each divisible by ep, they are balanced, too."""
    experts = Experts(tuple(range(len(some.layers) * replicas)), some.count, some.ep, replicas)
    k = data.draw(divisible(experts, len(some.layers)))
    loads = bytes_per_rank(
        select(experts, data.draw(st.integers(0, 100)), k), zero_placement(experts, TENSORS, group_elements=10**9)
    )
    assert imbalance(loads.values()) == 1.0


@given(models((2, 4)), st.data())
@settings(max_examples=150, deadline=None)
@example(Experts((0,), 32, 2, 2), None)
def test_workers_that_share_a_layer_differ_by_few_experts(experts: Experts, data: st.DataObject | None) -> None:
    """Each tensor a parameter group of its own, cut over the workers: the worst case for an order."""
    k = data.draw(divisible(experts, len(experts.layers))) if data else 8
    placement = zero_placement(experts, TENSORS, group_elements=1)
    for checkpoint in range(4):
        loads = bytes_per_rank(select(experts, checkpoint, k), placement, element_bytes=1)
        a_turn = sum(TENSORS.values())
        assert max(loads.values()) - min(loads.values()) <= 3 * a_turn * len(experts.layers)


@pytest.mark.parametrize("replicas", [1, 2, 4])
@pytest.mark.parametrize("ep", [1, 2, 4])
@pytest.mark.parametrize("k", [4, 8, 16])
def test_balance_of_common_shapes_in_large_models(replicas: int, ep: int, k: int) -> None:
    """12 layers, 64 experts, and parameter groups of one tensor each, as with experts of millions of elements."""
    experts = Experts(tuple(range(12)), 64, ep, replicas)
    placement = zero_placement(experts, TENSORS, group_elements=1)
    whole_turns = (k // ep) % replicas == 0
    for checkpoint in range(64 // k):
        worst = imbalance(bytes_per_rank(select(experts, checkpoint, k), placement).values())
        assert worst == 1.0 if whole_turns else worst <= 2.0


def test_a_naive_order_would_be_unbalanced() -> None:
    """Neighbours (l + cK + j) mod N of the paper, with contiguous blocks on each rank."""
    experts = Experts((0, 1), 8, ep=2)
    placement = zero_placement(experts, TENSORS)
    paper = [ExpertRef(layer, (layer + j) % 8) for layer in (0, 1) for j in range(2)]
    assert imbalance(bytes_per_rank(paper, placement).values()) == 2.0
    assert imbalance(bytes_per_rank(select(experts, 0, 2), placement).values()) == 1.0


@given(models((1, 2, 3, 4)), st.sampled_from([1, 500, 10**9]))
@settings(deadline=None)
def test_placement_has_every_element_once(experts: Experts, group_elements: int) -> None:
    placement = zero_placement(experts, TENSORS, group_elements=group_elements)
    assert sorted(placement) == list(range(experts.ep * experts.replicas))
    whole = [Range(f"{ref}.{name}", "master", 0, size) for ref in experts.all() for name, size in TENSORS.items()]
    placed = list(itertools.chain(*placement.values()))
    assert not uncovered(whole, placed)
    assert not uncovered(placed, whole)
    assert not overlaps(placed)
    block = experts.count // experts.ep
    for rank, ranges in placement.items():
        assert all(expert_of(r.unit).expert // block == rank % experts.ep for r in ranges)


def test_bytes_per_rank_counts_the_chosen_experts_only() -> None:
    placement = {
        0: [Range("L00.E000.up", "master", 0, 5), Range("L00.E001.up", "master", 0, 7)],
        1: [Range("L00.E000.up", "master", 5, 8), Range("model.norm.weight", "master", 0, 9)],
    }
    assert bytes_per_rank([ExpertRef(0, 0)], placement) == {0: 20, 1: 12}
    assert bytes_per_rank([], placement) == {0: 0, 1: 0}
    assert imbalance([20, 12]) == 1.25
    assert imbalance([0, 0]) == 1.0


@pytest.mark.parametrize(
    ("unit", "ref"), [("L03.E017.down_proj", ExpertRef(3, 17)), ("model.norm.weight", None), ("L03", None), ("", None)]
)
def test_expert_of_a_unit(unit: str, ref: ExpertRef | None) -> None:
    assert expert_of(unit) == ref


def test_load_aware_takes_the_most_loaded_and_breaks_ties_by_index() -> None:
    experts = Experts((3, 5), 4)
    chosen = select_loaded(experts, [[5, 9, 9, 1], [0, 0, 0, 0]], 2)
    assert chosen == (ExpertRef(3, 1), ExpertRef(3, 2), ExpertRef(5, 0), ExpertRef(5, 1))


@given(st.integers(1, 6).flatmap(lambda n: st.lists(st.lists(st.integers(0, 3), min_size=n, max_size=n), min_size=1)))
def test_load_aware_leaves_no_more_loaded_expert(unsaved: list[list[int]]) -> None:
    experts = Experts(tuple(range(len(unsaved))), len(unsaved[0]))
    for k in range(1, experts.count + 1):
        chosen = {(ref.layer, ref.expert) for ref in select_loaded(experts, unsaved, k)}
        for layer, row in enumerate(unsaved):
            taken = [row[e] for e in range(experts.count) if (layer, e) in chosen]
            left = [row[e] for e in range(experts.count) if (layer, e) not in chosen]
            assert len(taken) == k
            assert max(left, default=-1) <= min(taken)


def test_impossible_requests_are_refused() -> None:
    experts = Experts((0,), 4)
    for k in (0, 5):
        with pytest.raises(ValueError, match=f"K={k} of 4"):
            select(experts, 0, k)
    with pytest.raises(ValueError, match="1 layers with 4"):
        select_loaded(experts, [[1, 2]], 1)
    with pytest.raises(ValueError, match="ep=3"):
        Experts((0,), 4, ep=3)


# -- ages --------------------------------------------------------------------------------------------------------------


def test_ages_follow_captures_and_disk_has_some_of_them() -> None:
    experts = Experts((0, 1), 2)
    memory = disk = Ages.unsaved(experts)
    for step in range(4):
        memory = memory.saved(step, select(experts, step, 1))
    # Turns of layer 1 are one ahead of layer 0's.
    assert [memory.steps[ref] for ref in experts.all()] == [2, 3, 3, 2]
    disk = disk.persisted(memory, select(experts, 0, 1))
    assert [disk.steps[ref] for ref in experts.all()] == [2, -1, -1, 2]
    assert memory.lines(3) == ["L00: E000 step 2 (-1), E001 step 3", "L01: E000 step 3, E001 step 2 (-1)"]


# -- cost --------------------------------------------------------------------------------------------------------------

PART = SparsePartition(others=10**8, experts=9 * 10**8, count=64)
RATES = Bandwidths(50e9, 10e9, 100e9, 1e9)


def test_bytes_are_the_papers_formula() -> None:
    assert pec_bytes(PART, 64) == 12e9
    assert pec_bytes(PART, 8) == pytest.approx(12e9 * (0.1 + 0.9 / 8))
    assert pec_memory(PART, 8) == 12e9 + 3 * pec_bytes(PART, 8)
    on_disk = SparsePartition(10**8, 9 * 10**8, 64, disk=True)
    assert pec_memory(on_disk, 8) == 24e9 + 3 * pec_bytes(PART, 8)


@given(models(), st.integers(0, 10**6), st.data())
def test_formula_counts_what_a_selection_holds(experts: Experts, others: int, data: st.DataObject) -> None:
    """Against the bytes of the chosen experts themselves, three kinds of state, over all ranks."""
    k = data.draw(st.integers(1, experts.count))
    chosen = select(experts, 0, k)
    held = 3 * sum(bytes_per_rank(chosen, zero_placement(experts, TENSORS)).values())
    total = len(experts.layers) * experts.count * sum(TENSORS.values())
    assert Fraction(pec_bytes(SparsePartition(others, total, experts.count), k)).limit_denominator(10**6) == (
        held + others * 12
    )


def test_the_largest_k_that_hides_is_chosen() -> None:
    step = StepTimes(0.15, 0.13)  # 6.5 GB hide: 1.2 + 10.8 K/64 <= 6.5
    chosen = choose_k(PART, 1, step, RATES, 1 << 50)
    assert chosen.k == 31
    assert chosen.hidden
    assert chosen.cost.stall_s == 0
    assert "most without a stall" in chosen.reason
    everything = choose_k(PART, 1, StepTimes(1.0, 0.9), RATES, 1 << 50)
    assert everything.k == 64
    assert "nothing is lost" in everything.reason


def test_one_expert_if_none_hides_and_less_if_memory_is_short() -> None:
    fast = choose_k(PART, 1, StepTimes(0.02, 0.01), RATES, 1 << 50)
    assert (fast.k, fast.hidden) == (1, False)
    assert "not even one" in fast.reason
    short = choose_k(PART, 1, StepTimes(0.15, 0.13), RATES, pec_memory(PART, 10))
    assert short.k == 10
    assert "memory budget" in short.reason
    with pytest.raises(BudgetError, match=f"k_snapshot=1 needs {pec_memory(PART, 1):,} bytes"):
        choose_k(PART, 1, StepTimes(0.15, 0.13), RATES, pec_memory(PART, 1) - 1)


def test_the_recipes_k_is_kept_or_refused() -> None:
    step = StepTimes(0.15, 0.13)
    kept = choose_k(PART, 1, step, RATES, 1 << 50, fixed=40)
    assert (kept.k, kept.hidden) == (40, False)
    assert kept.cost.stall_s > 0
    with pytest.raises(BudgetError, match="k_snapshot=40"):
        choose_k(PART, 1, step, RATES, pec_memory(PART, 40) - 1, fixed=40)
