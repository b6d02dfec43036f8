"""The CPU lane against the formula. Shapes: T rows, P pairs, E experts, H hidden, I intermediate."""

from __future__ import annotations

import ctypes
import platform
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from inference import cpu_lane, native
from inference.compiled_experts import CompiledExperts
from inference.cpu_lane import CpuLane, LaneCall, LaneError, LaneHung
from inference.host_expert import HostExpert
from inference.native import NativeError, library, opened
from inference.packed import PackedBlock
from inference.packing import pack_into


def _case(rows: int, choices: int, experts: int, hidden: int, inner: int, dtype: torch.dtype, seed: int):
    g = torch.Generator().manual_seed(seed)
    expert_TK = torch.stack([torch.randperm(experts, generator=g)[:choices] for _ in range(rows)])
    block_EN = (torch.randn(experts, 3 * hidden * inner, generator=g) / hidden**0.5).to(dtype)
    x_TH = torch.randn(rows, hidden, generator=g)
    return expert_TK, block_EN, x_TH, torch.rand(rows * choices, generator=g)


def _computed(lane: CpuLane, expert_TK, block_EN, x_TH, score_P, wanted: list[int], packed=False) -> torch.Tensor:
    """[P,H], NaN where the pair's expert is not wanted."""
    flat_P = expert_TK.flatten()
    pairs = [torch.nonzero(flat_P == expert)[:, 0].tolist() for expert in wanted]
    first = np.cumsum([0, *map(len, pairs)]).tolist()
    y_PH = np.full((len(flat_P), x_TH.shape[1]), np.nan, dtype=np.float32)
    call = LaneCall(x_TH.numpy(), score_P.view(expert_TK.shape).numpy(), y_PH, len(block_EN))
    blocks = [block_EN[expert].data_ptr() for expert in wanted]
    lane.submit(call, blocks, first, [p for group in pairs for p in group], packed=packed)
    lane.wait()
    return torch.from_numpy(y_PH)


