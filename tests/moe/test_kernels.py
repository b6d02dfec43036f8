"""Every backend of the experts against the naive reference with gradients, and what each promises beside that."""

import dataclasses
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM

from moe.experts import Experts
from moe.families import find_moe_blocks
from moe.form import PLAIN, ExpertForm
from moe.kernels import batched
from moe.kernels.backend import BackendError, Site, choose
from tests.moe.layers import GPT_OSS, Case, compare, run

CASES = {
    "plain": Case(),
    "skewed": Case(tokens=40, top_k=1, choices=[3] * 9 + [0]),
    "empty experts": Case(choices=[1, 4]),
    "no tokens": Case(tokens=0),
    "one token": Case(tokens=1, top_k=1, choices=[3]),
    "choices elsewhere": Case(choices=[0, 1, 2, 3, 4, -1, -1, -1], top_k=3),
    "all choices elsewhere": Case(choices=[-1, -1]),
    "odd sizes, one expert": Case(hidden=5, inner=3, num_experts=1, top_k=1),
    "biases": Case(biased=True, choices=[0, 1, 2, 4, -1]),
    "transposed": Case(form=ExpertForm(transposed=True)),
    "interleaved": Case(form=ExpertForm(interleaved=True)),
    "gpt_oss": Case(form=GPT_OSS, biased=True, choices=[0, 2, 3]),
    "gelu": Case(form=ExpertForm(act="gelu")),
    "gelu_pytorch_tanh": Case(form=ExpertForm(act="gelu_pytorch_tanh")),
    "relu": Case(form=ExpertForm(act="relu")),
}


@pytest.mark.parametrize("backend", ["reference", "grouped_mm", "minimal"])
@pytest.mark.parametrize("name", CASES)
def test_backends_equal_the_reference_with_gradients(name, backend):
    compare(CASES[name], backend)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 20), st.integers(1, 6), st.integers(1, 9), st.integers(1, 9), st.data())
def test_any_routing_and_any_size(tokens, num_experts, hidden, inner, data):
    top_k = data.draw(st.integers(1, num_experts))
    away = data.draw(st.integers(0, 3))
    choices = [*range(num_experts), *[-1] * away]
    compare(Case(tokens, top_k, hidden, inner, num_experts, choices), "minimal", seed=data.draw(st.integers(0, 99)))


@pytest.mark.parametrize("name", ["plain", "empty experts", "choices elsewhere", "biases", "gpt_oss", "no tokens"])
def test_the_grouped_pass_equals_the_reference(name, monkeypatch):
    """The pass for GPUs; torch's grouped product has a slow CPU form, in fp32 with sizes divisible by 4."""
    monkeypatch.setattr("moe.experts.passes", lambda site, name: batched)
    case = dataclasses.replace(CASES[name], hidden=16, inner=8, dtype=torch.float32)
    compare(case, "minimal", tolerance=2e-6)


@pytest.mark.parametrize("how", ["loops", "batched"])
def test_frozen_weights_cost_no_product(how, monkeypatch):
    case = Case(hidden=16, inner=8, dtype=torch.float32, biased=True)
    experts, x, weights, index = case.build("minimal")
    if how == "batched":
        monkeypatch.setattr("moe.experts.passes", lambda site, name: batched)
    run(experts, x, weights, index).sum().backward()
    want = x.grad.clone()
    products = {}
    for frozen in (False, True):
        for parameter in experts.parameters():
            parameter.requires_grad_(not frozen)
        out = run(experts, x, weights, index).sum()
        with torch.profiler.profile() as profile:
            got = torch.autograd.grad(out, x)[0]
        torch.testing.assert_close(got, want)
        named = "aten::mm" if how == "loops" else "aten::_grouped_mm"
        products[frozen] = sum(event.count for event in profile.key_averages() if event.key == named)
    each = case.num_experts if how == "loops" else 1
    assert products[True] == 2 * each, "the activation's gradient and x's"
    assert products[False] >= 4 * each, "the profiler sees the products"


