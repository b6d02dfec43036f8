"""Computing experts on the CPU: every kernel and every cut against float64."""

from __future__ import annotations

import itertools
import threading

import pytest
import torch
from torch.nn.functional import silu

from inference.compiled_experts import COMPILED, CompiledExperts, compiled_kernels
from inference.costmodel import KernelTable, Timing
from inference.cpu_experts import KERNELS, CpuExperts, expert_rows, kernels_for
from inference.expert_block import ExpertBlock, ExpertShape
from inference.host_expert import HostExpert, PackedExpert
from inference.packed import PackedBlock
from inference.packing import pack_into
from moe.form import PLAIN, ExpertForm

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def gated(gate, up):
    return silu(gate) * up


class Weights:
    """Random experts, as views of larger tensors."""

    def __init__(self, dtype, hidden, intermediate, experts=6):
        torch.manual_seed(hidden + intermediate)
        scale = hidden**-0.5
        self.gate_up_E2IH = (torch.randn(experts, 2 * intermediate, hidden) * scale).to(dtype)
        self.down_EHI = (torch.randn(experts, hidden, intermediate) * intermediate**-0.5).to(dtype)

    def __call__(self, layer, expert):
        assert layer == 3
        return HostExpert(self.gate_up_E2IH[expert], self.down_EHI[expert])

    def exact(self, expert, x_RH):
        gate_IH, up_IH = self.gate_up_E2IH[expert].double().chunk(2)
        down_HI = self.down_EHI[expert].double()
        x_RH = x_RH.double()
        return gated(x_RH @ gate_IH.t(), x_RH @ up_IH.t()) @ down_HI.t()


def table(kernel="linear"):
    return KernelTable((Timing(kernel, 1, 1, 1.0),))


@pytest.fixture
def opened():
    """Makes CpuExperts, and closes them."""
    made = []

    def make(*arguments):
        made.append(CpuExperts(*arguments))
        return made[-1]

    yield make
    for one in made:
        one.close()


def assert_close(y_RH, exact_RH, dtype):
    assert y_RH.dtype == torch.float32
    assert (y_RH - exact_RH).norm() <= TOLERANCE[dtype] * exact_RH.norm()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("rows", "hidden", "intermediate"), [(1, 64, 32), (3, 97, 131), (17, 200, 257)])
def test_every_kernel_is_close_to_float64(dtype, kernel, rows, hidden, intermediate):
    weights = Weights(dtype, hidden, intermediate)
    x_RH = torch.randn(rows, hidden).to(dtype)
    y_RH = expert_rows(KERNELS[kernel], gated, weights(3, 1), x_RH, slice(0, intermediate))
    assert_close(y_RH, weights.exact(1, x_RH), dtype)


