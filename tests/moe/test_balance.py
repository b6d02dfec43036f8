"""Balance losses: each against its formula in float64, in the gradient, and only when the loop asks for them."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from moe.balance import BalanceLosses, BalanceSpec, SequenceLoads, choice_counts, inject, switch_loss, z_loss
from moe.context import BatchContext, batch_context
from moe.convert import convert
from moe.gates import observe_gates
from moe.routing import RoutingError, probabilities, spec_of
from moe.stats import RoutingMeter
from tests.moe.tiny_families import tiny

IDS = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(1))
PADDED = torch.ones(2, 16, dtype=torch.bool)
PADDED[0, 11:] = False


def test_balanced_routing_costs_top_k_and_a_collapsed_router_costs_more():
    uniform_TE = torch.full((8, 4), 0.25)
    spread_TK = torch.stack([torch.arange(8) % 4, (torch.arange(8) + 1) % 4], dim=1)
    assert float(switch_loss(uniform_TE, spread_TK)) == 2.0
    peaked_TE = torch.tensor([[0.7, 0.3, 0.0, 0.0]]).repeat(8, 1)
    collapsed_TK = torch.tensor([[0, 1]]).repeat(8, 1)
    torch.testing.assert_close(switch_loss(peaked_TE, collapsed_TK), torch.tensor(4.0))


def test_injection_leaves_the_output_and_adds_the_scaled_gradient():
    w = torch.tensor(3.0, requires_grad=True)
    y = w * 2
    with batch_context(BatchContext(aux_scale=0.5)):
        out = inject(y, w * w)
    assert torch.equal(out, y)
    out.backward()
    assert float(w.grad) == 2 + 0.5 * 2 * 3


# -- formulas, number by number ----------------------------------------------------------------------------------------


def naive_sequence_losses(p, index, real, devices, limit):
    """DeepSeek-V2, eq. 23 to 31, for one sequence, written as the paper's sums."""
    tokens, experts, k = [t for t in range(len(p)) if real[t]], p.shape[1], index.shape[1]
    n, size = max(1, len(tokens)), p.shape[1] // devices
    f = [experts / (k * n) * sum(int(i) in index[t].tolist() for t in tokens) for i in range(experts)]
    mean = [sum((p[t, i] for t in tokens), p.new_zeros(())) / n for i in range(experts)]
    expert = sum(f[i] * mean[i] for i in range(experts))
    members = [range(d * size, (d + 1) * size) for d in range(devices)]
    of_device = [sum(mean[j] for j in m) for m in members]
    device = sum(sum(f[j] for j in m) / size * of_device[d] for d, m in enumerate(members))
    sent = [sum(any(e in m for e in index[t].tolist()) for t in tokens) for m in members]
    communication = sum(devices / (limit * n) * sent[d] * of_device[d] for d in range(devices))
    return expert, device, communication


@given(seed=st.integers(0, 10**6), padded=st.booleans(), devices=st.sampled_from([1, 2, 4]))
@settings(max_examples=30, deadline=None)
def test_losses_over_sequences_equal_the_papers_sums_with_gradients(seed, padded, devices):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(10, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    index = torch.stack([torch.randperm(8, generator=generator)[:3] for _ in range(10)])
    mask = torch.rand(10, generator=generator) > 0.3 if padded else None
    real = mask if padded else torch.ones(10, dtype=torch.bool)
    loads = SequenceLoads.of(logits.softmax(-1), index, (2, 5), devices, mask)
    got = (loads.expert_loss(), loads.device_loss(), loads.communication_loss(2), loads.switch_loss())
    halves = [
        naive_sequence_losses(logits.softmax(-1)[s], index[s], real[s], devices, 2) for s in (slice(0, 5), slice(5, 10))
    ]
    want = [(a + b) / 2 for a, b in zip(*halves, strict=True)]
    want.append(3 * want[0])
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w + 0.0 * logits.sum())
        gradients = [torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (g, w + 0.0 * logits.sum())]
        torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("padded", [False, True])
def test_the_switch_and_z_losses_equal_their_sums(padded):
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(9, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    index = torch.stack([torch.randperm(6, generator=generator)[:2] for _ in range(9)])
    mask = torch.tensor([True, True, False, True, False, True, True, True, False]) if padded else None
    tokens = [t for t in range(9) if mask is None or mask[t]]
    p = logits.softmax(-1)
    f = [sum(e in index[t].tolist() for t in tokens) / len(tokens) for e in range(6)]
    switch = 6 * sum(f[e] * sum(p[t, e] for t in tokens) / len(tokens) for e in range(6))
    z = sum(torch.log(sum(torch.exp(x) for x in logits[t])) ** 2 for t in tokens) / len(tokens)
    for got, want in ((switch_loss(p, index, mask), switch), (z_loss(logits, mask), z)):
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(*[torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (got, want)])


# -- in a model --------------------------------------------------------------------------------------------------------


def gate_gradients(model, spec, contexts=({},), meter=None):
    """Gradients of the gates after one forward and backward for each of the contexts, and what was routed."""
    blocks, meter = convert(model), meter or RoutingMeter()
    seen = []
    observe_gates(blocks, model.config, meter, BalanceLosses(spec))
    for block in blocks:
        block.gate.register_forward_hook(lambda _m, _a, out, layer=block.layer: seen.append((layer, out[0], out[2])))
    for number, context in enumerate(contexts):
        known = {"shape": (2, 16), "micro_step": number, "aux_scale": 1 / len(contexts), **context}
        mask = known.get("mask_T")
        ids = (IDS + number) % 64
        with batch_context(BatchContext(**known)):
            loss = model(ids, labels=ids, attention_mask=None if mask is None else mask.view(2, 16).long()).loss
            (loss / len(contexts)).backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}, seen


