"""Adapted experts as one function against one token at a time in fp64: outputs, every gradient, three steps."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lora import expert_grouped, expert_mix, fold
from lora.config import BankConfig
from lora.expert_pairs import masks
from lora.experts import ExpertLoRA, ExpertSlice
from lora.presets import bank_at
from moe.assignment import assign
from moe.experts import Experts
from moe.form import PLAIN, ExpertForm
from tests.lora.reference_expert_lora import reference

HIDDEN, INNER, EXPERTS, TOP_K = 16, 8, 6, 2
GPT_OSS = ExpertForm(transposed=True, interleaved=True, limit=7.0)
PRESETS = ("expert-lora", "expert-lora-shared", "expert-lora-shared-outer")
ROUTINGS = ("even", "skewed", "one token", "no token")


@dataclasses.dataclass(frozen=True)
class Case:
    preset: str = "expert-lora"
    form: ExpertForm = PLAIN
    routing: str = "even"
    way: fold.Way = "auto"
    targets: tuple[str, ...] = ("gate_up_proj", "down_proj")
    dropout: float = 0.0
    dtype: torch.dtype = torch.float64
    r: int = 3


def built(case: Case, seed: int = 0) -> Experts:
    """Frozen experts with an adapter whose every factor is set."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, by: float = 0.4) -> nn.Parameter:
        return nn.Parameter(torch.randn(shape, dtype=torch.float64, generator=generator).mul(by).to(case.dtype))

    transposed = case.form.transposed
    up = draw(EXPERTS, HIDDEN, 2 * INNER) if transposed else draw(EXPERTS, 2 * INNER, HIDDEN)
    down = draw(EXPERTS, INNER, HIDDEN) if transposed else draw(EXPERTS, HIDDEN, INNER)
    biases = {"gate_up_bias": draw(EXPERTS, 2 * INNER), "down_bias": draw(EXPERTS, HIDDEN)} if transposed else {}
    experts = Experts(up, down, case.form, layer=0, **biases)
    experts.requires_grad_(False)
    experts.adapter = ExpertLoRA("a", ExpertSlice(0, EXPERTS, 0, EXPERTS), HIDDEN, INNER)
    bank = BankConfig(case.preset, case.targets, r=case.r, alpha=2.5, dropout=case.dropout)
    for target in case.targets:
        experts.adapter.add(target, bank_at(bank, 0, 1, EXPERTS), dtype=case.dtype)
    for parameter in experts.adapter.parameters():
        parameter.data = draw(*parameter.shape).data
    experts.adapter.way = case.way
    return experts