@pytest.mark.parametrize(
    "form", [PLAIN, ExpertForm(transposed=True, interleaved=True, limit=7.0)], ids=["plain", "gpt_oss"]
)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_layout_gives_the_same_expert(opened, form, biased, kernel):
    weights = Weights(torch.float32, 40, 300)
    gate_up_2IH, down_HI = weights.gate_up_E2IH[2], weights.down_EHI[2]
    biases = (torch.randn(600), torch.randn(40)) if biased else ()
    parts = (gate_up_2IH, down_HI, *biases)
    if form.interleaved:
        order = torch.arange(600).view(2, 300).t().reshape(-1)
        parts = (
            gate_up_2IH[order].t().contiguous(),
            down_HI.t().contiguous(),
            *(b[order] for b in biases[:1]),
            *biases[1:],
        )
    x_RH = torch.randn(3, 40)
    h_R2I, down_bias = x_RH.double() @ gate_up_2IH.double().t(), 0
    if biased:
        h_R2I, down_bias = h_R2I + biases[0], biases[1]
    exact_RH = gated(*h_R2I.chunk(2, -1)) @ down_HI.double().t() + down_bias
    cpu = opened(lambda layer, expert: HostExpert.of_parts(parts, form), gated, table(kernel), 2)
    assert len(cpu._columns(300, 1)) == 2
    assert_close(cpu.submit(3, [(2, 3)], x_RH).result(), exact_RH, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_call_gives_each_row_its_own_expert(opened, dtype, threads):
    weights = Weights(dtype, 65, 391)  # in float32 three parts would have 130 or 131 columns
    work = [(4, 2), (0, 1), (5, 7)]
    x_NH = torch.randn(10, 65).to(dtype)
    y_NH = opened(weights, gated, table(kernels_for(dtype)[-1]), threads).submit(3, work, x_NH).result()
    exact_NH = torch.cat([weights.exact(e, x) for (e, _), x in zip(work, x_NH.split([2, 1, 7]), strict=True)])
    for y_H, exact_H in zip(y_NH, exact_NH, strict=True):
        assert_close(y_H, exact_H, dtype)


def test_one_expert_is_cut_so_that_no_worker_is_idle_and_parts_stay_large(opened):
    cpu = opened(Weights(torch.float32, 8, 1024), gated, table(), 4)
    assert [c.stop - c.start for c in cpu._columns(1024, 1)] == [256] * 4
    assert [c.stop - c.start for c in cpu._columns(1024, 3)] == [512] * 2
    assert cpu._columns(1024, 4) == [slice(0, 1024)]
    assert len(cpu._columns(130, 1)) == 1
    cut = cpu._columns(515, 1)
    assert (cut[0].start, cut[-1].stop) == (0, 515)
    assert all(a.stop == b.start for a, b in itertools.pairwise(cut))


def test_results_repeat_bit_for_bit_and_land_where_asked(opened):
    cpu = opened(Weights(torch.bfloat16, 64, 512), gated, table("rows"), 3)
    x_NH = torch.randn(5, 64).bfloat16()
    out_NH = torch.full((5, 64), float("nan"))
    first = cpu.submit(3, [(0, 4), (2, 1)], x_NH, out_NH).result()
    assert first.data_ptr() == out_NH.data_ptr()
    for _ in range(5):
        assert torch.equal(cpu.submit(3, [(0, 4), (2, 1)], x_NH).result(), first)


def test_rows_do_not_depend_on_what_else_is_in_the_call(opened):
    """With one kernel and the same cut, an expert's rows are the same whatever other experts compute."""
    cpu = opened(Weights(torch.float32, 64, 96), gated, table(), 2)
    x_NH = torch.randn(5, 64)
    both = cpu.submit(3, [(0, 4), (2, 1)], x_NH).result()
    assert torch.equal(cpu.submit(3, [(2, 1)], x_NH[4:]).result(), both[4:])


def test_the_table_chooses_the_kernel(opened, monkeypatch):
    used = []
    spied = {n: lambda x, w, n=n, f=f: used.append(n) or f(x, w) for n, f in KERNELS.items()}
    monkeypatch.setattr("inference.cpu_experts.KERNELS", spied)
    measured = KernelTable(
        (Timing("rows", 1, 1, 1.0), Timing("rows", 1, 8, 8.0), Timing("upcast", 1, 1, 3.0), Timing("upcast", 1, 8, 3.0))
    )
    cpu = opened(Weights(torch.bfloat16, 64, 32), gated, measured, 1)
    cpu.submit(3, [(0, 1), (1, 8)], torch.randn(9, 64).bfloat16()).result()
    assert used == ["rows"] * 2 + ["upcast"] * 2, "gate and up are one product"


@pytest.mark.skipif(not compiled_kernels(torch.float32), reason="no C compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_compiled_kernel_takes_what_lies_in_blocks_and_leaves_the_rest(opened, dtype):
    """Few rows of experts in blocks are the compiled kernel's; many rows, and experts in parts, are torch's."""
    hidden, inner = 70, 150
    weights = Weights(dtype, hidden, inner)
    size = 3 * hidden * inner
    blocks_EN = torch.cat([weights.gate_up_E2IH.flatten(1), weights.down_EHI.flatten(1)], 1)
    assert blocks_EN.shape[1] == size

    def where(layer, expert):
        if expert == 5:
            return weights(layer, expert)
        gate_up_N, down_N = blocks_EN[expert].tensor_split([2 * hidden * inner])
        return HostExpert(gate_up_N.view(-1, hidden), down_N.view(hidden, -1))

    measured = KernelTable(
        (
            Timing(COMPILED, 2, 1, 1.0),
            Timing(COMPILED, 2, 8, 8.0),
            Timing("linear", 2, 1, 2.0),
            Timing("linear", 2, 8, 2.0),
        )
    )
    compiled = CompiledExperts(2, hidden, inner, dtype, 2 * hidden * inner)
    taken = []
    submit = compiled.submit
    compiled.submit = lambda work, *rest: taken.append([rows for _, rows in work]) or submit(work, *rest)
    cpu = opened(where, gated, measured, 2, 1, compiled)
    work = [(0, 1), (4, 8), (5, 1), (2, 2)]
    x_NH = torch.randn(12, hidden).to(dtype)
    for _ in range(3):
        y_NH = cpu.submit(3, work, x_NH).result()
    assert taken == [[slice(0, 1), slice(10, 12)]] * 3
    exact_NH = torch.cat([weights.exact(e, x) for (e, _), x in zip(work, x_NH.split([1, 8, 1, 2]), strict=True)])
    for y_H, exact_H in zip(y_NH, exact_NH, strict=True):
        assert_close(y_H, exact_H, dtype)
    assert measured.best(1, 2, without=COMPILED).kernel == "linear"
    assert KernelTable((Timing(COMPILED, 2, 1, 1.0),)).best(1, 2, without=COMPILED).kernel == "linear"


@pytest.mark.skipif(not compiled_kernels(torch.bfloat16), reason="no C compiler")
@pytest.mark.parametrize("form", [PLAIN, ExpertForm(transposed=True, interleaved=True)], ids=["plain", "gpt_oss"])
@pytest.mark.parametrize("kernel", [COMPILED, "linear", "rows", "upcast"])
def test_packed_experts_give_the_same_bits(opened, form, kernel):
    """Whole and in parts whose columns are not whole groups; and by the compiled kernel where it can."""
    layout = ExpertBlock(ExpertShape(3, 64, 672, form), torch.bfloat16)
    blocks_EB = (torch.randn(3, layout.elements) / 8).bfloat16()
    blocks_EB[:, ::999] *= 2.0**-30
    packed_EN = torch.zeros(3, PackedBlock(layout.elements).stride, dtype=torch.uint8)
    assert all(map(pack_into, blocks_EB, packed_EN))
    measured = KernelTable((Timing(kernel, 5, 1, 1.0), Timing("linear", 5, 1, 2.0)))
    results, took = [], []
    for weights in (
        lambda _, expert: HostExpert.of_parts(layout.split(blocks_EB[expert]), form),
        lambda _, expert: PackedExpert(packed_EN[expert], layout),
    ):
        compiled = CompiledExperts(1, 64, 672, torch.bfloat16, layout.parts[1].start)
        submit = compiled.submit
        compiled.submit = lambda work, *rest, submit=submit: took.append(len(work)) or submit(work, *rest)
        cpu = opened(weights, gated, measured, 5, 1, compiled)
        x_NH = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
        results.append(cpu.submit(0, [(2, 3)], x_NH[:3]).result())
        results.append(cpu.submit(0, [(2, 3), (0, 1)], x_NH).result())
    assert [columns.stop for columns in cpu._columns(672, 1)] == [134, 268, 403, 537, 672]
    assert took == ([1, 2] * 2 if kernel == COMPILED and form == PLAIN else [])
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[1], results[3])
    assert results[0].isfinite().all()


def test_a_call_may_have_packed_experts_and_others(opened):
    """Their layer's bank may become ready while the call is put together."""
    layout = ExpertBlock(ExpertShape(2, 32, 32), torch.bfloat16)
    block_B = (torch.randn(layout.elements) / 8).bfloat16()
    packed_N = torch.zeros(PackedBlock(layout.elements).stride, dtype=torch.uint8)
    assert pack_into(block_B, packed_N)
    stored = [HostExpert.of_parts(layout.split(block_B), PLAIN), PackedExpert(packed_N, layout)]
    compiled = CompiledExperts(1, 32, 32, torch.bfloat16, layout.parts[1].start)
    cpu = opened(lambda _, expert: stored[expert], gated, table(COMPILED), 1, 1, compiled)
    one, other = cpu.submit(0, [(0, 1), (1, 1)], torch.ones(2, 32)).result()
    torch.testing.assert_close(one, other, rtol=2e-2, atol=1e-2)


def test_teams_share_the_threads(opened):
    seen = []

    def watched(gate, up):
        seen.append(torch.get_num_threads())
        return gated(gate, up)

    weights = Weights(torch.float32, 64, 640)
    cpu = opened(weights, watched, table(), 5, 2)
    assert cpu.workers == 2
    assert len(cpu._columns(640, 1)) == 2
    x_RH = torch.randn(3, 64)
    assert_close(cpu.submit(3, [(1, 3)], x_RH).result(), weights.exact(1, x_RH), torch.float32)
    assert set(seen) == {2}


def test_workers_compute_on_one_thread_and_leave_the_callers_count_alone(opened):
    torch.set_num_threads(2)
    try:
        seen = []

        def watched(gate, up):
            seen.append((torch.get_num_threads(), threading.current_thread().name))
            return gated(gate, up)

        cpu = opened(Weights(torch.float32, 64, 32), watched, table(), 2)
        cpu.submit(3, [(e, 1) for e in range(6)], torch.randn(6, 64)).result()
        assert {count for count, _ in seen} == {1}
        assert all(name.startswith("cpu-expert") for _, name in seen)
        assert torch.get_num_threads() == 2
        later = []
        thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert later == [2], "threads that start later must not inherit the workers' count"
    finally:
        torch.set_num_threads(1)


def test_a_workers_error_reaches_the_caller(opened):
    def broken(gate, up):
        raise RuntimeError("no such activation")

    cpu = opened(Weights(torch.float32, 64, 32), broken, table(), 1)
    with pytest.raises(RuntimeError, match="no such activation"):
        cpu.submit(3, [(0, 1)], torch.randn(1, 64)).result()


def test_no_work_is_no_rows(opened):
    cpu = opened(Weights(torch.float32, 64, 32), gated, table(), 1)
    assert cpu.submit(3, [], torch.zeros(0, 64)).result().shape == (0, 64)
