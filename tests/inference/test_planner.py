"""Plans against all plans there are, and against timelines run event by event."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inference.costmodel import ExpertCosts, MachineProfile, Rates, Timing, overlap
from inference.planner import CallPlanner, PlanError, plan_call


def machine(link=50.0, beside=1.0, cpu_us=(200.0, 500.0), gpu_us=(5.0, 20.0), handover_us=0.0, has_link=True):
    """A machine whose experts have 6 MB; rates in GB/s, times of 1 and 64 rows in microseconds."""
    return MachineProfile(
        name="test",
        hardware="made up",
        source="made up",
        dtype="bfloat16",
        hidden=1000,
        intermediate=1000,
        threads=4,
        dram=Rates(100e9, 100e9 * beside),
        cpu=tuple(Timing("linear", 4, n, us * 1e-6) for n, us in zip((1, 64), cpu_us, strict=True)),
        cpu_overlapped=6e6 / (cpu_us[0] * 1e-6) * beside,
        link=Rates(link * 1e9, link * beside * 1e9) if has_link else None,
        gpu=tuple(Timing("gpu", 1, n, us * 1e-6) for n, us in zip((1, 64), gpu_us, strict=True)) if has_link else (),
        fill=5e9,
        gpu_memory=1e12,
        gpu_flops=1e14,
        handover_s=handover_us * 1e-6,
    )


def costs_of(threads=4, **rates) -> ExpertCosts:
    return ExpertCosts.of(machine(**rates), 1000, 1000, 2, threads)


machines = st.builds(
    costs_of,
    link=st.floats(5, 200),
    beside=st.floats(0.4, 1),
    cpu_us=st.tuples(st.floats(30, 2000), st.floats(30, 2000)).map(sorted),
    gpu_us=st.tuples(st.floats(1, 300), st.floats(1, 300)).map(sorted),
    handover_us=st.floats(0, 100),
)
missing = st.lists(st.integers(1, 64), max_size=8).map(lambda rows: list(enumerate(rows, 10)))
resident = st.lists(st.integers(1, 64), max_size=3)


def simulated(costs, fetched, computed, resident_rows, busy=0.0):
    """The end of one plan: experts arrive one by one, the GPU takes each when it is there and it is free."""
    count, rest = len(fetched), len(computed)
    link = (busy + count * costs.link_s, busy + count * costs.link_overlapped_s) if count else (0.0, 0.0)
    handed = costs.handover_s if rest else 0.0
    times = [handed + sum(map(cost, computed)) for cost in (costs.cpu_s, costs.cpu_overlapped_s)]
    link_end, cpu_end = overlap(link, tuple(times))
    gpu = sum(map(costs.gpu_s, resident_rows))
    for number, rows in enumerate(fetched, 1):
        arrived = busy + max(link_end - busy, 0.0) * number / count
        gpu = max(gpu, arrived) + costs.gpu_s(rows)
    return max(link_end, cpu_end, gpu)


@settings(max_examples=150, deadline=None)
@given(machines, missing, resident, st.floats(0, 1e-3))
def test_no_plan_is_better_in_all_subsets_and_orders_of_arrival(costs, missing, resident_rows, busy):
    plan = plan_call(costs, missing, resident_rows=resident_rows, link_busy_s=busy)
    rows = dict(missing)
    assert sorted(plan.fetch + plan.cpu) == sorted(rows)
    taken = [rows[e] for e in plan.fetch]
    own = simulated(costs, taken, [rows[e] for e in plan.cpu], resident_rows, busy)
    assert plan.cut.seconds == pytest.approx(own, rel=1e-9)
    best = math.inf
    for chosen in itertools.product((True, False), repeat=len(missing)):
        fetched = sorted((n for (_, n), yes in zip(missing, chosen, strict=True) if yes), reverse=True)
        computed = [n for (_, n), yes in zip(missing, chosen, strict=True) if not yes]
        best = min(best, simulated(costs, fetched, computed, resident_rows, busy))
    # A cut in order of rows is the best plan for the link and the CPU; where the GPU is the slowest of all, another
    # order of arrivals may gain what an expert takes, and another choice as much again.
    assert plan.cut.seconds <= best + 2 * costs.gpu_s(64) + 1e-12


@settings(max_examples=60, deadline=None)
@given(machines, missing)
def test_the_order_of_arrival_is_the_best_of_all(costs, missing):
    rows = [n for _, n in missing][:5]
    best = min((simulated(costs, order, [], [3]) for order in itertools.permutations(rows)), default=0)
    assert simulated(costs, sorted(rows, reverse=True), [], [3]) <= best + 1e-12 or not rows


@settings(max_examples=100, deadline=None)
@given(machines, missing, resident)
def test_a_plan_is_never_slower_than_one_lane_alone(costs, missing, resident_rows):
    plan = plan_call(costs, missing, resident_rows=resident_rows)
    assert plan.cut.seconds <= min(plan.cut.fetch_only_s, plan.cut.cpu_only_s)


@settings(max_examples=100, deadline=None)
@given(st.floats(5, 200), st.floats(30, 2000), st.integers(0, 16))
def test_equal_misses_are_split_as_the_closed_form_says(link, cpu_us, misses):
    costs = costs_of(link=link, cpu_us=(cpu_us, cpu_us), gpu_us=(1e-6, 1e-6))
    plan = plan_call(costs, [(e, 1) for e in range(misses)])

    def ends(fetched):
        return max(fetched * costs.link_s, (misses - fetched) * costs.cpu_s(1))

    expected = min(range(misses + 1), key=ends)
    assert ends(len(plan.fetch)) == pytest.approx(ends(expected))
    assert abs(len(plan.fetch) - expected) <= 1
    # Neither lane ends later than the other by more than one expert that the other could have taken over.
    assert len(plan.fetch) * costs.link_s <= (len(plan.cpu) + 1) * costs.cpu_s(1) + 1e-9
    assert len(plan.cpu) * costs.cpu_s(1) <= (len(plan.fetch) + 1) * costs.link_s + 1e-9


@settings(max_examples=60, deadline=None)
@given(missing, st.floats(5, 100), st.floats(1, 4), st.floats(30, 1000), st.floats(0.4, 1))
def test_faster_lanes_never_make_a_call_slower(missing, link, faster, cpu_us, beside):
    slow = plan_call(costs_of(link=link, beside=beside, cpu_us=(cpu_us, 2 * cpu_us)), missing)
    quick_link = plan_call(costs_of(link=link * faster, beside=beside, cpu_us=(cpu_us, 2 * cpu_us)), missing)
    quick_cpu = plan_call(costs_of(link=link, beside=beside, cpu_us=(cpu_us / faster, 2 * cpu_us / faster)), missing)
    assert quick_link.cut.seconds <= slow.cut.seconds * (1 + 1e-12)
    assert quick_cpu.cut.seconds <= slow.cut.seconds * (1 + 1e-12)


def test_where_lanes_only_take_from_each_other_one_works_alone():
    """Beside the link the cores get 40 % of their rate, and it 40 % of its: together less than either alone."""
    plan = plan_call(costs_of(link=30, beside=0.4, cpu_us=(200, 400)), [(e, 1) for e in range(8)])
    assert plan.mode in ("cpu", "fetch")
    assert plan_call(costs_of(link=30, beside=0.9, cpu_us=(200, 400)), [(e, 1) for e in range(8)]).mode == "split"


def test_experts_with_many_rows_are_fetched_and_those_with_few_computed():
    plan = plan_call(costs_of(), [(0, 1), (1, 60), (2, 2), (3, 50), (4, 1), (5, 1)])
    assert set(plan.fetch) >= {1, 3}
    assert plan.fetch[0] == 1
    assert set(plan.cpu) <= {0, 2, 4, 5}
    assert plan.mode == "split"


def test_of_equal_experts_the_worthiest_are_fetched_then_the_lowest():
    call = [(e, 1) for e in (7, 3, 9, 1)]
    plain = plan_call(costs_of(), call)
    assert (plain.fetch, plain.cpu) == ((1, 3, 7), (9,))
    assert plan_call(costs_of(), call, worth={9: 5.0, 7: 1.0}).fetch == (9, 7, 1)
    assert plan_call(costs_of(), call[::-1]) == plain, "the order in which experts are named means nothing"


def test_a_cpu_only_machine_computes_and_a_machine_without_spare_cores_fetches():
    call = [(0, 1), (1, 3)]
    alone = plan_call(costs_of(has_link=False), call)
    assert (alone.mode, alone.cut.bound, alone.cut.fetch_only_s) == ("cpu", "cpu", math.inf)
    assert "there is no link" in alone.reason()
    fetching = plan_call(costs_of(threads=0), call)
    assert (fetching.mode, fetching.cut.bound, fetching.cut.cpu_only_s) == ("fetch", "link", math.inf)
    with pytest.raises(PlanError, match="the CPU may compute none"):
        plan_call(costs_of(has_link=False, threads=0), call)


def test_fetches_are_bounded_by_slots():
    plan = plan_call(costs_of(cpu_us=(900, 900)), [(e, 1) for e in range(6)], max_fetch=2)
    assert len(plan.fetch) == 2
    assert plan_call(costs_of(), [(0, 1)], max_fetch=0).mode == "cpu"
    assert plan_call(costs_of(), [(0, 1)], max_fetch=0).cut.fetch_only_s == math.inf


def test_a_busy_link_leaves_more_to_the_cores():
    call = [(e, 1) for e in range(8)]
    free, busy = plan_call(costs_of(), call), plan_call(costs_of(), call, link_busy_s=3e-4)
    assert len(busy.fetch) < len(free.fetch)


def test_a_call_without_misses_waits_for_the_gpu_only():
    plan = plan_call(costs_of(), [], resident_rows=[1, 1])
    assert (plan.mode, plan.cut.bound, plan.cut.seconds) == ("resident", "gpu", pytest.approx(1e-5))


def test_the_reason_names_rates_and_shares():
    text = plan_call(costs_of(link=55, cpu_us=(1e6 * 6e6 / 36e9, 400)), [(e, 1) for e in range(8)]).reason()
    assert text.startswith("split: link 55 GB/s and CPU 36 GB/s carry 5 and 3 of 8 misses; bound by ")


def test_remembered_cuts_are_the_planned_ones():
    costs, calls = costs_of(), []
    planner = CallPlanner(costs)
    for rows in ([1] * 5, [3, 1, 1], [1] * 5, []):
        missing = list(enumerate(rows, 7))
        fetch, cpu = planner(missing, [1, 2])
        calls.append(plan_call(costs, missing, resident_rows=[2, 1]))
        assert (fetch, cpu) == (calls[-1].fetch, calls[-1].cpu)
    assert planner.modes == {"split": 3, "resident": 1}
    assert planner.newest == calls[2]
    assert planner([(9, 1), (4, 1), (5, 1), (6, 1), (8, 1)], [1, 2], {9: 1.0})[0][0] == 9


def test_plans_are_values():
    plan = plan_call(costs_of(), [(0, 1), (1, 1)])
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.fetch = ()