def by_hand(model, loss_of, contexts=({},)):
    """The same gradients, the auxiliary loss added to the main one where everything is at hand.

    ``loss_of(passes, number)`` gets all gates' (layer, logits, index) of each pass so far.
    """
    blocks, seen, passes = convert(model), [], []
    for block in blocks:
        block.gate.register_forward_hook(lambda _m, _a, out, layer=block.layer: seen.append((layer, out[0], out[2])))
    for number, context in enumerate(contexts):
        mask = context.get("mask_T")
        seen.clear()
        ids = (IDS + number) % 64
        loss = model(ids, labels=ids, attention_mask=None if mask is None else mask.view(2, 16).long()).loss
        passes.append(list(seen))
        ((loss + loss_of(passes, number)) / len(contexts)).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def assert_equal_gradients(got, want):
    for name, gradient in want.items():
        if gradient is not None:
            difference = (got[name] - gradient).norm() / gradient.norm().clamp(min=1e-12)
            assert difference < 1e-5, (name, float(difference))


@pytest.mark.parametrize("checkpointed", [None, False, True], ids=["plain", "checkpointed", "reentrant"])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_mode_hf_has_the_gradient_of_transformers_own_loss(family, padded, checkpointed):
    mask = PADDED if padded else None
    context = {"mask_T": mask.flatten()} if padded else {}
    own = tiny(family, output_router_logits=True, router_aux_loss_coef=0.3).train()
    attention = None if mask is None else mask.long()
    out = own(IDS, labels=IDS, attention_mask=attention)
    out.loss.backward()
    want = {name: p.grad for name, p in own.named_parameters()}

    model = tiny(family).train()
    if checkpointed is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointed})
    _, got, _ = gate_gradients(model, BalanceSpec(aux="hf", aux_coef=0.3), [context])
    assert_equal_gradients(got, want)


def test_one_layers_switch_loss_is_transformers_loss_of_that_layer():
    logits = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    index = logits.softmax(-1).topk(3).indices
    torch.testing.assert_close(switch_loss(logits.softmax(-1), index), load_balancing_loss_func((logits,), 8, 3))


def sums(spec, config_of):
    """The naive total of ``spec`` over layers for the newest pass, in float64, with all passes' counts if global."""

    def loss_of(passes, number):
        total = 0.0
        for position, (layer, logits, index) in enumerate(passes[number]):
            p = probabilities(logits.double(), config_of(layer))
            loads = SequenceLoads.of(p, index, (2, 16), spec.devices, None)
            if spec.aux == "sequence":
                total += spec.aux_coef * loads.switch_loss()
            elif spec.aux == "global_batch":
                chosen = torch.cat([p_[position][2] for p_ in passes[: number + 1]])
                f = torch.bincount(chosen.flatten(), minlength=8) / len(chosen)
                total += spec.aux_coef * 8 * (f * p.mean(0)).sum()
            else:
                total += spec.aux_coef * switch_loss(p, index)
            total += spec.expert_coef * loads.expert_loss() + spec.device_coef * loads.device_loss()
            total += spec.communication_coef * loads.communication_loss(spec.device_limit)
            total += spec.z_coef * z_loss(logits.double())
        return total

    return loss_of


SPECS = {
    "micro": BalanceSpec(aux_coef=0.1),
    "sequence": BalanceSpec(aux="sequence", aux_coef=0.1),
    "global": BalanceSpec(aux="global_batch", aux_coef=0.1),
    "z": BalanceSpec(z_coef=0.1),
    "deepseek": BalanceSpec(
        expert_coef=0.1, device_coef=0.2, communication_coef=0.3, devices=4, device_limit=2, z_coef=0.01
    ),
}


