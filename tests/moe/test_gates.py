"""A gate of ours in a model: what it draws, drops, counts, records and replays."""

import dataclasses

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from moe.balance import BalanceLosses, BalanceSpec
from moe.bias import BiasBalance
from moe.capacity import capacity
from moe.context import BatchContext, batch_context
from moe.convert import convert
from moe.families import find_moe_blocks
from moe.gates import RoutingPolicy, jittered, observe_gates, replace_gate
from moe.routing import RouterSpec, RoutingError, spec_of
from moe.stats import RoutingMeter
from tests.moe.tiny_families import tiny

NO_LOSSES = BalanceLosses(BalanceSpec())


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


def test_jitter_is_finer_than_the_models_dtype():
    """Of bf16 numbers there are three from 0.99 to 1.01."""
    factors = jittered(torch.ones(4096, dtype=torch.bfloat16), 0.01)
    assert len(factors.unique()) > 3900
    assert 0.0099 < float((factors - 1).abs().max()) <= 0.0101
