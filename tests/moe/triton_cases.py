"""The Triton kernels against the reference and torch's: on a GPU if there is one, else interpreted on the CPU.

Run by test_triton.py in a process of its own: whether kernels are interpreted is settled as triton is imported.
"""

import dataclasses
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from moe.form import PLAIN, ExpertForm
from moe.kernels import activation
from tests.moe import rotary_case
from tests.moe.layers import Case, compare, run

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="session", autouse=True)
def _scalars_of_new_numpy():
    """Triton 3.6 interprets a loop's bound as int(array of one element), which NumPy has refused since 2.4."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched
    yield
    interpreter._patch_lang_tensor = patch


SMALL = Case(hidden=24, inner=20, dtype=torch.float32, device=DEVICE)
CASES = {
    "odd sizes": dataclasses.replace(SMALL, hidden=21, inner=13),
    "several tiles": dataclasses.replace(SMALL, tokens=60, hidden=70, inner=66, num_experts=2, top_k=1),
    "empty experts": dataclasses.replace(SMALL, choices=[1, 4]),
    "one token": dataclasses.replace(SMALL, tokens=1, top_k=1),
    "no tokens": dataclasses.replace(SMALL, tokens=0),
    "choices elsewhere": dataclasses.replace(SMALL, choices=[0, 1, 2, 4, -1, -1], top_k=3),
    "all choices elsewhere": dataclasses.replace(SMALL, choices=[-1, -1]),
}  # fmt: skip


@pytest.fixture
def interpreter(monkeypatch):
    """On a GPU the probe allows bfloat16 only; these comparisons are in fp32."""
    monkeypatch.setattr("moe.kernels.backend._interpreted", lambda: True)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("name", CASES)
def test_triton_equals_the_reference_with_gradients(name):
    compare(CASES[name], "triton", tolerance=5e-6)


@pytest.mark.usefixtures("interpreter")
def test_two_runs_are_bitwise_equal_and_a_kept_graph_stays():
    experts, x, weights, index = CASES["several tiles"].build("triton")
    inputs = (x, weights, *experts.parameters())
    out = run(experts, x, weights, index)
    first = torch.autograd.grad(out.sum(), inputs, retain_graph=True)
    second = torch.autograd.grad(out.sum(), inputs)
    third = torch.autograd.grad(run(experts, x, weights, index).sum(), inputs)
    for again in (second, third):
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("inner", [5, 300])
def test_elementwise_kernels_equal_torch(inner):
    from moe.kernels import elementwise

    draw = torch.Generator().manual_seed(0)
    h, da = torch.randn(7, 2 * inner, generator=draw), torch.randn(7, inner, generator=draw)
    weights, pair = torch.rand(4, 5, generator=draw)[:, 1:4], torch.randperm(12, generator=draw)[:7]
    h, da, weights, pair = h.to(DEVICE), da.to(DEVICE), weights.to(DEVICE), pair.to(DEVICE)
    score = weights.flatten()[pair]
    torch.testing.assert_close(elementwise.scaled(h, weights, pair), activation.scaled(h, score, PLAIN))
    dh, want_dh = h.clone(), torch.empty_like(h)
    want_a, want_ds = activation.scaled_backward(da.clone(), h, score, PLAIN, want_dh)
    ds = torch.empty_like(score)
    elementwise.scaled_backward(da, dh, weights, pair, dh, ds)  # over h itself
    for got, want in ((da, want_a), (ds, want_ds), (dh, want_dh)):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_gather_sum_leaves_out_what_is_elsewhere():
    from moe.kernels.elementwise import gather_sum

    y = torch.arange(12.0, device=DEVICE).view(4, 3)
    slot = torch.tensor([[0, 3], [4, 1], [4, 4]], device=DEVICE)
    want = torch.stack([y[0] + y[3], y[1], torch.zeros(3, device=DEVICE)])
    assert torch.equal(gather_sum(y, slot, 4), want)


def test_every_pair_is_in_exactly_one_tile():
    from moe.kernels.products import tile_table

    for counts in ([0, 5, 0, 33, 1], [0, 0, 0], [16, 32, 16], [39]):
        table = tile_table(torch.tensor(counts), sum(counts), 16)
        seen = []
        for expert, start in zip(table.expert_P.tolist(), table.start_P.tolist(), strict=True):
            if expert >= 0:
                seen += range(start, min(start + 16, int(table.end_L[expert])))
        assert sorted(seen) == list(range(sum(counts)))


@pytest.mark.usefixtures("interpreter")
def test_other_forms_are_refused():
    from moe.kernels.backend import BackendError

    for case in (dataclasses.replace(SMALL, biased=True), dataclasses.replace(SMALL, form=ExpertForm(transposed=True))):
        with pytest.raises(BackendError, match="plain silu experts only"):
            run(*case.build("triton"))


@pytest.mark.parametrize(
    ("shape", "keys", "first"), [((3, 2), 4, 0), ((150, 8), 70, 70), ((0, 2), 3, 0), ((1, 1), 1, 5), ((64, 4), 2, -1)]
)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int16])
def test_pairs_are_sorted_as_torch_sorts_them(shape, keys, first, dtype):
    from moe.assignment import sort_pairs
    from moe.kernels import sorting

    index = torch.randint(first - 1, first + keys + 2, shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    want = sort_pairs(index, keys, first)  # on a CPU by torch
    pair_S, slot_S, counts_L, ends_L = (t.cpu() for t in sorting.sort_pairs(index.to(DEVICE), first, keys))
    assert torch.equal(ends_L, want.ends_L)
    assert torch.equal(counts_L, want.counts_L)
    assert torch.equal(slot_S, want.slot_RK.flatten())
    here = int(counts_L.sum())
    assert torch.equal(pair_S[:here], want.pair_S[:here])


def test_sorting_sums_up_more_blocks_than_fit_at_once(monkeypatch):
    from moe.kernels import sorting

    monkeypatch.setattr(sorting, "_BLOCKS", 16)
    index = torch.randint(0, 3, (20 * 128 + 5,), generator=torch.Generator().manual_seed(1))
    pair_S, slot_S, counts_L, _ = (t.cpu() for t in sorting.sort_pairs(index.view(-1, 1).to(DEVICE), 0, 3))
    assert torch.equal(pair_S, index.argsort(stable=True))
    assert torch.equal(slot_S[pair_S], torch.arange(index.numel()))
    assert torch.equal(counts_L, index.bincount(minlength=3))


def test_rows_are_spread_to_their_places_and_sums_begin_with_their_base():
    from moe.kernels import elementwise

    draw = torch.Generator().manual_seed(0)
    x, base = torch.randn(3, 37, generator=draw), torch.randn(3, 37, generator=draw)
    slot, ends = torch.tensor([[0, 5], [3, 2], [5, 1]]), torch.tensor([2, 2, 5], dtype=torch.int32)
    out = torch.zeros(6, 37, device=DEVICE)
    elementwise.spread(x.to(DEVICE), slot.to(DEVICE), ends.to(DEVICE), out)
    assert torch.equal(out.cpu(), torch.cat([x[[0, 2, 1, 1]], torch.zeros(2, 37)]))
    fewer = torch.zeros(6, 37, device=DEVICE)
    elementwise.spread(x.to(DEVICE), slot.to(DEVICE), ends.to(DEVICE), fewer[:2])
    assert torch.equal(fewer.cpu(), torch.cat([out.cpu()[:2], torch.zeros(4, 37)]))
    got = elementwise.gather_sum(out[:5], slot.to(DEVICE), 5, base.to(DEVICE))
    torch.testing.assert_close(got.cpu(), base + out.cpu()[slot].sum(1))


@pytest.mark.parametrize(
    ("scratch", "how"),
    [(0, ("in C", 5, 1, 1, 7, "f", False, True, None, None, "m", None, None, None)),
     (128, ("again", 5, 1, 1, 7, "f", "m", None, None, None))],
)  # fmt: skip
def test_a_launch_is_repeated_only_for_what_it_was_compiled_for(scratch, how, monkeypatch):
    from triton import knobs

    from moe.kernels import launching

    done, stream = [], 7

    class Run:  # as Triton's CudaLauncher
        global_scratch_size, profile_scratch_size = scratch, 0
        launch_cooperative_grid, launch_pdl = False, True

        def launch(self, *args):
            done.append(("in C", *args))

        def __call__(self, *args):
            done.append(("again", *args))

    compiled = SimpleNamespace(run=Run(), function="f", packed_metadata="m")

    class Kernel:
        params = tuple(SimpleNamespace(is_constexpr=constant) for constant in (False, False, True))

        def __getitem__(self, grid):
            return lambda *args, **options: done.append("first") or compiled

    monkeypatch.setattr(launching, "is_quick", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: stream, raising=False)
    quick, x = launching.Quick(Kernel()), torch.zeros(64)
    arguments = [(x, 1, 8), (x, 16, 8), (x, 2, 8), (x, 1 << 40, 8), (x[1:], 1, 8), (x.long(), 1, 8), (x, 1, 4)]
    for args in arguments:
        quick[(3, 2)](*args)
    quick[(3, 2)](x, 1, 8, num_warps=1)
    assert done == ["first"] * 8
    done.clear()
    quick[(5,)](x[32:], 48, 8)  # as the second
    assert done == [(*how, *done[0][len(how) :])]
    assert done[0][len(how) + 1 :] == (48, 8)
    monkeypatch.setattr(knobs.runtime.launch_enter_hook, "calls", [print])
    quick[(5,)](x, 48, 8)
    assert done[1:] == ["first"]


def test_repeated_launches_see_their_own_sizes_and_addresses():
    from moe.kernels.elementwise import gather_sum

    memory = torch.arange(600.0, device=DEVICE)
    slot = torch.tensor([[0, 2], [1, 3]], device=DEVICE)
    for hidden, start in [(16, 0), (1, 0), (3, 0), (16, 1), (48, 0), (16, 0), (1, 5), (32, 16)]:
        y = memory[start : start + 4 * hidden].view(4, hidden)
        assert torch.equal(gather_sum(y, slot, 4), y[slot].sum(1))


@pytest.mark.parametrize("places", [None, 4, 30])
def test_packed_rows_are_those_of_torch(places, monkeypatch):
    """Of all that travel, or of as many as there are places."""
    from moe import guests
    from moe.assignment import sort_pairs

    draw = torch.Generator().manual_seed(0)
    rows = torch.randn(9, 21, generator=draw), torch.rand(9, 3, generator=draw), torch.randint(0, 8, (9, 3))
    travels = sort_pairs(torch.randint(0, 4, (9, 2), generator=draw), 2)  # 2 and 3 do not travel
    packing, size = guests.Packing((21, 3, 3), (torch.float32, torch.float32, torch.int16)), int(travels.ends_L[-1])
    on_device = tuple(part.to(DEVICE) for part in rows), type(travels)(*(t.to(DEVICE) for t in travels))
    got, size = packing.spread(*on_device, size if places is None else places), min(size, places or size)
    monkeypatch.setattr(guests, "may_be_early", lambda x: False)
    monkeypatch.setattr("moe.kernels.spread.runs_triton", lambda device: False)
    want = packing.spread(rows, travels, size)
    for part, other in zip(packing.views(got[:size].cpu()), packing.views(want), strict=True):
        assert torch.equal(part, other)


@pytest.mark.parametrize(("rows", "others"), [(50, 33), (0, 7), (5, 0), (0, 0)])
@pytest.mark.parametrize(("keys", "top_k"), [(3, 2), (70, 8)])
def test_two_orders_become_the_one_of_all_rows(rows, others, keys, top_k):
    from moe.assignment import join, sort_pairs

    index = torch.randint(-1, keys + 1, (rows + others, top_k), generator=torch.Generator().manual_seed(0))
    index = index.masked_fill(index == 1, 2)  # an expert that nobody chose
    found = [sort_pairs(part.to(DEVICE), keys) for part in (index[:rows], index[rows:], index)]
    first, second, want = (f.assignment(int(f.counts_L.sum())) for f in found)
    got = join(first, second)
    for name in ("pair_N", "slot_RK", "counts_L", "ends_L"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name
    assert got.complete == want.complete


CHOICES = [(40, 3, 2, 3, 1), (70, 8, 70, 2, 0), (0, 2, 3, 2, 1)]


@pytest.mark.parametrize(("tokens", "top_k", "local", "ranks", "rank"), CHOICES)
def test_choices_are_sorted_as_torch_sorts_them(tokens, top_k, local, ranks, rank):
    from moe.copies import DeduplicatedDraft
    from moe.kernels import sorting

    index = torch.rand(tokens, local * ranks, generator=torch.Generator().manual_seed(0)).argsort(1)[:, :top_k]
    want = DeduplicatedDraft.of(index, ranks, local, rank)  # on a CPU by torch
    *found, counts_W2 = sorting.sort_choices(index.to(DEVICE), rank * local, local, ranks)
    for (pair_S, *others), (expected_S, *expected) in zip(found, (want.own, want.travels), strict=True):
        assert all(torch.equal(got.cpu(), other) for got, other in zip(others, expected, strict=True))
        places = int(expected[1].sum())
        assert torch.equal(pair_S.cpu()[:places], expected_S[:places])
    assert torch.equal(counts_W2.cpu(), want.counts_W2)


def test_the_activations_gradient_of_some_pairs_is_written_to_their_places():
    from moe.kernels import elementwise

    draw = torch.Generator().manual_seed(0)
    h, da = torch.randn(9, 2 * 21, generator=draw).to(DEVICE), torch.randn(9, 21, generator=draw).to(DEVICE)
    weights, slot = (
        torch.rand(6, 2, generator=draw).to(DEVICE),
        torch.randperm(12, generator=draw).view(6, 2).to(DEVICE),
    )
    pair = slot.flatten().argsort()[:9]  # three pairs have no place
    want_a, want_dh, want_ds = da.clone(), torch.empty_like(h), da.new_empty(9)
    elementwise.scaled_backward(want_a, h, weights, pair, want_dh, want_ds)
    a, dh, ds = da.clone(), torch.empty_like(h), da.new_empty(9)
    for rows in (slice(0, 2), slice(2, 6)):
        part = slot[rows].flatten()
        own = part.argsort()[: int((part < 9).sum())]
        elementwise.scaled_backward(a, h[part[own]], weights[rows], own, dh, ds, slot[rows])
    assert torch.equal(a, want_a)
    assert torch.equal(dh, want_dh)
    assert torch.equal(ds, want_ds)


@pytest.mark.parametrize("case", rotary_case.cases())
def test_rotary_embedding_has_the_familys_bits(case):
    from transformers.models.qwen3_moe import modeling_qwen3_moe

    rotary_case.compare(modeling_qwen3_moe, case, torch.float16, DEVICE)  # the interpreter does not round bfloat16
