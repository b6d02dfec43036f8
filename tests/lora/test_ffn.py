"""MixLoRA's fast path against the paper's formula, one token at a time, in fp64."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from lora import shared_ffn
from lora.attach import attach
from lora.config import BankConfig
from lora.errors import AdapterError
from lora.ffn import MixedFfn
from lora.presets import bank_at
from lora.shared_ffn import Scales, Stacks, mix
from moe.assignment import assign
from moe.context import BatchContext, batch_context
from moe.form import ExpertForm
from moe.kernels.grouped import grouped_linear
from tests.lora.reference_mixlora import balance_loss, block, choose, z_loss

HIDDEN, INNER, E = 6, 10, 4
SMALL = {"num_experts": E, "r": 3, "alpha": 6.0, "dropout": 0.0, "router_aux_loss_coef": 0.05}
PRESETS = {
    "mixlora": BankConfig("mixlora", **SMALL),
    "mixlora-dynamic": BankConfig("mixlora-dynamic", **SMALL),
    "mixlora-switch": BankConfig("mixlora-switch", jitter=0.0, **SMALL),
    "mixlora-switch, full": BankConfig("mixlora-switch", jitter=0.0, capacity=0.5, **SMALL),
}


def feed_forward(bias: bool = False, dtype: torch.dtype = torch.float64) -> LlamaMLP:
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=HIDDEN, intermediate_size=INNER, num_attention_heads=2, mlp_bias=bias)
    return LlamaMLP(config).to(dtype).requires_grad_(False)


class TwoLayers(nn.Module):
    """Feed-forward blocks under the names that adapters look for, with residuals."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"mlp": feed_forward(bias)}) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer["mlp"](x)
        return x


def adapted(bank: BankConfig, bias: bool = False) -> TwoLayers:
    model = TwoLayers(bias)
    attach(model, {"m": bank}, [])
    randomize(model)
    return model


def randomize(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.25, generator=generator)


