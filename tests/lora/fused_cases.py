"""The fused low-rank kernels against the references: on a GPU if there is one, else interpreted on the CPU, in fp32.

Run by test_fused.py in a process of its own: whether kernels are interpreted is settled as triton is imported.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from lora import expert_grouped, expert_mix, factors, fold, linear, shared_ffn
from lora import fused as fused_module
from lora.config import BankConfig
from lora.factored_fused import FusedDelta
from lora.factors import FactoredDelta
from lora.linear import RoutedLinear
from lora.presets import bank_at
from lora.shared_ffn import Scales, Stacks, mix
from lora.sorted_rows import rows_in_order
from moe.assignment import assign
from moe.context import BatchContext, batch_context
from moe.form import ExpertForm
from tests.lora.test_expert_mix import Case, assert_equal, built, fast, slow

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


@pytest.fixture(autouse=True)
def fused(monkeypatch):
    """The probes allow bfloat16 on a GPU only; these comparisons are in fp32."""
    for module in (factors, fused_module, linear, shared_ffn):
        monkeypatch.setattr(module, "refuses_fused", lambda device, dtype, rank, width=0: None)
    monkeypatch.setattr(expert_mix, "_how", lambda stack: expert_grouped)


def test_every_row_is_in_exactly_one_tile():
    for counts in ([0, 5, 0, 33, 1], [16, 32, 16], [39], [0, 0, 7], [3, 0, 0]):
        by = rows_in_order(torch.tensor(counts, device=DEVICE), sum(counts))
        expert_P, first_P, stop_P = by.table_X[: 3 * by.tiles].view(3, -1).tolist()
        seen = []
        for expert, first, stop in zip(expert_P, first_P, stop_P, strict=True):
            if expert >= 0:
                rows = range(first, min(first + by.rows, stop))
                assert sum(counts[:expert]) <= rows[0] <= rows[-1] < sum(counts[: expert + 1])
                seen += rows
        assert sorted(seen) == list(range(sum(counts)))
        assert by.ends_L.tolist() == torch.tensor(counts).cumsum(0).tolist()


CASES = [Case(routing=routing) for routing in ("even", "skewed", "one token", "no token")]
CASES += [Case(preset=f"expert-lora-{share}", routing="skewed") for share in ("shared", "shared-outer")]
CASES += [Case(targets=(target,), routing="skewed") for target in ("gate_up_proj", "down_proj")]


@pytest.mark.skipif(DEVICE == "cuda", reason="torch has no grouped product of fp32 on a GPU; test_expert_mix_cuda.py")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_experts_match_one_token_at_a_time(monkeypatch, case):
    if case.routing == "skewed":
        monkeypatch.setattr(fold, "KEPT_SHARE", 0.1)  # some pre-activations are computed again
    case = dataclasses.replace(case, dtype=torch.float32)
    experts = built(case)
    got = fast(experts, case)
    assert_equal(got, slow(experts, case), 2e-5)
    again = fast(experts, case)
    assert all(torch.equal(got[name], again[name]) for name in got)


@pytest.mark.skipif(DEVICE == "cuda", reason="torch has no grouped product of fp32 on a GPU")
def test_choices_elsewhere_add_nothing():
    """Under expert parallelism a row's expert may be on another rank; the score of such a choice has no gradient."""
    case = Case(dtype=torch.float32)
    experts = built(case)
    draw = torch.Generator().manual_seed(3)
    x, weights = torch.randn(9, 16, generator=draw), torch.rand(9, 2, generator=draw)
    index = torch.tensor([[0, 6], [6, 1], [2, 3], [6, 6], [5, 0], [1, 6], [4, 2], [6, 3], [0, 1]])
    found = []
    for how in ("fused", "grouped"):
        experts.adapter.way = "split" if how == "fused" else "fold"
        leaves = [t.clone().requires_grad_() for t in (x, weights)]
        experts.zero_grad()
        out = experts.mix(*leaves, assign(index, 6, pairs=int((index < 6).sum())))
        out.sin().sum().backward()
        found.append([out.detach(), *(t.grad for t in leaves), *(p.grad.clone() for p in experts.adapter.parameters())])
    for fused_one, grouped_one in zip(*found, strict=True):
        torch.testing.assert_close(fused_one, grouped_one, rtol=2e-5, atol=2e-5)


def test_a_run_says_which_kernels_its_pairs_take():
    case = Case(dtype=torch.float32)
    assert "Triton kernels" in built(case).backend.reason
    for other in (dataclasses.replace(case, dropout=0.1), dataclasses.replace(case, way="fold")):
        assert "Triton kernels" not in built(other).backend.reason