@pytest.mark.parametrize("checkpointed", [None, False, True], ids=["plain", "checkpointed", "reentrant"])
@pytest.mark.parametrize("name", SPECS)
def test_injected_losses_have_the_gradient_of_their_sum_over_accumulated_passes(name, checkpointed):
    family = "deepseek_v3" if name in ("sequence", "deepseek") else "qwen3_moe"
    spec, reference = SPECS[name], tiny(family).train()
    gates = {block.layer: spec_of(block.gate, reference.config) for block in convert(tiny(family))}
    want = by_hand(reference, sums(spec, gates.__getitem__), [{}, {}, {}])
    model, meter = tiny(family).train(), RoutingMeter()
    if checkpointed is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointed})
    _, got, _ = gate_gradients(model, spec, [{}, {}, {}], meter)
    assert_equal_gradients(got, want)
    assert int(meter.take().counts_ME.sum()) == 3 * 2 * 32 * 3, "a recomputed layer was counted again"
    _, none, _ = gate_gradients(tiny(family).train(), BalanceSpec(), [{}, {}, {}])
    gate = next(n for n in want if n.endswith("gate.weight"))
    assert not torch.allclose(none[gate], want[gate], rtol=1e-3), "the loss is too small to tell"


def test_the_running_count_starts_anew_in_every_optimizer_step():
    """Two steps of one pass each: the second must not see the first's choices."""
    results = []
    for passes in ([{"micro_step": 0}], [{"micro_step": 0}, {"micro_step": 0}]):
        model = tiny("qwen3_moe").train()
        losses = BalanceLosses(BalanceSpec(aux="global_batch", aux_coef=1.0))
        observe_gates(convert(model), model.config, RoutingMeter(), losses)
        for number, context in enumerate(passes):
            model.zero_grad()
            ids = (IDS + len(passes) - 1 - number) % 64  # the last pass has the same tokens in both cases
            with batch_context(BatchContext(**context)):
                model(ids, labels=ids).loss.backward()
        results.append(model.model.layers[1].mlp.gate.weight.grad)
    assert torch.equal(*results)


def test_the_reported_loss_does_not_contain_the_injected_one():
    losses = [gate_gradients(tiny("qwen3_moe"), BalanceSpec(aux_coef=c))[0] for c in (0.0, 0.5)]
    assert torch.equal(*losses)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("known", [False, True])
def test_the_injected_switch_gradient_is_that_of_the_loss(padded, known):
    generator = torch.Generator().manual_seed(2)
    mask_T = torch.arange(12) % 3 > 0 if padded else None
    logits_TE = torch.randn(12, 5, generator=generator)
    index_TK = logits_TE.topk(2).indices
    counts_E = choice_counts(index_TK, 5, mask_T) if known else None
    gradients = []
    for injected in (True, False):
        probs_TE = logits_TE.softmax(-1).requires_grad_()
        weights_TK = torch.ones(12, 2, requires_grad=True)
        with batch_context(BatchContext(aux_scale=0.5, mask_T=mask_T)):
            if injected:
                losses = BalanceLosses(BalanceSpec(aux_coef=0.3))
                losses.inject(weights_TK, 0, logits_TE, probs_TE, index_TK, True, counts_E).sum().backward()
            else:
                (0.5 * 0.3 * switch_loss(probs_TE, index_TK, mask_T)).backward()
        gradients.append(probs_TE.grad)
    torch.testing.assert_close(*gradients)


def test_padding_counts_nowhere():
    """What stands in the padding changes neither losses nor counts."""
    results = []
    for shift in (0, 7):
        ids = IDS.clone()
        ids[~PADDED] = (ids[~PADDED] + shift) % 64
        model, meter = tiny("deepseek_v3").train(), RoutingMeter()
        spec = dataclasses.replace(SPECS["deepseek"], aux="global_batch", aux_coef=0.3)
        observe_gates(convert(model), model.config, meter, BalanceLosses(spec))
        labels = ids.masked_fill(~PADDED, -100)
        with batch_context(BatchContext(shape=(2, 16), mask_T=PADDED.flatten())):
            model(ids, labels=labels, attention_mask=PADDED.long()).loss.backward()
        stats = meter.take()
        assert int(stats.counts_ME.sum()) == 2 * int(PADDED.sum()) * 3
        results.append((stats.counts_ME, {name: p.grad for name, p in model.named_parameters()}))
    assert torch.equal(results[0][0], results[1][0])
    for name, gradient in results[0][1].items():
        if gradient is not None and "embed" not in name:
            torch.testing.assert_close(gradient, results[1][1][name], msg=name)


def test_a_loss_over_sequences_needs_to_know_them():
    with pytest.raises(RoutingError, match=r"needs the batch's \(B, S\); got None for 32 tokens"):
        gate_gradients(tiny("qwen3_moe"), SPECS["sequence"], [{"shape": None}])


def test_evaluation_is_left_alone():
    off = [{"balance": False}]
    meter = RoutingMeter()
    _, plain, _ = gate_gradients(tiny("qwen3_moe"), BalanceSpec(), off)
    _, balanced, _ = gate_gradients(tiny("qwen3_moe"), BalanceSpec(aux_coef=0.5, z_coef=0.5), off, meter)
    for name, gradient in plain.items():
        assert gradient is None or torch.equal(gradient, balanced[name])
    assert meter.take() is None
    assert math.isfinite(float(plain["lm_head.weight"].sum()))