def reference(model: TwoLayers, bank: BankConfig, x: Tensor) -> tuple[Tensor, Tensor]:
    """Output, and the losses with their coefficients."""
    x_TH, layers, loss = x.reshape(-1, HIDDEN), [], torch.zeros((), dtype=torch.float64)
    for layer in model.layers:
        w, full = dict(layer["mlp"].named_parameters()), layer["mlp"].adapter.here
        config = full.config
        room = max(1, -(-int(2 * len(x_TH) * config.capacity) // (2 * E)))
        routed = choose(x_TH, w["adapter.router.weight"], str(config.combine), room=room)
        x_TH = x_TH + block(x_TH, routed, w, full.scale)
        layers.append(routed)
        loss = loss + config.z_loss_coef * z_loss(routed)
    return x_TH.view_as(x), loss + config.router_aux_loss_coef * balance_loss(layers)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", PRESETS)
def test_outputs_losses_and_all_gradients_match_over_three_steps(name, bias):
    bank = PRESETS[name]
    fast, slow = adapted(bank, bias), adapted(bank, bias)
    trained = [[p for p in m.parameters() if p.requires_grad] for m in (fast, slow)]
    optimizers = [torch.optim.SGD(p, lr=0.01) for p in trained]
    for step in range(3):
        x = torch.randn(2, 5, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        x_fast, x_slow = x.clone().requires_grad_(), x.clone().requires_grad_()
        for optimizer in optimizers:
            optimizer.zero_grad()
        with batch_context(BatchContext(aux_scale=0.5, shape=(2, 5))):
            y_fast = fast(x_fast)
            y_fast.sin().sum().backward()
        y_slow, loss = reference(slow, bank, x_slow)
        (y_slow.sin().sum() + 0.5 * loss).backward()
        torch.testing.assert_close(y_fast, y_slow, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(x_fast.grad, x_slow.grad, rtol=1e-9, atol=1e-11)
        for (path, p), q in zip(fast.named_parameters(), slow.parameters(), strict=True):
            if p.requires_grad:
                want = torch.zeros_like(q) if q.grad is None else q.grad
                torch.testing.assert_close(p.grad, want, rtol=1e-9, atol=1e-11, msg=lambda m, n=path: f"{n}: {m}")
                q.grad = want
        for optimizer in optimizers:
            optimizer.step()


def test_the_capacity_of_the_test_above_is_reached():
    model = adapted(PRESETS["mixlora-switch, full"])
    router = model.layers[0]["mlp"].adapter.router
    gates = router(torch.randn(10, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).gate_TE
    assert (gates == 0).all(1).any()


def test_experts_without_tokens_and_calls_without_tokens_get_zero_gradients():
    model = adapted(PRESETS["mixlora"])
    mlp = model.layers[0]["mlp"]
    with torch.no_grad():  # experts 0 and 1 always win
        mlp.adapter.router.weight.zero_()[:2, 0] = torch.tensor([9.0, 8.0])
    x = torch.randn(5, HIDDEN, dtype=torch.float64).abs()
    mlp(x).sum().backward()
    for name, parameter in mlp.adapter.named_parameters():
        if "router" not in name:
            assert parameter.grad[:2].abs().amax((1, 2)).min() > 0, name
            assert parameter.grad[2:].eq(0).all(), name
    mlp.zero_grad()
    assert mlp(x[:0]).shape == (0, HIDDEN)
    mlp(x[:0]).sum().backward()
    assert all(p.grad is not None and p.grad.eq(0).all() for p in mlp.adapter.parameters())


@pytest.mark.parametrize("name", ["mixlora", "mixlora-dynamic", "mixlora-switch"])
def test_at_the_start_the_block_computes_its_old_output_times_the_sum_of_gates(name):
    model, x = TwoLayers(bias=True), torch.randn(7, HIDDEN, dtype=torch.float64)
    for parameter in model.parameters():
        parameter.normal_()
    before = model.layers[0]["mlp"](x)
    frozen = {path: id(p) for path, p in model.named_parameters()}
    attach(model, {"m": BankConfig(name, num_experts=E, r=3, dropout=0.5)}, [])
    mlp = model.layers[0]["mlp"].eval()
    gates = mlp.adapter.router(x).gate_TE.sum(-1, keepdim=True)
    torch.testing.assert_close(mlp(x), gates * before)
    if name == "mixlora":
        torch.testing.assert_close(gates, torch.ones_like(gates))
    after = dict(model.named_parameters())
    assert frozen == {path: id(after[path]) for path in frozen}
    assert set(after) - set(frozen) == {
        f"layers.{n}.mlp.adapter.{inner}"
        for n in range(2)
        for inner in [
            *(f"{p}.{f}" for p in ("gate_proj", "up_proj", "down_proj") for f in "AB"),
            "router.weight",
        ]
    }
    assert mlp.adapter.down_proj.B.address.units()[0].unit == "layers.0.mlp.adapter.down_proj.B"


def tensors(seed: int, tokens: int, top_k: int, rank: int = 3) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = [(tokens, HIDDEN), (tokens, INNER), (tokens, INNER), (tokens, top_k)]
    shapes += [(E, 2 * rank, HIDDEN), (E, INNER, rank), (E, INNER, rank), (E, rank, INNER), (E, HIDDEN, rank)]
    return [torch.randn(*s, generator=g, dtype=torch.float64).requires_grad_() for s in shapes]


def plain_mix(x, u, v, gate, a_in, b_gate, b_up, a_down, b_down, keep, index, scales):
    """Pair by pair; ``keep`` [T,K,I]."""
    m, d, rank = [], [], b_gate.shape[2]
    for t in range(len(x)):
        m_I, d_H = torch.zeros_like(u[t]), torch.zeros_like(x[t])
        for k, e in enumerate(index[t].tolist()):
            if e == E:
                continue
            z = scales.s * (a_in[e] @ x[t])
            h = nn.functional.silu(u[t] + b_gate[e] @ z[:rank]) * (v[t] + b_up[e] @ z[rank:])
            m_I = m_I + gate[t, k] * h
            d_H = d_H + gate[t, k] * scales.s_down * (b_down[e] @ (a_down[e] @ (h * keep[t, k])))
        m.append(m_I)
        d.append(d_H)
    return torch.stack(m), torch.stack(d)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(1, 3), st.booleans(), st.booleans(), st.integers(0, 2**16))
def test_any_assignment_with_dropout_of_h_matches_pair_by_pair(tokens, top_k, dropout, missing, seed):
    g = torch.Generator().manual_seed(seed)
    index_TK = torch.stack([torch.randperm(E, generator=g)[:top_k] for _ in range(tokens)])
    pairs = None
    if missing:
        index_TK = index_TK.masked_fill(torch.rand(index_TK.shape, generator=g) < 0.4, E)
        pairs = int((index_TK < E).sum())
    assignment, inputs = assign(index_TK, E, pairs), tensors(seed, tokens, top_k)
    keep_TKI = torch.rand(tokens, top_k, INNER, generator=g) < (0.6 if dropout else 1.1)
    keep_NI = keep_TKI.flatten(0, 1)[assignment.pair_N] if dropout else None
    copies, scales = [t.detach().clone().requires_grad_() for t in inputs], Scales(2.0, 3.0)
    form = ExpertForm(act="silu")
    got = mix(*inputs[:4], Stacks(*inputs[4:]), assignment, form, scales, keep_NI)
    want = plain_mix(*copies, keep_TKI.double(), index_TK, scales)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs)
    sum(y.sin().sum() for y in got).backward()
    (sum(y.sin().sum() for y in want) + 0 * sum(t.sum() for t in copies)).backward()
    for ours, theirs in zip(inputs, copies, strict=True):
        wanted = torch.zeros_like(theirs) if theirs.grad is None else theirs.grad
        torch.testing.assert_close(ours.grad, wanted)


def test_any_rank_takes_the_grouped_products(grouped_products):
    products = grouped_products(shared_ffn)
    torch.manual_seed(0)
    base = LlamaMLP(LlamaConfig(hidden_size=32, intermediate_size=24)).double().requires_grad_(False)
    x = torch.randn(6, 32, dtype=torch.float64)
    for rank in (3, 8):
        bank, found = bank_at(BankConfig("mixlora", num_experts=4, r=rank, dropout=0.0), 0, 1), []
        for grouped in (False, True):
            here = MixedFfn(base, bank, "layers.0.mlp")
            randomize(here.adapter)
            with products(grouped):
                y = here(x)
                y.sin().sum().backward()
            found.append([y.detach(), *(p.grad for p in here.adapter.parameters())])
        for loop, pairs in zip(*found, strict=True):
            torch.testing.assert_close(pairs, loop)


@pytest.mark.parametrize("dropout", [False, True])
def test_all_pairs_at_once_computes_what_one_expert_after_the_other_does(monkeypatch, dropout):
    """The form that GPUs run in grouped products, with the loop in their place."""
    monkeypatch.setattr(shared_ffn, "grouped_linear", lambda x, w, counts, _: grouped_linear(x, w, counts, "loop"))
    index_TK = torch.tensor([[0, 2], [2, 3], [3, 0], [0, 2], [2, 0]])
    assignment, inputs, form = assign(index_TK, E), tensors(1, 5, 2), ExpertForm(act="silu")
    keep_NI = torch.rand(10, INNER) < 0.6 if dropout else None
    copies, scales = [t.detach().clone().requires_grad_() for t in inputs], Scales(2.0, 3.0)
    got = shared_ffn._grouped(*inputs, keep_NI, assignment, form, scales)
    want = mix(*copies[:4], Stacks(*copies[4:]), assignment, form, scales, keep_NI)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs)
        ours.sin().sum().backward(retain_graph=True)
        theirs.sin().sum().backward(retain_graph=True)
    for ours, theirs in zip(inputs, copies, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("rank", [4, 8])
@pytest.mark.parametrize("name", ["mixlora", "mixlora-dynamic", "mixlora-switch"])
def test_on_a_gpu_nothing_is_read_back_and_the_values_are_exact_to_bf16(name, rank):
    """Beside the same module in fp64. Outputs are in the hundreds here: the upstream gradient must not depend on their
    last bits, and an entry is a sum of larger terms, so that rows are compared and not entries."""
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=64, intermediate_size=128, num_attention_heads=2)
    base = LlamaMLP(config).bfloat16().requires_grad_(False)
    bank = BankConfig(name, num_experts=8, r=rank, dropout=0.0, jitter=0.0, router_aux_loss_coef=0.01)
    here = MixedFfn(base, bank_at(bank, 0, 1), "layers.0.mlp")
    randomize(here.adapter)
    there, exact = copy.deepcopy(here).cuda(), copy.deepcopy(here).double()
    x, upstream = torch.randn(48, 64).bfloat16(), torch.randn(48, 64).bfloat16()
    x_there, upstream_there = x.cuda().requires_grad_(), upstream.cuda()
    with batch_context(BatchContext(shape=(2, 24))):
        there(x_there).backward(upstream_there)  # probes and compiles what is needed
        there.zero_grad()
        x_there.grad = None
        torch.cuda.set_sync_debug_mode("error")
        try:
            y_there = there(x_there)
            y_there.backward(upstream_there)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        x_exact = x.double().requires_grad_()
        y_exact = exact(x_exact)
        y_exact.backward(upstream.double())
        chosen_TE = there.adapter.router(x_there).chosen_TE
        assert torch.equal(chosen_TE.cpu(), exact.adapter.router(x_exact).chosen_TE), "a tie: draw other inputs"
    assert ((y_there.cpu() - y_exact).norm(dim=1) <= 0.02 * y_exact.norm(dim=1)).all()
    pairs = zip(there.adapter.parameters(), exact.adapter.parameters(), strict=True)
    for p, q in [(x_there, x_exact), *pairs]:
        assert (p.grad.cpu() - q.grad).norm() <= 0.02 * q.grad.norm()


def test_dropout_is_off_in_evaluation_and_repeats_with_the_generator_in_training():
    model = adapted(BankConfig("mixlora", **SMALL | {"dropout": 0.5}))
    mlp, x = model.layers[0]["mlp"], torch.randn(8, HIDDEN, dtype=torch.float64)
    still = mlp.eval()(x)
    assert torch.equal(still, mlp(x))
    mlp.train()
    torch.manual_seed(5)
    first = mlp(x)
    assert not torch.allclose(first, still)
    assert not torch.allclose(mlp(x), first)
    torch.manual_seed(5)
    assert torch.equal(mlp(x), first)


def saved_bytes(run) -> int:
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        y = run()
    del y
    return sum(kept.values())


def test_the_saved_bytes_do_not_grow_with_the_choices():
    hidden, inner, tokens, experts = 64, 256, 128, 8
    torch.manual_seed(0)
    base = LlamaMLP(LlamaConfig(hidden_size=hidden, intermediate_size=inner)).requires_grad_(False)
    x = torch.randn(tokens, hidden, requires_grad=True)
    frozen = saved_bytes(lambda: base(x))

    def kept(top_k: int) -> int:
        bank = BankConfig("mixlora", num_experts=experts, top_k=top_k, r=4, dropout=0.0)
        mixed = MixedFfn(base, bank_at(bank, 0, 1), "layers.0.mlp")
        return saved_bytes(lambda: mixed(x))

    two, four = kept(2), kept(4)
    pair = 4 * tokens * inner  # bytes of one [T,I] tensor
    assert two < 1.1 * frozen  # the block alone keeps three [T,I], we keep u and v
    assert four - two < 0.25 * pair  # where the published loop keeps four [T,I] for each choice


def test_what_a_block_cannot_carry_is_refused():
    def refused(message: str, bank: BankConfig, model: nn.Module | None = None, **more: BankConfig) -> None:
        with pytest.raises(AdapterError, match=message):
            attach(model or TwoLayers(), {"m": bank, **more}, [])

    refused("matches no dense feed-forward block", BankConfig("mixlora", targets=("attn",)))
    refused("is inside layers.0.mlp", BankConfig("mixlora"), other=BankConfig("lora", targets=("up_proj",)))
    adapted_inside = TwoLayers()
    attach(adapted_inside, {"l": BankConfig("lora", targets=("up_proj",))}, [])
    refused("up_proj already has an adapter; attach all banks at once", BankConfig("mixlora"), adapted_inside)
    twice = TwoLayers()
    attach(twice, {"m": BankConfig("mixlora")}, [])
    refused("layers.0.mlp already has an adapter; attach all banks at once", BankConfig("mixlora"), twice)
    odd = TwoLayers()
    odd.layers[0]["mlp"].act_fn = nn.Tanh()
    refused("its activation is Tanh", BankConfig("mixlora"), odd)
    bare = TwoLayers()
    del bare.layers[1]["mlp"].act_fn
    refused("layers.1.mlp: it has no act_fn", BankConfig("mixlora"), bare)


def test_bf16_routes_in_fp32_and_stays_near_fp32():
    model = adapted(PRESETS["mixlora"]).float()
    mlp, x = model.layers[0]["mlp"], torch.randn(32, HIDDEN).bfloat16()
    for parameter in mlp.parameters():
        parameter.data = parameter.data.bfloat16()
    half = mlp(x)
    assert half.dtype == torch.bfloat16
    half.float().sin().sum().backward()
    assert all(p.grad.isfinite().all() for p in mlp.adapter.parameters())
    for parameter in mlp.parameters():
        parameter.data = parameter.data.float()
    torch.testing.assert_close(half.float(), mlp(x.float()), rtol=0.1, atol=0.2)