def _block(tokens: int, hidden: int, inner: int, rank: int, experts: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)

    def one(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=draw) * shape[-1] ** -0.5).to(DEVICE)

    return [
        one(tokens, hidden), one(tokens, inner), one(tokens, inner), torch.rand(tokens, 2, generator=draw).to(DEVICE),
        one(experts, 2 * rank, hidden), one(experts, inner, rank), one(experts, inner, rank),
        one(experts, rank, inner), one(experts, hidden, rank),
    ]  # fmt: skip


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("sizes", [(13, 20, 27, 3), (5, 16, 700, 8), (0, 16, 24, 2)])
def test_feed_forward_blocks_match_one_expert_after_the_other(sizes, dropout, monkeypatch):
    tokens, hidden, inner, rank = sizes
    index_TK = torch.randint(4, (tokens, 2), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    assignment, inputs = assign(index_TK, 5), _block(tokens, hidden, inner, rank, 5)  # expert 4 has nothing
    keep_NI = (torch.rand(2 * tokens, inner, generator=torch.Generator().manual_seed(2)) < 0.6).to(DEVICE)
    found = []
    for choice in ("grouped_mm", "loop"):
        chosen = shared_ffn.choose_backend(torch.device("cpu"), torch.float32)
        monkeypatch.setattr(shared_ffn, "choose_backend", lambda *_, c=chosen, n=choice: dataclasses.replace(c, name=n))
        leaves = [t.clone().requires_grad_() for t in inputs]
        m, d = mix(
            *leaves[:4], Stacks(*leaves[4:]), assignment, ExpertForm(act="silu"), Scales(2.0, 3.0),
            keep_NI if dropout else None,
        )  # fmt: skip
        (m.sin().sum() + d.cos().sum()).backward()
        found.append([m.detach(), d.detach(), *(t.grad for t in leaves)])
    assert not found[0][-1][4:].any()
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


# More groups than torch's grouped product takes; interpreted, fewer.
MANY = [1, 0] * (520 if DEVICE == "cuda" else 20)


@pytest.mark.parametrize(("counts", "onto"), [([3, 0, 40, 2], True), ([70], False), ([0, 0], True), (MANY, False)])
def test_deltas_of_sorted_rows_match_the_loop(counts, onto):
    draw = torch.Generator().manual_seed(0)
    rows = sum(counts)
    shapes = [(rows, 9), (rows, 18), (len(counts), 3, 18), (len(counts), 9, 3)]
    inputs = [torch.randn(shape, generator=draw).mul(0.3).to(DEVICE) for shape in shapes]
    upstream, found = torch.randn(rows, 9, generator=draw).to(DEVICE), []
    for fused_one in (True, False):
        leaves = [t.clone().requires_grad_() for t in inputs]
        y, x, a, b = leaves
        if fused_one:
            counts_L = torch.tensor(counts, device=DEVICE)
            out = FusedDelta.apply(y * 1 if onto else None, x, a, b, counts_L, 1.5)
        else:
            out = FactoredDelta.apply(x, a, b, counts, 1.5) + (y if onto else 0)
        (out + 0 * y).backward(upstream)
        found.append([out.detach(), *(t.grad for t in leaves)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_what_is_not_a_number_stays_in_its_group():
    x = torch.randn(12, 16, device=DEVICE)
    x[4] = torch.nan
    a, b = torch.randn(3, 2, 16, device=DEVICE).requires_grad_(), torch.randn(3, 16, 2, device=DEVICE).requires_grad_()
    out = FusedDelta.apply(None, x, a, b, torch.tensor([4, 4, 4], device=DEVICE), 1.0)
    out.sum().backward()
    assert out.isnan().any(1).nonzero().flatten().tolist() == [4]
    assert a.grad.isnan().flatten(1).any(1).tolist() == [False, True, False]


SOFT = {
    "loramoe": BankConfig("loramoe", num_experts=8, r=4, alpha=8.0),
    "odd widths": BankConfig("molora", num_experts=3, r=3, alpha=5.0),
    "one A": BankConfig("hydralora", num_experts=3, r=4, alpha=8.0, dropout=0.0),
}


def _routed(name: str, trained: bool = True) -> tuple[RoutedLinear, list[Tensor]]:
    torch.manual_seed(0)
    base = torch.nn.Linear(21, 14).requires_grad_(False)
    layer = RoutedLinear(base, bank_at(SOFT[name], 0, 1), "layers.0.up_proj").to(DEVICE)
    for parameter in layer.adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
        parameter.requires_grad_(trained)
    return layer, [torch.randn(37, width).to(DEVICE) for width in (21, 14)]


@pytest.mark.parametrize("name", SOFT)
def test_soft_banks_match_rank_space_behind_the_router(name, monkeypatch):
    found = []
    for refused in (None, "not here"):
        monkeypatch.setattr(linear, "refuses_fused", lambda *_, r=refused: r)
        layer, (x, upstream) = _routed(name)
        gates: list[Tensor] = []
        layer.adapter.observe = gates.append
        x.requires_grad_()
        y = layer(x)
        y.backward(upstream)
        assert ("SoftSpace" in str(y.grad_fn.next_functions) + str(y.grad_fn)) == (refused is None)
        found.append([y.detach(), gates[0].detach(), x.grad, *(p.grad for p in layer.adapter.parameters())])
    for ours, theirs in zip(*found, strict=True):
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)


def test_soft_banks_give_the_input_its_gradient_where_nothing_of_theirs_trains():
    layer, (x, upstream) = _routed("loramoe", trained=False)
    x.requires_grad_()
    layer(x).backward(upstream)
    assert x.grad.abs().sum() > 0
    assert all(p.grad is None for p in layer.adapter.parameters())


def test_soft_banks_whose_gates_have_a_loss_keep_it():
    config = dataclasses.replace(SOFT["odd widths"], balance="switch", router_aux_loss_coef=0.5)
    layer = RoutedLinear(torch.nn.Linear(21, 14), bank_at(config, 0, 1), "layers.0.up_proj").to(DEVICE)
    x = torch.randn(6, 21, device=DEVICE)
    assert not layer.adapter._refuses_fused(x)
    with batch_context(BatchContext(shape=(2, 3), balance=True)):
        assert "loss of their own" in str(layer.adapter._refuses_fused(x))
        layer(x).sum().backward()
    assert layer.adapter.router.weight.grad.abs().sum() > 0  # B is zero: of the balance alone
