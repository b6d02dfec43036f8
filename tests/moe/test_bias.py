"""The bias that balances without a loss, and balance over two real ranks (gloo)."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.balance import BalanceLosses, BalanceSpec
from moe.bias import BiasBalance, biases
from moe.context import BatchContext, batch_context
from moe.convert import convert
from moe.gates import RoutingPolicy, observe_gates, replace_gate
from moe.routing import RoutingError, route, spec_of
from moe.stats import RoutingMeter
from tests.moe.balance_rank import passes
from tests.moe.tiny_families import tiny

IDS = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(1))


@given(counts=st.lists(st.lists(st.integers(0, 9), min_size=4, max_size=4), min_size=1, max_size=3))
@settings(max_examples=40, deadline=None)
def test_a_bias_moves_by_the_rate_away_from_the_mean(counts):
    balance = BiasBalance({5: torch.zeros(4), 2: torch.ones(4)}, 0.125)
    for row in counts:
        balance.add(5, torch.tensor(row))
    balance.commit()
    sums = torch.tensor(counts).sum(0).double()
    assert torch.equal(balance.row(5).double(), 0.125 * torch.sign(sums.mean() - sums))
    assert torch.equal(balance.row(2), torch.ones(4))  # nothing was routed there
    before = balance.bias_ME.clone()
    balance.commit()
    assert torch.equal(balance.bias_ME, before), "counts were not forgotten"


def test_biases_survive_a_dump_bit_by_bit_and_pending_counts_do_not():
    balance = BiasBalance({0: torch.randn(4), 1: torch.randn(4)}, 0.1)
    other = BiasBalance({0: torch.zeros(4), 1: torch.zeros(4)}, 0.1)
    row = other.row(1)
    other.add(0, torch.tensor([1, 0, 0, 0]))
    other.load(balance.dump())
    assert torch.equal(row, balance.row(1)), "gates would go on with another tensor"
    other.commit()
    assert torch.equal(other.bias_ME, balance.bias_ME)
    assert torch.equal(biases(balance.dump(), 4), balance.bias_ME)
    with pytest.raises(RoutingError, match="8 selection biases, the model 4"):
        BiasBalance({0: torch.zeros(4)}, 0.1).load(balance.dump())


def biased_model(family, rate=0.05, checkpointed=False):
    model = tiny(family).train()
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    blocks = convert(model)
    begin = {b.layer: getattr(b.gate, "e_score_correction_bias", torch.zeros(8)) for b in blocks}
    balance = BiasBalance(begin, rate)
    blocks = [replace_gate(b, RoutingPolicy(spec_of(b.gate, model.config))) for b in blocks]
    observe_gates(blocks, model.config, RoutingMeter(), BalanceLosses(BalanceSpec()), balance)
    return model, blocks, balance


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_the_bias_chooses_and_never_weighs(family):
    model, blocks, balance = biased_model(family)
    x = torch.randn(50, 32, generator=torch.Generator().manual_seed(2))
    gate, spec = blocks[1].gate, blocks[1].gate.policy.spec
    balance.row(1).copy_(torch.tensor([0.0] * 7 + [100.0]))  # every token must take expert 7
    grouped = dataclasses.replace(spec, n_group=1, topk_group=1)
    gate.policy = RoutingPolicy(grouped)
    logits, weights, index = gate(x)
    assert (index == 7).any(1).all()
    assert torch.equal(weights, route(logits, grouped, index_TK=index)[0])
    assert "bias_E" not in model.state_dict()


@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_bias_evens_the_load_out(checkpointed):
    model, _, balance = biased_model("qwen3_moe", 0.01, checkpointed)
    balance.bias_ME[:, 0] = 0.2  # at first every token goes to expert 0
    spread, counts = [], {}

    def record(layer, index_TK, _weights_TK):
        counts[layer] = torch.bincount(index_TK.flatten(), minlength=8)

    for _ in range(25):
        with batch_context(BatchContext(record=record)):
            model(IDS, labels=IDS).loss.backward()
        assert torch.equal(balance._counts_ME, torch.stack([counts[0], counts[1]])), "a recompute was counted"
        balance.commit()
        spread.append(float(torch.stack([counts[0], counts[1]]).double().std(1).mean()))
    assert spread[-1] < 0.6 * spread[0]


def test_a_cast_model_keeps_its_biases_in_fp32():
    model, blocks, balance = biased_model("deepseek_v3")
    balance.row(0).fill_(1 + 2**-20)
    model.bfloat16()
    assert blocks[0].gate.bias_E.dtype == torch.float32
    assert float(blocks[0].gate.bias_E[0]) == 1 + 2**-20


# -- two ranks ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranks(two_ranks):
    return lambda part: [torch.load(two_ranks / f"{part}-{rank}.pt") for rank in range(2)]


@pytest.fixture(scope="module")
def one_process():
    """The global-batch loss of both ranks, added up where all choices are at hand."""
    model = tiny("qwen3_moe").train()
    blocks, seen = convert(model), []
    for block in blocks:
        block.gate.register_forward_hook(lambda _m, _a, out: seen.append((out[0], out[2])))
    total, chosen, masks = 0.0, {0: [], 1: []}, []
    for micro in range(2):
        both = [passes(rank)[micro] for rank in range(2)]
        logits = {0: [], 1: []}
        for ids, mask in both:
            seen.clear()
            model(ids, attention_mask=mask.long())
            for layer, (of_layer, index) in enumerate(seen):
                logits[layer].append(of_layer[mask.flatten()])
                chosen[layer].append(index[mask.flatten()])
            masks.append(mask)
        tokens = sum(int(mask.sum()) for mask in masks)
        for layer in (0, 1):
            all_chosen, p = torch.cat(chosen[layer]), torch.cat(logits[layer]).softmax(-1)
            f = torch.bincount(all_chosen.flatten(), minlength=8) / tokens
            mean = p.sum(0) / (tokens / (micro + 1))  # in units of the tokens of one micro-step so far
            total = total + 8 * (f * mean).sum()
    (total / 2).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None and "experts" not in name}


@pytest.mark.parametrize("part", ["plain", "checkpointed", "ep"])
def test_the_global_batch_loss_of_two_ranks_is_that_of_all_tokens(ranks, one_process, part):
    for got in ranks(part):
        for name, want in one_process.items():
            if want.norm() > 0:
                assert (got[name] - want).norm() < 1e-5 * want.norm(), name


def test_two_ranks_move_the_same_biases_by_what_both_chose_in_one_exchange(ranks):
    first, second = ranks("bias")
    assert torch.equal(first["bias"], second["bias"])
    counts = (first["chosen"] + second["chosen"]).double()
    assert not torch.equal(first["chosen"], second["chosen"])
    want = 0.01 * torch.sign(counts.mean(1, keepdim=True) - counts)
    torch.testing.assert_close(first["bias"].double(), want, rtol=1e-6, atol=0)
    assert int(first["calls"]) == 1
