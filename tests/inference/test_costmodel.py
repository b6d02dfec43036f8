"""Formulas against their definitions, and profiles on disk."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inference.costmodel import (
    PACKED_BYTES,
    ExpertCosts,
    KernelTable,
    MachineProfile,
    ProfileError,
    Rates,
    Timing,
    at,
    describe,
    distinct_experts,
    named_profile,
    overlap,
    physical_floor,
)

MACHINE = MachineProfile(
    name="test",
    hardware="made up",
    source="made up",
    dtype="bfloat16",
    hidden=1000,
    intermediate=1000,
    threads=4,
    dram=Rates(40e9, 30e9),
    cpu=(
        Timing("rows", 4, 1, 2e-4),
        Timing("rows", 4, 8, 16e-4),
        Timing("linear", 4, 1, 4e-4),
        Timing("linear", 4, 8, 6e-4),
    ),
    cpu_overlapped=20e9,
    link=Rates(50e9, 40e9),
    gpu=(Timing("gpu", 1, 1, 1e-5), Timing("gpu", 1, 64, 1e-5), Timing("gpu", 1, 1024, 1e-4)),
    gpu_memory=1e12,
    gpu_flops=1e14,
)  # fmt: skip
seconds = st.floats(1e-6, 1e-2)


@settings(deadline=None)
@given(seconds, seconds, st.floats(1, 3), st.floats(1, 3))
def test_overlapped_lanes_end_between_alone_and_overlapped(link, cpu, slow_link, slow_cpu):
    link_end, cpu_end = overlap((link, link * slow_link), (cpu, cpu * slow_cpu))
    assert link * (1 - 1e-12) <= link_end <= link * slow_link * (1 + 1e-12)
    assert cpu * (1 - 1e-12) <= cpu_end <= cpu * slow_cpu * (1 + 1e-12)
    # Work done adds up: what the longer lane did beside the other, and what it did alone, is all of it.
    first, last = min(link_end, cpu_end), max(link_end, cpu_end)
    alone, beside = (cpu, cpu * slow_cpu) if cpu_end == last else (link, link * slow_link)
    assert first / beside + (last - first) / alone == pytest.approx(1)


def test_the_two_regimes_of_host_memory():
    """Lanes that share one memory end as if one did all; lanes that do not end as if each were alone."""
    shared = overlap((1.0, 2.0), (1.0, 2.0))
    apart = overlap((1.0, 1.0), (1.0, 1.0))
    assert max(shared) == 2.0
    assert max(apart) == 1.0


def test_times_between_measured_rows_lie_on_lines_and_never_fall():
    curve = [(1, 2.0), (4, 1.0), (8, 6.0)]
    assert [at(curve, n) for n in (1, 4, 6, 8, 16)] == [2.0, 2.0, 4.0, 6.0, 12.0]


def test_the_fastest_kernel_depends_on_rows_and_threads():
    table = KernelTable((*MACHINE.cpu, Timing("linear", 2, 1, 3e-4)))
    assert [table.best(n, 4).kernel for n in (1, 2, 3, 8)] == ["rows", "rows", "linear", "linear"]
    assert table.best(1, 3) == Timing("linear", 2, 1, 3e-4), "three threads were not measured, two were"
    assert table.best(1, 64).threads == 4
    assert table.best(1, 1).threads == 2


def test_costs_scale_with_the_size_of_an_expert():
    costs = ExpertCosts.of(MACHINE, hidden=500, intermediate=1000, itemsize=2)
    assert costs.expert_bytes == 3_000_000
    assert costs.link_s == pytest.approx(3e6 / 50e9)
    assert costs.cpu_s(1) == pytest.approx(1e-4)
    assert costs.cpu_overlapped_s(1) == pytest.approx(1.5e-4), "memory is what the link takes from the CPU"
    assert costs.cpu_overlapped_s(80) == costs.cpu_s(80), "many rows wait for the cores"
    assert ExpertCosts.of(MACHINE, 500, 1000, 2, threads=0).cpu_s(1) == math.inf
    assert ExpertCosts.of(MACHINE, 500, 1000, 2, threads=1).cpu_s(1) == pytest.approx(4e-4), "four were measured"
    assert ExpertCosts.of(MACHINE, 500, 1000, 2, threads=9).cpu_s(1) == pytest.approx(1e-4)


def test_packed_experts_cost_link_and_memory_less_and_the_gpu_the_same():
    plain, packed = (ExpertCosts.of(MACHINE, 1000, 1000, itemsize) for itemsize in (2, PACKED_BYTES))
    assert packed.expert_bytes == 0.75 * plain.expert_bytes
    assert packed.link_s == pytest.approx(0.75 * plain.link_s)
    assert packed.link_overlapped_s == pytest.approx(0.75 * plain.link_overlapped_s)
    assert packed.cpu_overlapped_s(1) == pytest.approx(0.75 * plain.cpu_overlapped_s(1)), "timed as they are: scaled"
    assert packed.gpu_s(1) == plain.gpu_s(1), "unpacked there"
    timed = dataclasses.replace(MACHINE, packed=True)
    assert ExpertCosts.of(timed, 1000, 1000, PACKED_BYTES).cpu_s(1) == plain.cpu_s(1), "timed packed"
    assert "of packed weights at one row" in "".join(describe(timed))


def test_the_gpu_s_time_is_that_of_the_bytes_that_lie_there():
    """A float32 model on a profile of bf16 experts, packed or not, reads twice as much; one that was timed, as much."""
    for timed in (MACHINE, dataclasses.replace(MACHINE, packed=True)):
        bf16, packed, fp32 = (ExpertCosts.of(timed, 1000, 1000, itemsize) for itemsize in (2, PACKED_BYTES, 4))
        assert bf16.gpu_s(1) == packed.gpu_s(1) == 1e-5
        assert fp32.gpu_s(1) == 2e-5
    of_fp32 = dataclasses.replace(MACHINE, dtype="float32")
    assert [ExpertCosts.of(of_fp32, 1000, 1000, each).gpu_s(1) for each in (4, 2, PACKED_BYTES)] == [1e-5, 5e-6, 5e-6]


def test_without_a_gpu_nothing_can_be_fetched():
    laptop = dataclasses.replace(MACHINE, link=None, fill=5e9, gpu=())
    costs = ExpertCosts.of(laptop, 1000, 1000, 2)
    assert costs.link_s == math.inf
    assert costs.gpu_s(3) == 0


def test_distinct_experts_of_a_batch():
    assert distinct_experts(64, 8, 1) == pytest.approx(8)
    assert distinct_experts(64, 8, 18) == pytest.approx(58.2, abs=0.1)


def test_the_floor_is_that_of_the_slowest_lane():
    floor = physical_floor(MACHINE, missed_bytes=70e6, fetched_bytes=10e6, device_bytes=100e6, flops=5e10)
    assert dataclasses.astuple(floor) == pytest.approx((1e-3, 2e-4, 1e-4, 5e-4))
    assert floor.bound == "host memory"
    laptop = dataclasses.replace(MACHINE, link=None, fill=5e9)
    alone = physical_floor(laptop, missed_bytes=70e6, fetched_bytes=0, device_bytes=10e6)
    assert alone.seconds == pytest.approx(80e6 / 40e9)
    many = physical_floor(laptop, missed_bytes=0, fetched_bytes=0, device_bytes=1, flops=1e12)
    assert many.bound == "matrix products"
    assert many.seconds == pytest.approx(1e12 / (6e6 * 8 / 6e-4)), "the best kernel at its best count of rows"


def test_a_profile_comes_back_from_disk_as_it_was(tmp_path):
    (tmp_path / "p.json").write_text(MACHINE.dump())
    assert MachineProfile.load(tmp_path / "p.json") == MACHINE
    assert named_profile(str(tmp_path / "p.json")) == MACHINE


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"name": 1}', MACHINE.dump().replace('"seconds": 0.0002', '"seconds": 0')]
)
def test_a_file_that_is_no_profile_is_refused_by_name(tmp_path, text):
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(ProfileError, match=r"p\.json"):
        MachineProfile.load(tmp_path / "p.json")


def test_an_unknown_name_says_what_there_is():
    with pytest.raises(ProfileError, match="h200"):
        named_profile("h2000")
