"""Routers by their numbers against transformers' own, and what a router of ours does beyond them."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from moe.balance import BalanceLosses, BalanceSpec
from moe.bias import BiasBalance
from moe.capacity import capacity, expert_choice, random_second, within_capacity
from moe.context import BatchContext, batch_context
from moe.convert import convert
from moe.families import FamilyError, find_moe_blocks
from moe.gates import Gate, RoutingPolicy, observe_gates, replace_gate
from moe.routing import RouterSpec, RoutingError, config_fields, route, spec_of
from moe.stats import RoutingMeter
from tests.moe.tiny_families import FAMILIES, tiny

NO_LOSSES = BalanceLosses(BalanceSpec())


def seeded(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# -- parity ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_numbers_of_a_family_route_as_its_own_gate_does(family):
    model = tiny(family)
    block = find_moe_blocks(model)[1]
    x = seeded(100, 32)
    logits, weights, index = block.gate(x)
    spec = spec_of(block.gate, model.config)
    got_weights, got_index = route(logits, spec, getattr(block.gate, "e_score_correction_bias", None))
    assert torch.equal(got_index, index)
    assert torch.equal(got_weights, weights)
    assert got_weights.dtype == weights.dtype


@pytest.mark.parametrize("family", FAMILIES)
def test_a_gate_of_ours_with_the_familys_numbers_keeps_loss_gradients_and_names(family):
    want, got = tiny(family), tiny(family)
    names = list(got.state_dict())
    for block in find_moe_blocks(got):
        weight = block.gate.weight
        replaced = replace_gate(block, RoutingPolicy(spec_of(block.gate, got.config)))
        assert replaced.gate.weight is weight
    assert list(got.state_dict()) == names
    assert sum(isinstance(m, Gate) for m in got.modules()) == 2
    ids = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(1))
    losses = [model(input_ids=ids, labels=ids).loss for model in (want, got)]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-7, atol=0)
    for loss in losses:
        loss.backward()
    wanted = dict(want.named_parameters())
    for name, parameter in got.named_parameters():
        if wanted[name].grad is not None:
            torch.testing.assert_close(parameter.grad, wanted[name].grad, rtol=1e-5, atol=1e-8, msg=name)


def test_greedy_deepseek_v2_has_no_groups():
    model = tiny("deepseek_v2", topk_method="greedy")
    gate = find_moe_blocks(model)[0].gate
    spec = spec_of(gate, model.config)
    assert (spec.n_group, spec.topk_group) == (1, 1)
    logits, _, index = gate(seeded(40, 32))
    assert torch.equal(route(logits, spec)[1], index)
    assert config_fields("deepseek_v2", spec)["topk_method"] == "greedy"


@pytest.mark.parametrize("family", FAMILIES)
def test_numbers_written_to_a_configuration_are_read_back(family):
    model = tiny(family)
    gate = find_moe_blocks(model)[0].gate
    spec = dataclasses.replace(spec_of(gate, model.config), top_k=2)
    other = tiny(family, **config_fields(family, spec))
    assert spec_of(find_moe_blocks(other)[0].gate, other.config) == spec


def test_an_unknown_router_is_refused_by_name():
    model = tiny("qwen3_moe")
    model.config.model_type = "other"
    with pytest.raises(FamilyError, match=r"Qwen3MoeTopKRouter.*'other'.*known are mixtral"):
        spec_of(find_moe_blocks(model)[0].gate, model.config)


@pytest.mark.parametrize(
    ("numbers", "says"),
    [
        ({"top_k": 9}, "cannot choose 9 of 8"),
        ({"n_group": 3, "topk_group": 1}, "must divide 8"),
        ({"n_group": 4, "topk_group": 5}, "topk_group=5"),
        ({"top_k": 3, "n_group": 4, "topk_group": 1}, "fewer than the top_k=3"),
    ],
)
def test_numbers_that_contradict_each_other_are_refused(numbers, says):
    with pytest.raises(RoutingError, match=says):
        RouterSpec(8, **{"top_k": 2, **numbers})


# -- routing -----------------------------------------------------------------------------------------------------------


@given(
    seed=st.integers(0, 10**6),
    groups=st.sampled_from([1, 2, 4]),
    score=st.sampled_from(["softmax", "sigmoid"]),
    by=st.sampled_from(["max", "top2"]),
    biased=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_grouped_choices_equal_a_search_token_by_token(seed, groups, score, by, biased):
    best = max(1, groups // 2)
    spec = RouterSpec(8, 2, score, norm_topk=True, n_group=groups, topk_group=best, group_score=by, scale=1.5)
    logits = seeded(6, 8, seed=seed, dtype=torch.float64)
    bias = seeded(8, seed=seed + 1) if biased else None
    weights, index = route(logits, spec, bias)
    for t in range(6):
        scores = logits[t].softmax(0) if score == "softmax" else logits[t].sigmoid()
        chosen_by = scores + bias if biased else scores
        size = 8 // groups
        of_group = [chosen_by[g * size : (g + 1) * size].sort(descending=True).values for g in range(groups)]
        value = [float(v[0]) if by == "max" else float(v[:2].sum()) for v in of_group]
        allowed = sorted(range(groups), key=lambda g: -value[g])[:best]
        experts = [e for e in range(8) if e // size in allowed]
        want = sorted(experts, key=lambda e: -float(chosen_by[e]))[:2]
        assert index[t].tolist() == want
        picked = scores[want]
        torch.testing.assert_close(weights[t], 1.5 * picked / picked.sum())


def test_device_limited_routing_reaches_at_most_m_devices():
    spec = RouterSpec(16, 4, n_group=8, topk_group=3)
    _, index = route(seeded(200, 16), spec)
    devices = [len(set((row // 2).tolist())) for row in index]
    assert max(devices) == 3


def test_replayed_choices_get_the_weights_of_their_scores():
    spec = RouterSpec(8, 2, norm_topk=True)
    logits = seeded(5, 8)
    index = torch.tensor([[0, 1]] * 5)
    weights, same = route(logits, spec, index_TK=index)
    assert same is index
    p = logits.softmax(-1)[:, :2]
    torch.testing.assert_close(weights, p / p.sum(1, keepdim=True))


# -- capacity ----------------------------------------------------------------------------------------------------------


@given(
    seed=st.integers(0, 10**6),
    tokens=st.integers(0, 12),
    top_k=st.integers(1, 3),
    limit=st.integers(1, 6),
    by=st.sampled_from(["position", "probability"]),
    padded=st.booleans(),
)
@settings(max_examples=120, deadline=None)
def test_capacity_keeps_what_a_queue_at_each_expert_keeps(seed, tokens, top_k, limit, by, padded):
    generator = torch.Generator().manual_seed(seed)
    index = torch.stack([torch.randperm(5, generator=generator)[:top_k] for _ in range(tokens)]) if tokens else None
    index = index if tokens else torch.empty(0, top_k, dtype=torch.long)
    weights = torch.randint(0, 4, index.shape, generator=generator) / 4  # with ties
    wanted = torch.rand(index.shape, generator=generator) > 0.3 if padded else torch.ones_like(index, dtype=torch.bool)
    queue = [(t, k) for k in range(top_k) for t in range(tokens) if wanted[t, k]]
    if by == "probability":
        queue.sort(key=lambda tk: -float(weights[tk]))
    room, want = [limit] * 5, torch.zeros_like(wanted)
    for t, k in queue:
        if room[int(index[t, k])] > 0:
            room[int(index[t, k])] -= 1
            want[t, k] = True
    got = within_capacity(index, weights, 5, limit, by, wanted if padded else None)
    assert torch.equal(got, want)


def test_capacity_is_the_balanced_share_times_the_factor():
    assert capacity(16, 8, 2, 1.0) == 4
    assert capacity(16, 8, 2, 1.3) == 6
    assert capacity(1, 8, 1, 0.5) == 1


def test_a_second_choice_is_made_with_twice_its_share_as_probability():
    torch.manual_seed(0)
    weights = torch.tensor([[0.8, 0.2]]).repeat(20000, 1)
    made = random_second(weights)
    assert made[:, 0].all()
    assert abs(float(made[:, 1].float().mean()) - 0.4) < 0.02
    assert random_second(torch.tensor([[0.5, 0.5]]).repeat(1000, 1)).all()


@given(seed=st.integers(0, 10**6), limit=st.integers(1, 9), padded=st.booleans())
@settings(max_examples=40, deadline=None)
def test_experts_choose_their_best_real_tokens(seed, limit, padded):
    scores = seeded(7, 4, seed=seed).softmax(-1)
    valid = torch.tensor([True, False, True, True, True, False, True]) if padded else None
    taken = expert_choice(scores, limit, valid)
    tokens = [t for t in range(7) if valid is None or valid[t]]
    for e in range(4):
        want = sorted(tokens, key=lambda t: -float(scores[t, e]))[:limit]
        assert taken[:, e].nonzero().flatten().tolist() == sorted(want)


# -- the gate ----------------------------------------------------------------------------------------------------------


def routed(policy_changes=None, spec_changes=None, seed=0, meter=None, train=True):
    """A tiny model with our gates, observed."""
    model = tiny("qwen3_moe", seed)
    blocks = convert(model)
    spec = dataclasses.replace(spec_of(blocks[0].gate, model.config), **(spec_changes or {}))
    blocks = [replace_gate(block, RoutingPolicy(spec, **(policy_changes or {}))) for block in blocks]
    observe_gates(blocks, model.config, meter or RoutingMeter(), NO_LOSSES)
    return model.train(train), blocks


IDS = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(1))
RANDOM = {"jitter": 0.2, "random_second": True, "capacity_factor": 1.0}


def step(model, **context):
    with batch_context(BatchContext(shape=(2, 16), **context)):
        loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
        loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputed_layer_draws_the_same_numbers_and_counts_once(reentrant):
    results = []
    for checkpointed in (False, True):
        meter = RoutingMeter()
        model, _ = routed(RANDOM, {"top_k": 2}, meter=meter)
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(5)
        results.append((*step(model), meter.take().counts_ME))
    (loss, grads, counts), (again, same, recounted) = results
    assert torch.equal(loss, again)
    assert torch.equal(counts, recounted)
    for name, grad in grads.items():
        assert torch.equal(grad, same[name]), name


def test_random_routing_follows_the_default_generator_alone():
    model, _ = routed(RANDOM, {"top_k": 2})
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        model.zero_grad()
        losses.append(float(step(model)[0]))
    assert losses[0] == losses[1] != losses[2]


def test_evaluation_draws_and_drops_nothing():
    model, _ = routed({**RANDOM, "capacity_factor": 0.1}, {"top_k": 2}, train=False)
    plain, _ = routed({}, {"top_k": 2}, train=False)
    state = torch.get_rng_state()
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, plain(IDS).logits)
    assert torch.equal(torch.get_rng_state(), state)


def test_dropped_choices_have_no_weight_no_gradient_and_are_not_counted():
    meter = RoutingMeter()
    model, blocks = routed({"capacity_factor": 0.5}, {"top_k": 2}, meter=meter)
    seen = []
    blocks[0].gate.register_forward_hook(lambda _m, _a, out: seen.append(out))
    step(model)
    _, weights, index = seen[0]
    limit = capacity(32, 8, 2, 0.5)
    kept = weights > 0
    assert int((~kept).sum()) > 0
    for e in range(8):
        assert int(((index == e) & kept).sum()) == min(limit, int((index == e).sum()))
    assert int(meter.take().counts_ME[0].sum()) == int(kept.sum())


def test_padding_takes_no_room_and_is_not_counted():
    meter = RoutingMeter()
    model, blocks = routed({"capacity_factor": 0.5}, {"top_k": 2}, meter=meter)
    seen = []
    blocks[0].gate.register_forward_hook(lambda _m, _a, out: seen.append(out))
    mask = torch.ones(2, 16, dtype=torch.bool)
    mask[0, :8] = False
    step(model, mask_T=mask.flatten())
    weights = seen[0][1]
    assert not weights[~mask.flatten()].any()
    assert int(meter.take().counts_ME[0].sum()) == int((weights > 0).sum())


def test_expert_choice_gives_every_expert_equally_many_tokens():
    meter = RoutingMeter()
    model, _ = routed({"choice": "expert", "capacity_factor": 1.0}, {"norm_topk": False}, meter=meter)
    _, grads = step(model)
    assert (meter.take().counts_ME == capacity(32, 8, 3, 1.0)).all()
    assert all(grad is not None and grad.isfinite().all() for grad in grads.values())


def test_policies_that_cannot_be_are_refused():
    with pytest.raises(RoutingError, match="top_k 2, not 3"):
        RoutingPolicy(RouterSpec(8, 3), random_second=True)
    with pytest.raises(RoutingError, match="expert choice needs"):
        RoutingPolicy(RouterSpec(8, 2, "topk_softmax"), choice="expert")
    model = tiny("qwen3_moe")
    spec = spec_of(find_moe_blocks(model)[0].gate, model.config)
    blocks = [replace_gate(b, RoutingPolicy(spec, "expert")) for b in find_moe_blocks(model)]
    with pytest.raises(RoutingError, match="where experts choose"):
        observe_gates(blocks, model.config, RoutingMeter(), BalanceLosses(BalanceSpec(aux_coef=0.1)))


@pytest.mark.parametrize("ours", [False, True], ids=["transformers' gate", "ours"])
def test_routing_is_recorded_once_and_replayed_exactly(ours):
    def build(seed):
        if ours:
            return routed({}, {}, seed)[0]
        model = tiny("deepseek_v3", seed)
        observe_gates(convert(model), model.config, RoutingMeter(), NO_LOSSES)
        return model.train()

    taken = {}

    def record(layer, index_TK, weights_TK):
        assert layer not in taken, "recorded again in the recompute"
        assert index_TK.shape == weights_TK.shape
        taken[layer] = index_TK

    model = build(0)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    step(model, record=record)
    assert sorted(taken) == [0, 1]

    other = build(3)  # other weights, which would choose otherwise
    replayed, free = {}, {}
    step(other, record=lambda layer, index, weights: free.__setitem__(layer, index))
    asked = []
    step(
        other,
        replay=lambda layer: (asked.append(layer), taken[layer])[1],
        record=lambda layer, index, weights: replayed.__setitem__(layer, index),
    )
    assert any(not torch.equal(free[layer], taken[layer]) for layer in taken)
    assert all(torch.equal(replayed[layer], taken[layer]) for layer in taken)
    assert sorted(asked) == [0, 1]
    with pytest.raises(RoutingError, match=r"shape \[7, 3\] are to be replayed for 32 tokens with 3 choices"):
        step(other, replay=lambda layer: taken[layer][:7])


CUDA = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
)


def deterministic_step(device, spec, by, checkpointed):
    """Two gates with everything they can do, forward and backward, where nothing may be read back from a GPU."""
    model = tiny("deepseek_v3").to(device).train()
    blocks = find_moe_blocks(model)
    policy = RoutingPolicy(spec_of(blocks[0].gate, model.config), jitter=0.1, capacity_factor=1.0, drop_by=by)
    blocks = [replace_gate(block, policy) for block in blocks]
    bias = BiasBalance({block.layer: torch.zeros(8) for block in blocks}, 0.01, device)
    meter = RoutingMeter()
    observe_gates(blocks, model.config, meter, BalanceLosses(spec), bias)
    torch.manual_seed(3)
    x = y = torch.randn(1, 32, 32, device=device, requires_grad=True)
    mask_T = torch.arange(32, device=device) > 4
    on_gpu = torch.cuda.set_sync_debug_mode if device == "cuda" else lambda mode: None
    on_gpu("error")
    try:
        with batch_context(BatchContext(shape=(2, 16), mask_T=mask_T)):
            for block in blocks:
                weighted = _weighted(block.gate)
                y = y + (checkpoint(weighted, y, use_reentrant=False) if checkpointed else weighted(y))
            y.sum().backward()
        bias.commit()
    finally:
        on_gpu("default")
    return [x.grad, *(block.gate.weight.grad for block in blocks), bias.bias_ME, meter.take().counts_ME]


def _weighted(gate):
    def weighted(x):
        _, weights_TK, index_TK = gate(x)
        return (weights_TK * index_TK).sum(1).view(1, -1, 1) * x

    return weighted


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("by", ["position", "probability"])
@pytest.mark.parametrize("aux", ["micro_batch", "sequence", "global_batch", "hf"])
def test_gates_repeat_bit_by_bit_and_read_nothing_back_from_a_gpu(aux, by, device):
    """On a GPU, checkpointed layers are recomputed in a thread of autograd's, which must see the context."""
    spec = BalanceSpec(aux, 0.1, expert_coef=0.1, device_coef=0.1, communication_coef=0.1, z_coef=0.1, devices=4)
    torch.use_deterministic_algorithms(True)
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False  # as training has it
    try:
        results = [deterministic_step(device, spec, by, checkpointed) for checkpointed in (False, True, True)]
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = fill
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