def _wanted(expert_TK, block_EN, x_TH, score_P, inner: int) -> torch.Tensor:
    """[P,H] in fp64."""
    hidden, out = x_TH.shape[1], []
    for pair, expert in enumerate(expert_TK.flatten().tolist()):
        gate_up, down = block_EN[expert].double().split((2 * inner * hidden, hidden * inner))
        gate, up = (gate_up.view(2, inner, hidden) @ x_TH[pair // expert_TK.shape[1]].double()).unbind()
        acted = torch.nn.functional.silu(gate) * up
        out.append(score_P[pair].double() * (down.view(hidden, inner) @ acted))
    return torch.stack(out)


@pytest.fixture(scope="module", autouse=True)
def _compiled(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        opened.cache_clear()
        yield library()
    opened.cache_clear()


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 4),
    choices=st.integers(1, 3),
    hidden=st.integers(1, 200),
    inner=st.integers(1, 90),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    threads=st.integers(0, 3),
    seed=st.integers(0, 99),
)
def test_as_the_formula(rows, choices, hidden, inner, dtype, threads, seed):
    case = _case(rows, choices, 5, hidden, inner, dtype, seed)
    wanted = [4, 0, 2]
    lane = CpuLane(threads, hidden, inner, dtype)
    y_PH = _computed(lane, *case, wanted)
    lane.close()
    mine_P = torch.isin(case[0].flatten(), torch.tensor(wanted))
    assert y_PH[~mine_P].isnan().all(), "other pairs' rows are not the lane's"
    want_PH = _wanted(*case, inner)
    assert torch.allclose(y_PH[mine_P].double(), want_PH[mine_P], rtol=1e-4, atol=1e-4)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 4),
    choices=st.integers(1, 3),
    hidden=st.integers(1, 6),
    inner=st.integers(1, 5),
    outliers=st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 65535)), max_size=60),
    threads=st.integers(0, 2),
    seed=st.integers(0, 99),
)
def test_packed_blocks_have_the_bits_of_raw_ones(rows, choices, hidden, inner, outliers, threads, seed):
    hidden, inner = 32 * hidden, 32 * inner
    expert_TK, block_EN, x_TH, score_P = _case(rows, choices, 3, hidden, inner, torch.bfloat16, seed)
    size = block_EN.shape[1]
    for place, bits in outliers[: size // 256]:  # many of them infinite, subnormal or not a number
        block_EN[place % 3].view(torch.int16)[place % size] = bits - (bits >> 15 << 16)
    packed_ES = torch.zeros(3, PackedBlock(size).stride, dtype=torch.uint8)
    assert all(pack_into(*blocks) for blocks in zip(block_EN, packed_ES, strict=True))
    lane = CpuLane(threads, hidden, inner, torch.bfloat16)
    raw, packed = (
        _computed(lane, expert_TK, blocks, x_TH, score_P, [2, 0, 1], packed=blocks is packed_ES)
        for blocks in (block_EN, packed_ES)
    )
    lane.close()
    # Which of two NaN a sum passes on depends on the order in which the compiler has its operands.
    raw, packed = (torch.where(y_PH.isnan(), torch.nan, y_PH) for y_PH in (raw, packed))
    assert torch.equal(raw.view(torch.int32), packed.view(torch.int32))


def test_threads_and_company_do_not_reach_the_bits():
    case = _case(3, 3, 6, 130, 70, torch.bfloat16, 0)
    lanes = [CpuLane(threads, 130, 70, torch.bfloat16) for threads in (0, 1, 3)]
    alone = _computed(lanes[0], *case, [1])
    for _ in range(200):  # calls that follow each other closely: a thread may come late to any of them
        for lane in lanes:
            both = _computed(lane, *case, [5, 1])
            mine_P = case[0].flatten() == 1
            assert torch.equal(both[mine_P], alone[mine_P])
    for lane in lanes:
        lane.close()


def _printed(name: str, tmp_path: Path, *flags: str) -> str:
    source, made = Path(__file__).with_name(name), tmp_path / "made"
    include = f"-I{Path(cpu_lane.__file__).parent}"
    command = [
        shutil.which("cc") or "gcc",
        "-O2",
        "-march=native",
        *flags,
        "-pthread",
        include,
        source,
        "-o",
        made,
        "-lm",
    ]
    subprocess.run(command, check=True, timeout=60)
    return subprocess.run([made], capture_output=True, text=True, timeout=60, check=False).stdout


@pytest.mark.parametrize("without", [(), ("avx512vbmi",), ("avx512f",), ("avx512f", "avx2")], ids="-".join)
def test_packed_rows_have_the_bits_of_raw_ones_on_other_processors(tmp_path, without):
    if without and platform.machine() != "x86_64":
        pytest.skip("these are x86's")
    said = _printed("packed_lane.c", tmp_path, "-O3", *(f"-mno-{feature}" for feature in without))
    assert said == "0 differ, 0 of the weights\n"


def test_threads_may_be_late_anywhere(tmp_path):
    assert _printed("late_lane.c", tmp_path) == "0 wrong\n"


def test_a_thread_that_hangs_is_given_up(tmp_path):
    assert _printed("hung_lane.c", tmp_path) == "0 -2 -2 -2 closed\n"


def test_a_call_that_does_not_end_is_named(monkeypatch):
    expert_TK, block_EN, x_TH, score_P = _case(1, 2, 9, 8, 8, torch.float32, 0)
    lane = CpuLane(1, 8, 8, torch.float32, limit_s=7)
    score_TK, y_PH = score_P.view(expert_TK.shape).numpy(), np.zeros((2, 8), np.float32)
    call = LaneCall(x_TH.numpy(), score_TK, y_PH, 2, lambda layer, experts: ("blocks", layer, experts))
    monkeypatch.setattr(cpu_lane, "_lost_calls", [])
    for _ in range(2):
        lane.submit(call, [block_EN[expert].data_ptr() for expert in (3, 8)], [0, 1, 2], [0, 1], (5, [3, 8]))
    monkeypatch.setattr(lane, "_library", SimpleNamespace(lane_wait=lambda _: -2, lane_close=lambda _: None))
    with pytest.raises(LaneHung, match=r"\(1 threads .* layer 5 \(L05.E003, L05.E008\) within 7 s"):
        lane.wait()
    with pytest.raises(LaneHung, match="layer 5"):
        lane.submit(call, [], [0], [])
    assert cpu_lane._lost_calls == [(call, ("blocks", 5, [3, 8]))], "what its thread may read is kept, and once"
    monkeypatch.undo()
    lane.close()


def test_a_thread_that_hangs_when_the_lane_is_closed_may_go_on(monkeypatch):
    lost = []
    monkeypatch.setattr(cpu_lane, "_lost_calls", lost)
    compiled = CompiledExperts(1, 8, 8, torch.float32, 128)
    block_N = torch.zeros(192)
    work = [(HostExpert(block_N[:128].view(16, 8), block_N[128:].view(8, 8)), slice(0, 1))]
    compiled.submit(work, torch.zeros(1, 8), torch.zeros(1, 8))
    real = library()
    said = SimpleNamespace(lane_wait=lambda lane: real.lane_wait(lane) or -2, lane_close=real.lane_close)
    monkeypatch.setattr(compiled.lane, "_library", said)
    compiled.close()
    ((_, kept),) = lost
    assert kept is work


def test_a_lane_that_ended_its_call_keeps_nothing(monkeypatch):
    monkeypatch.setattr(cpu_lane, "_lost_calls", [])
    lane = CpuLane(1, 8, 8, torch.float32)
    _computed(lane, *_case(1, 1, 1, 8, 8, torch.float32, 0), [0])
    lane.close()
    assert cpu_lane._lost_calls == []
    assert lane._call is None


def test_down_may_begin_behind_a_gap():
    expert_TK, block_EN, x_TH, score_P = _case(2, 2, 3, 10, 6, torch.bfloat16, 0)
    gap_EN = torch.cat([block_EN[:, :120], torch.full((3, 8), torch.nan).bfloat16(), block_EN[:, 120:]], dim=1)
    lane = CpuLane(1, 10, 6, torch.bfloat16, down_start=128)
    y_PH = _computed(lane, expert_TK, gap_EN.contiguous(), x_TH, score_P, [0, 1, 2])
    lane.close()
    assert torch.allclose(y_PH.double(), _wanted(expert_TK, block_EN, x_TH, score_P, 6), rtol=1e-4, atol=1e-4)


def test_nothing_to_do():
    lane = CpuLane(1, 8, 8, torch.float32)
    case = _case(1, 1, 1, 8, 8, torch.float32, 0)
    assert _computed(lane, *case, []).isnan().all()
    lane.close()
    lane.close()


@pytest.mark.parametrize("threads", [0, 2])
def test_calls_are_counted_also_without_experts(threads):
    count, block_N = np.zeros(1, np.int64), torch.ones(192)
    call = LaneCall(*(np.ones((1, n), np.float32) for n in (8, 1, 8)), experts=1, count=count)
    lane = CpuLane(threads, 8, 8, torch.float32)
    for calls, blocks in enumerate(([], [block_N.data_ptr()], [], []), start=1):
        lane.submit(call, blocks, [*range(len(blocks) + 1)], [*range(len(blocks))])
        lane.wait()
        assert count[0] == calls
    lane.close()


def test_a_lane_without_all_of_its_threads_is_refused(tmp_path, monkeypatch):
    assert _printed("short_lane.c", tmp_path) == "refused, 2 ended, opened\n"
    monkeypatch.setattr(cpu_lane, "library", lambda: SimpleNamespace(lane_open=lambda *_: None))
    with pytest.raises(LaneError, match=r"could not start 3 threads, .*ulimit -u"):
        CpuLane(3, 8, 8, torch.float32)


def test_what_it_cannot_read_is_refused():
    with pytest.raises(LaneError, match="float16"):
        CpuLane(1, 8, 8, torch.float16)


def test_no_compiler_is_said(monkeypatch):
    monkeypatch.setenv("PATH", "")
    opened.cache_clear()
    with pytest.raises(LaneError, match=r"no C compiler.* computes no experts"):
        CpuLane(1, 8, 8, torch.float32)
    opened.cache_clear()


def test_a_compiler_that_fails_is_tried_once(monkeypatch, tmp_path):
    compiler, tried = tmp_path / "cc", tmp_path / "tried"
    compiler.write_text(f"#!/bin/sh\necho again >> {tried}\necho cannot >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    opened.cache_clear()
    for _ in range(2):
        with pytest.raises(NativeError, match=r"could not compile .*cpu_lane\.c.*: cannot"):
            library()
    assert tried.read_text() == "again\n"
    opened.cache_clear()


def test_a_cache_folder_that_cannot_be_written_is_said(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    opened.cache_clear()
    with pytest.raises(LaneError, match=r"Not a directory: .*file.* computes no experts"):
        CpuLane(1, 8, 8, torch.float32)
    opened.cache_clear()


def test_an_interrupt_between_two_callers_counts_leaves_each_its_own(monkeypatch):
    expert_TK, block_EN, x_TH, score_P = _case(1, 1, 9, 8, 8, torch.float32, 0)
    lane = CpuLane(1, 8, 8, torch.float32)
    score_TK, counts = score_P.view(expert_TK.shape).numpy(), [np.zeros(1, np.int64) for _ in range(2)]
    calls = [LaneCall(x_TH.numpy(), score_TK, np.zeros((1, 8), np.float32), 1, count=count) for count in counts]

    def submit(call):
        lane.submit(call, [block_EN[3].data_ptr()], [0, 1], [0])
        lane.wait()

    def interrupted(*args):
        library().lane_count(*args)
        raise KeyboardInterrupt

    submit(calls[0])
    names = {name: getattr(library(), name) for name in ("lane_submit", "lane_wait", "lane_close")}
    with monkeypatch.context() as patched:
        patched.setattr(lane, "_library", SimpleNamespace(**names, lane_count=interrupted))
        with pytest.raises(KeyboardInterrupt):
            submit(calls[1])
    submit(calls[0])
    submit(calls[1])
    assert [int(count[0]) for count in counts] == [2, 1]
    lane.close()


@pytest.mark.parametrize("left", [0, 5000, -1])
def test_a_damaged_library_is_compiled_again(tmp_path, monkeypatch, left):
    """Loading one that lacks its end kills the process."""
    source = tmp_path / "one.c"
    source.write_text("int one(void) { return 1; }")
    monkeypatch.setattr(native, "_SOURCES", (source,))
    monkeypatch.setattr(native, "_SIGNATURES", {"one": (ctypes.c_int, [])})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert native._compiled().one() == 1
    (made,) = tmp_path.glob("planaria/*.so")
    content = made.read_bytes()
    made.unlink()  # the first is still mapped
    made.write_bytes(content[:left])
    assert native._compiled().one() == 1
    assert native._whole(made)


def test_what_the_compiler_made_and_cannot_be_loaded_is_told(tmp_path, monkeypatch):
    source = tmp_path / "one.c"
    source.write_text("int one(void) { return 1; }")
    monkeypatch.setattr(native, "_SOURCES", (source,))
    monkeypatch.setattr(native, "_SIGNATURES", {"two": (ctypes.c_int, [])})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(NativeError, match=r"cannot be loaded: .*two"):
        native._compiled()
    assert not list(tmp_path.glob("planaria/*.so")), "the next start tries again"


def test_without_a_home_there_is_no_lane_but_a_reason(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(native.Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home directory")))
    assert native.opened.__wrapped__() == "no home directory"