def problem(case: Case, step: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, index, weights and the upstream gradient."""
    generator = torch.Generator().manual_seed(100 + step)
    tokens = {"one token": 1, "no token": 0}.get(case.routing, 14)
    x, upstream = (torch.randn(tokens, HIDDEN, dtype=torch.float64, generator=generator) for _ in range(2))
    scores = torch.rand(tokens, EXPERTS, generator=generator)
    if case.routing == "skewed":
        scores[:, 2] += 1  # expert 2 has every token, 4 and 5 none
        scores[:, 4:] -= 2
    weights = torch.rand(tokens, TOP_K, dtype=torch.float64, generator=generator)
    return x, scores.topk(TOP_K).indices, weights, upstream


def fast(experts: Experts, case: Case, step: int = 0) -> dict[str, Tensor]:
    """What the experts, wherever they are, make of the problem; on the CPU."""
    x, index, weights, upstream = (t.to(experts.down_proj.device) for t in problem(case, step))
    x, weights, upstream = (t.to(case.dtype) for t in (x, weights, upstream))
    x.requires_grad_()
    weights.requires_grad_()
    experts.zero_grad()
    out = experts(x, index, weights)
    out.backward(upstream)
    found = {"out": out.detach(), "x": x.grad, "weights": weights.grad}
    return {k: t.cpu() for k, t in (found | {n: p.grad for n, p in experts.adapter.named_parameters()}).items()}


def slow(experts: Experts, case: Case, step: int = 0, dropped=None) -> dict[str, Tensor]:
    x, index, weights, upstream = problem(case, step)
    x.requires_grad_()
    weights.requires_grad_()
    factors = {n: p.detach().double().clone().requires_grad_() for n, p in experts.adapter.named_parameters()}
    up, down = (p.detach().double() for p in (experts.gate_up_proj, experts.down_proj))
    transposed = case.form.transposed
    if transposed:
        up, down = up.transpose(1, 2), down.transpose(1, 2)
    biases = tuple(b.detach().double() for b in experts.biases) if transposed else None
    scales = tuple(getattr(getattr(experts.adapter, n, None), "scale", 0.0) for n in ("gate_up_proj", "down_proj"))
    out = reference(x, index, weights, up, down, factors, scales, gpt_oss=transposed, biases=biases, masks=dropped)
    gradients = torch.autograd.grad(out, [x, weights, *factors.values()], upstream, allow_unused=True)
    names = ("x", "weights", *factors)
    everything = [x, weights, *factors.values()]
    zeroed = [torch.zeros_like(t) if g is None else g for t, g in zip(everything, gradients, strict=True)]
    return {"out": out.detach()} | dict(zip(names, zeroed, strict=True))


def assert_equal(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    assert got.keys() == want.keys()
    for name, exact in want.items():
        assert got[name] is not None, name
        assert got[name].shape == exact.shape, name
        error = (got[name].double() - exact).norm()
        assert error <= tolerance * exact.norm(), (name, float(error), float(exact.norm()))


CASES = [Case(preset=preset, routing=routing) for preset in PRESETS for routing in ROUTINGS]
CASES += [Case(preset=preset, routing="skewed", way=way) for preset in PRESETS for way in ("split", "fold")]
CASES += [
    Case(preset=preset, form=GPT_OSS, routing="skewed", way=way) for preset in PRESETS for way in ("auto", "fold")
]
CASES += [Case(targets=("down_proj",)), Case(targets=("gate_up_proj",)), Case(targets=("down_proj",), way="fold")]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_three_steps_match_one_token_at_a_time(case):
    experts, twin = built(case), built(case)
    assert experts.backend.name == "minimal"
    optimizers = [torch.optim.SGD(e.adapter.parameters(), lr=0.01) for e in (experts, twin)]
    for step in range(3):
        got, want = fast(experts, case, step), slow(twin, case, step)
        assert_equal(got, want)
        for name, parameter in twin.adapter.named_parameters():
            parameter.grad = want[name]
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.parametrize("preset", PRESETS)
def test_pieces_equal_the_whole(preset):
    case = Case(preset=preset, routing="skewed")
    experts = built(case)
    whole = fast(experts, case)
    experts.wanted_backend = "grouped_mm"
    assert_equal(fast(experts, case), whole)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.2, 1.0])
@pytest.mark.parametrize("form", [PLAIN, GPT_OSS], ids=["plain", "gpt_oss"])
def test_what_is_not_kept_is_computed_again(monkeypatch, share, form):
    case = Case(form=form, routing="skewed")
    want = slow(built(case), case)
    monkeypatch.setattr(fold, "KEPT_SHARE", share)
    assert_equal(fast(built(case), case), want)


def test_experts_without_tokens_get_gradients_of_zero():
    experts, case = built(Case(routing="skewed")), Case(routing="skewed")
    found = fast(experts, case)
    for name, _ in experts.adapter.named_parameters():
        assert found[name][4:].eq(0).all(), name
        assert found[name][2].abs().min() > 0, name


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_dropout_masks_the_adapters_input_alone_and_alike_in_both_passes(monkeypatch, dropout):
    case = Case(dropout=dropout, routing="skewed")
    experts = built(case)
    monkeypatch.setattr(experts.adapter, "_seed", lambda: 77)
    monkeypatch.setattr(fold, "KEPT_SHARE", 0.15)  # some pre-activations are computed again, with the same mask
    index = problem(case)[1]
    pair_N = assign(index, EXPERTS).pair_N
    drawn = [torch.ones(pair_N.numel(), width, dtype=torch.float64) for width in (HIDDEN, INNER)]
    if dropout:
        counts = assign(index, EXPERTS).counts_L
        drawn = _drawn_by_group(experts, counts)
        assert 0.5 < float(drawn[0].ne(0).double().mean()) < 0.9
        assert float(drawn[0].max()) == pytest.approx(1 / 0.7)
    place = {int(p): n for n, p in enumerate(pair_N)}

    def dropped(t: int, k: int) -> tuple[Tensor, Tensor]:
        at = place[t * TOP_K + k]
        return drawn[0][at], drawn[1][at]

    assert_equal(fast(experts, case), slow(experts, case, dropped=dropped))


def _drawn_by_group(experts: Experts, counts_L: Tensor) -> list[Tensor]:
    """The masks in the order in which the pass asks for them: group by group."""
    from moe.assignment import Assignment
    from moe.kernels.loops import groups

    pairs = int(counts_L.sum())
    assignment = Assignment(torch.arange(pairs), torch.zeros(pairs, 1), counts_L, True)
    keep = fold.kept_rows(pairs, pairs // TOP_K, EXPERTS, HIDDEN, INNER, 6)
    sizes = [group.pairs.stop - group.pairs.start for group in groups(assignment, keep)]
    assert len(sizes) > 1
    like, adapter = torch.empty(0, dtype=torch.float64), experts.adapter
    drawn = []
    for seed, factors, width in ((77, adapter.gate_up_proj, HIDDEN), (78, adapter.down_proj, INNER)):
        draw = masks(factors.pair, seed, like)
        drawn.append(torch.cat([draw(size, width) for size in sizes]))
    return drawn


def test_dropout_follows_the_seed_is_off_in_evaluation_and_forces_split():
    case = Case(dropout=0.5, way="fold")
    experts = built(case)
    assert "split: its dropout" in experts.backend.reason
    torch.manual_seed(1)
    first, second = fast(experts, case), fast(experts, case)
    assert not torch.equal(first["out"], second["out"])
    torch.manual_seed(1)
    assert all(
        torch.equal(again, before) for again, before in zip(fast(experts, case).values(), first.values(), strict=True)
    )
    experts.eval()
    assert_equal(fast(experts, case), slow(experts, case))


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("way", ["split", "fold"])
@pytest.mark.parametrize("form", [PLAIN, GPT_OSS], ids=["plain", "gpt_oss"])
@pytest.mark.parametrize("routing", ["even", "skewed"])
def test_the_grouped_pass_matches_one_token_at_a_time(monkeypatch, preset, way, form, routing):
    """On CPU, where torch runs grouped products in fp32, too; on a GPU it is the only pass for bf16."""
    monkeypatch.setattr(expert_mix, "_how", lambda stack: expert_grouped)
    case = Case(preset=preset, form=form, routing=routing, way=way, dtype=torch.float32)
    experts = built(case)
    assert_equal(fast(experts, case), slow(experts, case), 2e-5)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.24])
def test_the_grouped_pass_computes_again_what_is_not_kept(monkeypatch, share):
    monkeypatch.setattr(expert_mix, "_how", lambda stack: expert_grouped)
    monkeypatch.setattr(fold, "KEPT_SHARE", share)
    case = Case(form=GPT_OSS, routing="skewed", dtype=torch.float32)
    experts = built(case)
    assert_equal(fast(experts, case), slow(experts, case), 2e-5)


def test_the_grouped_pass_drops_as_masks_say(monkeypatch):
    monkeypatch.setattr(expert_mix, "_how", lambda stack: expert_grouped)
    monkeypatch.setattr(fold, "KEPT_SHARE", 0.15)
    case = Case(routing="skewed", dropout=0.3, dtype=torch.float32)
    experts = built(case)
    monkeypatch.setattr(experts.adapter, "_seed", lambda: 77)
    pair_N = assign(problem(case)[1], EXPERTS).pair_N
    like, adapter = torch.empty(0), experts.adapter
    drawn = [
        masks(f.pair, seed, like)(pair_N.numel(), width).double()
        for seed, f, width in ((77, adapter.gate_up_proj, HIDDEN), (78, adapter.down_proj, INNER))
    ]
    place = {int(p): n for n, p in enumerate(pair_N)}
    at = lambda t, k: tuple(mask[place[t * TOP_K + k]] for mask in drawn)  # noqa: E731
    assert_equal(fast(experts, case), slow(experts, case, dropped=at), 2e-5)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("way", ["split", "fold"])
def test_bf16_stays_near_the_exact_values(monkeypatch, grouped, way):
    if grouped:
        monkeypatch.setattr(expert_mix, "_how", lambda stack: expert_grouped)
    case = Case(routing="skewed", way=way, dtype=torch.bfloat16)
    experts = built(case)
    assert_equal(fast(experts, case), slow(experts, case), 0.03)


@pytest.mark.parametrize("preset", PRESETS)
def test_little_is_kept_for_the_backward(preset):
    """x, the routing, the factors, and pre-activations: nothing of N x H, no activation, no dense weight."""
    case = Case(preset=preset)
    experts = built(case)
    x, index, weights, _ = problem(case)
    x.requires_grad_()
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // 8
        return tensor

    known = {p.untyped_storage().data_ptr() for p in (x, weights, *experts.parameters())}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        out = experts(x, index, weights)
    pairs = index.numel()
    extra = sum(size for address, size in kept.items() if address not in known)
    counts = EXPERTS + 1  # one place for choices that have no expert here
    assert extra <= pairs * (2 * INNER + 2 * case.r) + 2 * pairs + counts
    del out


@pytest.mark.parametrize("tokens", range(1, 30, 4))
@pytest.mark.parametrize("way", ["auto", "split", "fold"])
def test_the_bits_are_the_same_without_gradients(tokens, way):
    case = Case(routing="even", dtype=torch.float32, way=way)
    experts = built(case)
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, HIDDEN, generator=generator)
    index = torch.rand(tokens, EXPERTS, generator=generator).topk(TOP_K).indices
    weights = torch.rand(tokens, TOP_K, generator=generator)
    with torch.no_grad():
        want = experts(x, index, weights)
    assert torch.equal(experts(x.requires_grad_(), index, weights), want)


def test_a_second_derivative_is_refused():
    case = Case()
    x, index, weights, _ = problem(case)
    x.requires_grad_()
    out = built(case)(x, index, weights)
    with pytest.raises(RuntimeError, match=r"no second derivative.*experts_backend: grouped_mm"):
        torch.autograd.grad(out.sum(), x, create_graph=True)


def test_a_kept_graph_gives_the_same_gradients_again():
    case = Case()
    experts = built(case)
    x, index, weights, upstream = problem(case)
    x.requires_grad_()
    out = experts(x, index, weights)
    first = torch.autograd.grad(out, x, upstream, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(out, x, upstream)[0], first)


def test_experts_that_train_themselves_run_in_pieces():
    case = Case()
    experts = built(case)
    experts.down_proj.requires_grad_()
    assert experts.backend.name == "grouped_mm"
    fast(experts, case)
    assert experts.down_proj.grad.abs().sum() > 0


@given(
    st.integers(0, 10**6),
    st.integers(1, 10**5),
    st.integers(1, 256),
    st.integers(1, 10**4),
    st.integers(1, 10**4),
    st.integers(0, 256),
)
@settings(max_examples=200, deadline=None)
def test_what_is_kept_fits_the_share_of_what_a_layer_would_hold(pairs, rows, experts, hidden, inner, ranks):
    kept = fold.kept_rows(pairs, rows, experts, hidden, inner, ranks)
    assert 0 <= kept <= pairs
    whole = experts * 3 * hidden * inner + pairs * (hidden + 4 * inner)
    assert kept == 0 or kept * 2 * inner + pairs * ranks + rows * hidden <= fold.KEPT_SHARE * whole


def test_folding_is_for_experts_with_more_rows_than_the_crossover():
    at = fold.folds_above("auto", 2048, 1536)
    assert at == pytest.approx(2048 * 1536 / 3584)
    assert fold.folds_back_above("auto", 1536) == 1536
    for above in (fold.folds_above, lambda way, i, o, dropout=0.0: fold.folds_back_above(way, o, dropout)):
        assert above("fold", 2048, 1536) == 0
        assert above("split", 2048, 1536) == float("inf")
        assert above("fold", 2048, 1536, dropout=0.1) == float("inf")
    assert fold.reason("auto", 256, 256, 0.0) == "split up to 128 rows of an expert, folded beyond"
