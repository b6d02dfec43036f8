"""Routers by their numbers against transformers' own gates."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.families import FamilyError, find_moe_blocks
from moe.gates import Gate, RoutingPolicy, replace_gate
from moe.routing import RouterSpec, RoutingError, _Picked, config_fields, route, spec_of
from tests.moe.tiny_families import FAMILIES, tiny


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_picking_on_a_gpu_has_the_values_and_gradients_of_gathering(dtype):
    scores = [seeded(50, 12, dtype=dtype).requires_grad_() for _ in range(2)]
    index = torch.topk(scores[0].detach(), 5).indices
    picked, gathered = _Picked.apply(scores[0], index), scores[1].gather(1, index)
    assert torch.equal(picked, gathered)
    for found in (picked, gathered):
        found.backward(seeded(50, 5, seed=1, dtype=dtype))
    assert scores[0].grad.dtype == dtype
    assert torch.equal(scores[0].grad, scores[1].grad)


def test_replayed_choices_get_the_weights_of_their_scores():
    spec = RouterSpec(8, 2, norm_topk=True)
    logits = seeded(5, 8)
    index = torch.tensor([[0, 1]] * 5)
    weights, same = route(logits, spec, index_TK=index)
    assert same is index
    p = logits.softmax(-1)[:, :2]
    torch.testing.assert_close(weights, p / p.sum(1, keepdim=True))
