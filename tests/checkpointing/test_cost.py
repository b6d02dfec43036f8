"""The schedule chosen is the one that a search over all of them finds, within every limit."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from checkpointing.cost import (
    MAX_OVERHEAD,
    Bandwidths,
    BudgetError,
    Partition,
    StepTimes,
    budget_share,
    capture_cost,
    choose_interval,
    choose_rotation,
    dense_cost,
    dense_memory,
    disk_interval,
    wal_bytes_per_step,
    wal_cost,
    wal_memory,
)

H200 = Bandwidths(device_to_host=50e9, host_copy=10e9, hash=40e9, disk=1e9)
STEP = StepTimes(step=0.15, forward_backward=0.13)
BILLION = Partition(10**9)
PLENTY = 1 << 50

partitions = st.builds(Partition, st.integers(1, 10**10), st.sampled_from([2, 4]), st.booleans())
rates = st.builds(
    Bandwidths,
    st.none() | st.floats(1e8, 1e11),
    st.floats(1e8, 1e11),
    st.floats(1e8, 1e11),
    st.floats(1e6, 1e10),
)
times = st.builds(
    lambda step, share: StepTimes(step, step * share), st.floats(1e-3, 100), st.floats(0.01, 1, exclude_min=True)
)


@pytest.mark.parametrize(("n", "g", "per_parameter"), [(2, 2, 8.0), (4, 2, 5.0), (12, 4, 5.0), (50, 2, 2.24)])
def test_wal_moves_a_gradient_and_a_part_of_the_state(n: int, g: int, per_parameter: float) -> None:
    assert wal_bytes_per_step(Partition(1000, g), n) == pytest.approx(1000 * per_parameter)


@pytest.mark.parametrize(
    ("n", "g", "disk", "per_parameter"),
    [
        (2, 2, False, 5 * 6 + 4 * 2),  # 5 bases of 6 bytes, 4 logs
        (4, 2, False, 7 * 3 + 6 * 2),
        (4, 4, True, 7 * 3 + 12 + 6 * 4),
        (12, 2, False, 15 + 14 * 2),
    ],
)
def test_wal_memory_is_bases_and_log_with_slack(n: int, g: int, disk: bool, per_parameter: int) -> None:
    assert wal_memory(Partition(1000, g, disk), n) == 1000 * per_parameter


def test_dense_memory_is_whole_generations() -> None:
    assert dense_memory(Partition(10)) == 360
    assert dense_memory(Partition(10, disk=True)) == 480


def test_with_room_and_a_fast_link_few_bytes_are_worth_some_memory_and_time() -> None:
    chosen = choose_rotation(BILLION, STEP, H200, PLENTY)
    assert (chosen.rotation, chosen.binds) == (10, "nothing")
    assert chosen.cost.stall_s == 0
    small = wal_cost(BILLION, 4, STEP, H200)
    assert small.memory_bytes == min(wal_memory(BILLION, n) for n in range(2, 60))
    assert chosen.cost.recovery_s <= 1.75 < wal_cost(BILLION, 11, STEP, H200).recovery_s
    assert small.memory_bytes < chosen.cost.memory_bytes <= 1.4 * small.memory_bytes
    assert "no limit binds" in chosen.reason


def test_a_slow_link_wants_more_steps_and_a_budget_may_forbid_them() -> None:
    slow = Bandwidths(device_to_host=17e9, host_copy=10e9, hash=100e9, disk=1e9)  # 2.55 bytes per parameter hide
    free = choose_rotation(BILLION, STEP, slow, PLENTY)
    assert free.rotation > 12
    assert free.cost.stall_s <= 0.001 * STEP.step
    tight = choose_rotation(BILLION, STEP, slow, 45 * 10**9)
    assert tight.rotation < free.rotation
    assert tight.binds == "budget"
    assert tight.cost.memory_bytes <= 45 * 10**9
    assert "memory budget of" in tight.reason


def test_what_no_rotation_can_hide_is_named() -> None:
    link = choose_rotation(BILLION, STEP, Bandwidths(5e9, 10e9, 100e9, 1e9), PLENTY)
    assert link.binds == "link"
    assert link.cost.stall_s >= 2e9 / 5e9 - STEP.step  # the log begins beside the optimizer
    sums = choose_rotation(BILLION, STEP, Bandwidths(100e9, 10e9, 5e9, 1e9), PLENTY)
    assert sums.binds == "hash"
    assert "checksums" in sums.reason


def test_slow_checksums_want_no_longer_rotation_where_the_device_takes_them() -> None:
    """They did: a keeper at 20 instead of 27 GB/s, and 23 parts instead of 10, took 2.9 s to restore instead of 1.7."""
    quick, slow = (choose_rotation(BILLION, STEP, Bandwidths(50e9, 10e9, rate, 1e9), PLENTY) for rate in (27e9, 15e9))
    assert slow.rotation > quick.rotation
    taken = [choose_rotation(BILLION, STEP, Bandwidths(50e9, 10e9, rate, 1e9, True), PLENTY) for rate in (27e9, 20e9)]
    assert taken[0] == taken[1]
    assert taken[0].cost.recovery_s <= 1.75


def test_the_recipes_rotation_is_kept_or_refused() -> None:
    kept = choose_rotation(BILLION, STEP, H200, PLENTY, fixed=9)
    assert (kept.rotation, kept.binds) == (9, "recipe")
    needed = wal_memory(BILLION, 9)
    with pytest.raises(BudgetError) as error:
        choose_rotation(BILLION, STEP, H200, needed - 1, fixed=9)
    for part in ("checkpoint.wal.rotation=9", f"{needed:,} bytes", f"{needed - 1:,}", "budget_gib"):
        assert part in str(error.value)


def test_a_budget_below_the_smallest_schedule_says_what_it_needs() -> None:
    least = min(wal_memory(BILLION, n) for n in range(2, 60))
    assert choose_rotation(BILLION, STEP, H200, least).cost.memory_bytes == least
    with pytest.raises(BudgetError, match=f"{least:,} bytes"):
        choose_rotation(BILLION, STEP, H200, least - 1)
    with pytest.raises(BudgetError, match=f"mode dense needs {36 * 10**9:,} bytes"):
        choose_interval(BILLION, STEP, H200, 36 * 10**9 - 1)


@given(partitions, times, rates, st.floats(20, 300))
def test_rotation_is_the_best_that_fits(
    partition: Partition, step: StepTimes, rate: Bandwidths, per_parameter: float
) -> None:
    budget = int(per_parameter * partition.parameters)
    costs = [wal_cost(partition, n, step, rate) for n in range(2, 257)]
    fitting = [cost for cost in costs if cost.memory_bytes <= budget]
    if not fitting:
        with pytest.raises(BudgetError):
            choose_rotation(partition, step, rate, budget)
        return
    chosen = choose_rotation(partition, step, rate, budget)
    assert chosen.cost == wal_cost(partition, chosen.rotation, step, rate)
    assert chosen.cost.memory_bytes <= budget
    least = min(cost.stall_s for cost in fitting)
    assert chosen.cost.stall_s <= least + 0.001 * step.step
    same = [cost for cost in fitting if cost.stall_s <= least + 0.001 * step.step]
    small = min(same, key=lambda cost: cost.memory_bytes)
    slow = max(1.4 * small.recovery_s, 1.4 if rate.device_to_host is None else 1.75)
    near = [c for c in same if c.memory_bytes <= 1.4 * small.memory_bytes and c.recovery_s <= slow]
    assert chosen.cost in near
    assert chosen.cost.bytes_per_step == min(cost.bytes_per_step for cost in near)
    if chosen.binds == "nothing":
        assert chosen.cost.stall_s <= 0.001 * step.step


@given(partitions, times, rates)
def test_interval_is_the_smallest_within_the_overhead(partition: Partition, step: StepTimes, rate: Bandwidths) -> None:
    def allowed(m: int) -> bool:
        copied = partition.parameters * 12 / rate.capture
        overhead = max(0.0, copied - step.forward_backward) / (m * step.step)
        return overhead <= MAX_OVERHEAD * (1 + 1e-9) and partition.parameters * 12 / rate.hash <= m * step.step * (
            1 + 1e-9
        )

    chosen = choose_interval(partition, step, rate, PLENTY)
    assert allowed(chosen.every)
    assume(chosen.every > 1)
    copied, hashed = partition.parameters * 12 / rate.capture, partition.parameters * 12 / rate.hash
    fewer = (chosen.every - 1) * step.step * (1 - 1e-9)
    assert max(0.0, copied - step.forward_backward) > fewer * MAX_OVERHEAD or hashed > fewer
    assert chosen.binds in ("link", "hash")


def test_interval_examples() -> None:
    every_step = choose_interval(Partition(10**8), STEP, H200, PLENTY)
    assert (every_step.every, every_step.binds) == (1, "nothing")
    # 12 GB at 50 GB/s: 0.24 s, 0.11 s of them not hidden; 0.11 / 0.035 / 0.15 = 20.95 steps.
    assert choose_interval(BILLION, STEP, H200, PLENTY).every == 21
    # On a CPU the host's own copy counts.
    assert dense_cost(BILLION, 1, STEP, Bandwidths(None, 10e9, 20e9, 1e9)).copy_s == pytest.approx(1.2)
    # Hashing 12 GB at 4 GB/s takes 3 s, 20 steps; copying hides.
    slow_hash = choose_interval(BILLION, StepTimes(0.15, 0.15), Bandwidths(100e9, 1e9, 4e9, 1e9), PLENTY)
    assert (slow_hash.every, slow_hash.binds) == (20, "hash")


def test_recovery_counts_verify_copy_and_redo() -> None:
    cost = wal_cost(BILLION, 5, STEP, H200)
    replayed = 12e9 + 4 * 2e9
    assert cost.recovery_s == pytest.approx(replayed / 20e9 + 4 * 0.02)  # bound by the registering of slots
    assert cost.lost_s == pytest.approx(0.075 + wal_bytes_per_step(BILLION, 5) / 50e9)
    dense = dense_cost(BILLION, 10, STEP, H200)
    assert dense.recovery_s == pytest.approx(12e9 / 20e9)
    slow = dense_cost(BILLION, 10, STEP, Bandwidths(None, 10e9, 20e9))
    assert slow.recovery_s == pytest.approx(12e9 / 20e9 + 12e9 / 10e9)
    assert dense.lost_s == pytest.approx(0.75 + 0.24)
    assert dense.bytes_per_step == 1.2e9


def test_stall_counts_hashing_only_beyond_the_interval() -> None:
    rate = Bandwidths(1e9, 1e9, 1e9, 1e9)
    half = StepTimes(1.0, 0.5)
    assert capture_cost(4e8, 0, 1, half, rate, 0, 0).stall_s == 0
    assert capture_cost(9e8, 0, 1, half, rate, 0, 0).stall_s == pytest.approx(0.4)
    assert capture_cost(9e8, 0, 4, half, rate, 0, 0).stall_s == pytest.approx(0.1)
    slow_hash = Bandwidths(9e9, 9e9, 1e9, 1e9)
    assert capture_cost(3e9, 0, 2, half, slow_hash, 0, 0).stall_s == pytest.approx(0.5)


def test_disk_interval_lets_each_write_end() -> None:
    assert disk_interval(BILLION, STEP, 1e9) == 80
    assert disk_interval(Partition(1), STEP, 1e9) == 1


def test_shares_and_values_that_cannot_be() -> None:
    assert budget_share(64 << 30, 4) == 8 << 30
    with pytest.raises(ValueError, match=r"hash=0 bytes/s .*measure it again"):
        Bandwidths(None, 1e9, 0, 1e9)
    with pytest.raises(ValueError, match="do not fit"):
        StepTimes(1.0, 1.5)
