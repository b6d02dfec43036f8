"""Only the chosen experts change; the others, and everything else, keep every bit."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe.convert import convert
from moe.extend import ExtendError
from moe.layout import Layout
from moe.refs import TensorAddress
from moe.selected import select, train_experts

CHOSEN = {0: (1, 2, 7), 1: (4,)}
IDS = torch.arange(24).view(2, 12)


@given(st.lists(st.floats(0.001, 10), min_size=1, max_size=12), st.floats(0.01, 1))
def test_the_fewest_largest_shares_that_reach_p(shares, p):
    chosen = select(shares, p)
    total, got = sum(shares), sum(shares[e] for e in chosen)
    assert got >= p * total * (1 - 1e-12) or len(chosen) == len(shares)
    assert all(shares[e] >= shares[other] for e in chosen for other in set(range(len(shares))) - set(chosen))
    least = min(chosen, key=lambda e: (shares[e], -e))
    assert len(chosen) == 1 or got - shares[least] < p * total * (1 + 1e-12)
    assert list(chosen) == sorted(chosen)


def test_shares_are_of_one_layer_alone():
    """Normalised over layers instead, expert 1 of the second layer would seem to have more than 0.3."""
    assert [select(layer, 0.3) for layer in ([8, 1, 1], [1, 5, 4])] == [(0,), (1,)]


def test_outputs_stay_and_the_chosen_get_the_gradients_that_all_would_have(tiny_model):
    plain, split = tiny_model(), tiny_model()
    blocks = convert(plain), convert(split)
    train_experts(split, blocks[1], CHOSEN)
    losses = []
    for model in (plain, split):
        losses.append(model(input_ids=IDS, labels=IDS, use_cache=False).loss)
        losses[-1].backward()
    assert torch.equal(*losses)
    trained = {name: p for name, p in split.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * (2 + 1), "two tensors, a parameter for each run of neighbours"
    whole = dict(plain.named_parameters())
    for p in trained.values():
        first = p.address.first_expert
        assert torch.equal(p.grad, whole[p.address.param].grad[first : first + len(p)])
    address = blocks[1][0].experts.chosen.down_proj_1.address
    assert address == TensorAddress("model.layers.0.mlp.experts.down_proj", (2, 32, 16), 0, "down_proj", 1, 8)
    assert not any(name.endswith("experts.down_proj") for name in split.state_dict())


def test_an_optimizer_step_changes_the_chosen_alone_and_the_next_pass_uses_them(tiny_model):
    model = tiny_model()
    blocks = convert(model)
    before = copy.deepcopy({name: p.detach() for name, p in model.named_parameters()})
    train_experts(model, blocks, CHOSEN)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.5)
    for _ in range(3):
        for _ in range(2):  # two micro-batches, whose graphs both hold the stacked tensors
            loss = [model(input_ids=IDS, labels=IDS, use_cache=False).loss for _ in range(2)]
            sum(loss).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        last = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    for block in blocks:
        for name in ("gate_up_proj", "down_proj"):
            was, now = before.pop(f"{block.path}.experts.{name}"), getattr(block.experts, name)
            changed = {e for e in range(8) if not torch.equal(was[e], now[e])}
            assert changed == set(CHOSEN[block.layer])
    now = dict(model.named_parameters())
    assert all(torch.equal(now[name], was) for name, was in before.items())

    plain = tiny_model()
    for block, other in zip(convert(plain), blocks, strict=True):
        for name in ("gate_up_proj", "down_proj"):
            getattr(block.experts, name).data.copy_(getattr(other.experts, name))
    with torch.no_grad():
        assert torch.equal(plain(input_ids=IDS, labels=IDS, use_cache=False).loss, last)


def test_a_worker_trains_its_own_share_and_must_have_one(tiny_model):
    model = tiny_model()
    blocks = convert(model, Layout(2, 2), 1)
    train_experts(model, blocks, CHOSEN)
    found = {p.address.units()[0].unit for p in model.parameters() if p.requires_grad}
    assert found == {f"L0{layer}.E00{e}.{t}" for layer, e in ((0, 7), (1, 4)) for t in ("gate_up_proj", "down_proj")}
    model = tiny_model()
    with pytest.raises(ExtendError, match=r"none of the experts 4 to 7 of any layer.*lower parallel\.ep"):
        train_experts(model, convert(model, Layout(2, 2), 1), {0: (1,)})


@pytest.mark.parametrize(("chosen", "part"), [({5: (1,)}, "names layer 5"), ({1: (3, 8)}, "layer 1, which has 8")])
def test_what_the_model_does_not_have_is_refused(tiny_model, chosen, part):
    model = tiny_model()
    with pytest.raises(ExtendError, match=part):
        train_experts(model, convert(model), chosen)