def test_only_the_wanted_gradients_are_made():
    experts, x, weights, index = Case(biased=True).build("minimal")
    whole = run(experts, x, weights, index).sum()
    inputs = (x, weights, *experts.parameters())
    want = torch.autograd.grad(whole, inputs)
    for chosen, expected in zip(inputs, want, strict=True):
        for each in inputs:
            each.requires_grad_(each is chosen)
        (got,) = torch.autograd.grad(run(experts, x, weights, index).sum(), chosen)
        torch.testing.assert_close(got, expected)


def test_a_second_derivative_is_refused_and_named():
    experts, x, weights, index = Case().build("minimal")
    out = run(experts, x, weights, index).sum()
    with pytest.raises(RuntimeError, match=r"no second derivative.*experts_backend: grouped_mm"):
        torch.autograd.grad(out, x, create_graph=True)


@pytest.mark.parametrize("how", ["loops", "batched"])
def test_a_graph_that_is_kept_gives_the_same_gradients_again(how, monkeypatch):
    if how == "batched":
        monkeypatch.setattr("moe.experts.passes", lambda site, name: batched)
    experts, x, weights, index = Case(hidden=16, inner=8, dtype=torch.float32).build("minimal")
    inputs = (x, weights, *experts.parameters())
    out = run(experts, x, weights, index).sum()
    first = torch.autograd.grad(out, inputs, retain_graph=True)
    second = torch.autograd.grad(out, inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_graph_that_is_not_kept_lends_its_memory(monkeypatch):
    monkeypatch.setattr("moe.experts.passes", lambda site, name: batched)
    given = []

    def watched(*args, overwrite):
        given.append(overwrite)
        return batched.backward(*args, overwrite=overwrite)

    how = types.SimpleNamespace(forward=batched.forward, backward=watched)
    monkeypatch.setattr("moe.experts.passes", lambda site, name: how)
    experts, x, weights, index = Case(hidden=16, inner=8, dtype=torch.float32).build("minimal")
    out = run(experts, x, weights, index).sum()
    out.backward(retain_graph=True)
    out.backward()
    assert given == [False, True]


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_nothing(reentrant):
    experts, x, weights, index = Case(biased=True).build("minimal")
    inputs = (x, weights, *experts.parameters())
    want = torch.autograd.grad(run(experts, x, weights, index).square().sum(), inputs)
    again = checkpoint(lambda x, weights: run(experts, x, weights, index), x, weights, use_reentrant=reentrant)
    again.square().sum().backward()
    assert all(torch.equal(each.grad, w) for each, w in zip(inputs, want, strict=True))


def test_autocast_does_not_reach_inside():
    experts, x, weights, index = Case(dtype=torch.float32).build("minimal")
    want = run(experts, x, weights, index)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run(experts, x, weights, index)
        gradient = torch.autograd.grad(got.sum(), x)[0]
    assert torch.equal(got, want)
    assert torch.equal(gradient, torch.autograd.grad(want.sum(), x)[0])


def test_two_runs_are_bitwise_equal():
    def once():
        experts, x, weights, index = Case(tokens=200, hidden=33, inner=17, dtype=torch.float32).build("minimal")
        out = run(experts, x, weights, index)
        return out, *torch.autograd.grad(out.square().sum(), (x, weights, *experts.parameters()))

    assert all(torch.equal(a, b) for a, b in zip(once(), once(), strict=True))


def test_half_precision_rows_are_computed_in_fp32():
    """The error against fp64 stays near that of rounding each product once."""
    compare(Case(tokens=30, hidden=32, inner=16, dtype=torch.bfloat16), "minimal", tolerance=2e-2)


def saved_bytes(work, without):
    """Bytes of distinct storages that ``work`` saves for its backward, beside those of the tensors ``without``."""
    known = {t.untyped_storage().data_ptr() for t in without}
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = work()
    assert out.requires_grad
    return sum(nbytes for at, nbytes in kept.items() if at not in known)


def test_it_saves_a_quarter_of_what_transformers_does():
    """At Qwen3-30B-A3B's ratio of sizes, H : I = 8 : 3 with 8 choices."""
    config = AutoConfig.for_model(
        "qwen3_moe", vocab_size=32, hidden_size=256, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        head_dim=16, moe_intermediate_size=96, num_experts=16, num_experts_per_tok=8, intermediate_size=32,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    model.set_experts_implementation("grouped_mm")
    theirs = find_moe_blocks(model)[0].experts
    ours = Experts(theirs.gate_up_proj, theirs.down_proj, layer=0)
    x = torch.randn(128, 256, requires_grad=True)
    index = torch.rand(128, 16).argsort(1)[:, :8]
    weights = torch.rand(128, 8, requires_grad=True)
    inputs = (x, weights, *theirs.parameters())
    torch.testing.assert_close(ours(x, index, weights), theirs(x, index, weights), rtol=1e-4, atol=1e-5)
    mine = saved_bytes(lambda: ours(x, index, weights), inputs)
    assert mine <= 0.25 * saved_bytes(lambda: theirs(x, index, weights), inputs)
    with torch.no_grad():
        assert not ours(x, index, weights).requires_grad


def test_without_gradients_nothing_is_kept(monkeypatch):
    kept = []
    how = types.SimpleNamespace(forward=lambda *args: kept.append(args[-1]) or batched.forward(*args))
    _, x, weights, index = (case := Case(hidden=16, inner=8, dtype=torch.float32)).build("minimal")
    experts = case.build("minimal")[0]
    monkeypatch.setattr("moe.experts.passes", lambda site, name: how)
    with torch.no_grad():
        run(experts, x, weights, index)
    run(experts, x, weights, index)
    assert kept == [False, True]


CPU = Site(torch.device("cpu"), torch.float32, 16, 8, PLAIN)


def test_the_probe_says_what_it_chose_and_why():
    assert choose(CPU).name == "minimal"
    assert "CPU: one dense product per expert" in choose(CPU).reason
    adapted = choose(dataclasses.replace(CPU, adapted="pieces"))
    assert adapted.name == "grouped_mm"
    assert "its adapter needs the sorted rows" in adapted.reason
    odd = choose(dataclasses.replace(CPU, form=ExpertForm(act="tanh")))
    assert odd.name == "grouped_mm"
    assert "the derivative of 'tanh' is not known" in odd.reason
    assert choose(CPU, "reference").name == "reference"


@pytest.mark.parametrize(
    ("site", "wanted", "why"),
    [
        (CPU, "fastest", "'fastest' is unknown; choose auto, reference"),
        (dataclasses.replace(CPU, adapted="pieces"), "minimal", "'minimal' cannot run here: its adapter needs"),
        (
            dataclasses.replace(CPU, adapted="whole"),
            "reference",
            "'reference' cannot run here: it has no room for an ad",
        ),
        (dataclasses.replace(CPU, form=ExpertForm(act="tanh")), "minimal", "derivative of 'tanh'"),
        (dataclasses.replace(CPU, biased=True), "triton", "triton"),
    ],
)
def test_a_backend_that_cannot_run_is_refused(site, wanted, why):
    with pytest.raises(BackendError, match=why):
        choose(site, wanted)


def test_an_adapter_is_heard_whatever_was_probed_before():
    class Doubling(torch.nn.Module):
        def gate_up_delta(self, x_NH, counts_L):
            return x_NH.new_zeros(())

        def down_delta(self, a_NI, counts_L):
            return a_NI.new_ones(())

    experts, x, weights, index = Case().build("auto")
    plain = run(experts, x, weights, index)
    experts.adapter = Doubling()
    torch.testing.assert_close(run(experts, x, weights, index), plain + weights.sum(1, keepdim=True))
