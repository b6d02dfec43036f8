"""Measuring this machine, and keeping what was measured."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from checkpointing.keeper.memory import available_bytes, total_bytes
from inference.calibrate import (
    ROWS,
    ExpertKind,
    Trials,
    _Bank,
    calibrate,
    cpu_table,
    hardware,
    machine_profile,
    profile_file,
)
from inference.compiled_experts import compiled_kernels
from inference.costmodel import KernelTable, MachineProfile, Rates, Timing, describe
from inference.host_expert import PackedExpert

CPU = torch.device("cpu")
TINY = ExpertKind(64, 32, torch.bfloat16)
STEADY = MachineProfile(
    name="steady",
    hardware="none",
    source="made up",
    dtype="bfloat16",
    hidden=64,
    intermediate=32,
    threads=2,
    dram=Rates(1e9, 1e9),
    cpu=(Timing("linear", 2, 1, 1e-3), Timing("linear", 2, 16, 0.5e-3)),
    cpu_overlapped=1e9,
    fill=1e9,
)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def test_a_cpu_alone_is_measured_as_it_computes():
    profile = calibrate(TINY, CPU, budget_s=0.0)
    assert {(t.kernel, t.rows) for t in profile.cpu} == {("linear", 1), ("linear", 16)}
    assert profile.threads == profile.team == torch.get_num_threads()
    assert profile.fill > 0
    assert profile.host_room == total_bytes()
    assert profile.link is None
    assert profile.dram.alone == profile.dram.overlapped >= profile.cpu_overlapped > 0
    assert profile.launch_s > 0
    assert (profile.dtype, profile.hidden, profile.intermediate) == ("bfloat16", 64, 32)
    assert "no GPU" in describe(profile)[0]


def test_without_a_gpu_the_runtime_has_torchs_threads_and_each_number_its_own_profile(cache):
    """More threads than torch has waited for each other: an expert took seventy times as long."""
    threads, files = torch.get_num_threads(), set()
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            profile = calibrate(TINY, CPU, budget_s=0.0)
            assert profile.threads == profile.team == number
            assert {timing.threads for timing in profile.cpu} == {number}
            files.add(profile_file(TINY, CPU))
    finally:
        torch.set_num_threads(threads)
    assert len(files) == 2
    assert available_bytes() <= total_bytes()


def test_beside_a_gpu_every_kernel_is_timed_with_one_row_and_every_product_with_many():
    trials = Trials.of(TINY, cores=4, with_gpu=True)
    assert trials.crews == ((2, 1), (2, 2), (1, 1)), "one core launches the GPU's work, one is the machine's"
    assert Trials.of(TINY, cores=1, with_gpu=True).crews == ((1, 1),)
    threads, team, timings = cpu_table(_Bank(TINY), trials, 0.0)
    assert (threads, team) == (2, 1)
    expected = {("linear", 1), ("rows", 1), ("upcast", 1), ("linear", 16), ("upcast", 16)}
    if compiled_kernels(torch.bfloat16):
        expected |= {("compiled", 1), ("compiled", 16)}
    assert {(t.kernel, t.rows) for t in timings} == expected


def test_a_profile_is_measured_once_and_again_when_asked_or_damaged(cache, monkeypatch):
    calls = []
    measured = STEADY
    monkeypatch.setattr("inference.calibrate.calibrate", lambda *_: calls.append(1) or measured)
    assert machine_profile(TINY, CPU) == measured
    assert machine_profile(TINY, CPU) == measured
    assert len(calls) == 1
    machine_profile(TINY, CPU, recalibrate=True)
    assert len(calls) == 2
    profile_file(TINY, CPU).write_text("half a fi")
    assert machine_profile(TINY, CPU) == measured
    assert len(calls) == 3
    assert machine_profile(TINY, CPU) == measured
    assert len(calls) == 3
    assert [path.suffix for path in (cache / "planaria" / "profiles").iterdir()] == [".json"], "nothing else is left"


@pytest.mark.parametrize(
    ("busy", "said"),
    [
        (replace(STEADY, spread=4.0), "4.0 times as long"),
        (replace(STEADY, cpu=(Timing("linear", 2, 16, 43.5e-3), Timing("linear", 2, 64, 0.1e-3))), "16 rows took 43.5"),
    ],
)
def test_what_was_measured_on_a_busy_machine_is_used_once_and_not_kept(cache, monkeypatch, capsys, busy, said):
    monkeypatch.setattr("inference.calibrate.calibrate", lambda *_: busy)
    assert machine_profile(TINY, CPU) == busy
    assert said in capsys.readouterr().err
    assert not profile_file(TINY, CPU).exists()
    assert STEADY.unsteady is None


def test_a_timing_is_the_best_of_its_repeats_and_says_how_they_differ(monkeypatch):
    bank, times = _Bank(TINY), iter([9.0, 5.0, 1.0, 2.0])
    monkeypatch.setattr(bank, "call_s", lambda *_: next(times))
    assert bank.timing("linear", 1, 1, 1).seconds == 1.0 / 8
    assert bank.spread == 2.0


@pytest.mark.skipif(not compiled_kernels(torch.bfloat16), reason="no C compiler")
@pytest.mark.parametrize("kernel", ["compiled", "linear"])
def test_packed_experts_are_timed_as_they_are(kernel):
    results = []
    for packed in (False, True):
        bank = _Bank(replace(TINY, packed=packed))
        assert isinstance(bank(0, 3), PackedExpert) == packed
        assert bank.weights_N.nbytes >= bank.kind.host_nbytes * bank.count
        with bank.experts(1, 1, KernelTable((Timing(kernel, 1, 1, 1.0),))) as experts:
            results.append(experts.submit(0, [(3, 1), (5, 2)], torch.ones(3, 64)).result())
    assert torch.equal(*results)
    assert (results[0] != 0).all()


def test_profiles_are_kept_apart_by_kind(cache):
    files = {
        profile_file(ExpertKind(hidden, 32, dtype), CPU)
        for hidden in (64, 128)
        for dtype in (torch.float32, torch.bfloat16)
    }
    assert len(files) == 4


def test_what_was_measured_in_another_way_is_measured_again(cache, monkeypatch):
    monkeypatch.setattr("inference.calibrate.calibrate", lambda *_: STEADY)
    machine_profile(TINY, CPU)
    assert profile_file(TINY, CPU).exists()
    monkeypatch.setattr("inference.calibrate._METHOD", 1)
    assert not profile_file(TINY, CPU).exists()


def test_a_home_that_cannot_be_written_only_costs_time(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr("inference.calibrate.calibrate", lambda *_: STEADY)
    assert machine_profile(TINY, CPU) == STEADY


def test_a_kernel_that_cannot_be_compiled_is_not_offered(monkeypatch):
    monkeypatch.setattr("inference.compiled_experts.opened", lambda: "[Errno 13] Permission denied: '/home/.cache'")
    assert compiled_kernels(torch.bfloat16) == ()
    assert "compiled" not in Trials.of(TINY, 4, with_gpu=True).kernels


def test_teams_are_left_out_once_only_the_compiled_kernel_is_tried():
    class Bank:
        def timing(self, kernel, threads, team, rows):
            return Timing(kernel, threads, rows, rows * (1.0 if kernel == "linear" else 0.1) / threads)

    threads, team, timings = cpu_table(Bank(), Trials(("linear", "compiled"), ((3, 1), (3, 2), (1, 1))), 1e3)
    assert (threads, team) == (3, 1)
    assert {timing.rows for timing in timings if timing.kernel == "compiled"} == set(ROWS)


def test_hardware_is_named_the_same_every_time():
    assert hardware(CPU) == hardware(CPU)
    assert "cores of" in hardware(CPU)


@pytest.mark.gpu
def test_a_gpu_has_all_lanes():
    kind = ExpertKind(2048, 768, torch.bfloat16)
    profile = calibrate(kind, torch.device("cuda"))
    assert profile.link is not None
    assert 1e9 < profile.link.overlapped <= profile.link.alone < 1e12
    assert profile.gpu_memory > profile.link.alone
    assert profile.sync_s > 0
    assert profile.handover_s > 0
    assert [t.rows for t in profile.gpu] == [1, 16, 256, 2048]
