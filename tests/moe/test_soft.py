"""Soft MoE against loops over slots and tokens, in float64, with gradients."""

import pytest
import torch
from torch.nn import functional as F

from moe.convert import convert
from moe.families import FamilyError
from moe.refs import TensorAddress
from moe.soft import SoftMoE, replace_blocks


def expert(x_H, gate_up, down):
    gate_I, up_I = (gate_up @ x_H).chunk(2)
    return down @ (F.silu(gate_I) * up_I)


def naive(block, x_BSH):
    weights = block.experts.gate_up_proj, block.experts.down_proj
    columns = [v / v.norm() * block.slot_scale[0] for v in block.slot_vectors.T]
    out = []
    for x_SH in x_BSH:
        logits = torch.stack([torch.stack([x / x.norm() @ v for v in columns]) for x in x_SH])
        slots = []
        for m in range(len(columns)):
            into = sum(w * x for w, x in zip(logits[:, m].softmax(0), x_SH, strict=True))
            e = m // block.slots
            slots.append(expert(into, weights[0][e], weights[1][e]))
        out.append(torch.stack([sum(w * y for w, y in zip(row.softmax(0), slots, strict=True)) for row in logits]))
    return torch.stack(out)


def same_with_gradients(block, compute, x_BSH, rtol):
    """``block`` and ``compute(x)`` give the same output, and the same gradients of x and of every parameter."""
    found = []
    for function in (block, compute):
        block.zero_grad()
        x = x_BSH.clone().requires_grad_()
        y = function(x)
        (y * torch.arange(y.numel()).view_as(y).cos()).sum().backward()
        found.append([y.detach(), x.grad, *(p.grad.clone() for p in block.parameters())])
    names = ["output", "x", *dict(block.named_parameters())]
    for name, got, want in zip(names, *found, strict=True):
        assert want.abs().max() > 0, f"{name}: nothing to compare"
        torch.testing.assert_close(got, want, rtol=rtol, atol=rtol * float(want.abs().max()), msg=name)


@pytest.mark.parametrize("slots", [1, 3])
def test_output_and_gradients_equal_the_loops(tiny_model, slots):
    block = SoftMoE(convert(tiny_model().double())[0], slots, seed=1)
    torch.nn.init.constant_(block.slot_scale, 3.0)
    x_BSH = torch.randn(2, 5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    # The softmaxes are taken in fp32.
    same_with_gradients(block, lambda x: naive(block, x), x_BSH, rtol=1e-5)


def test_replaced_blocks_run_in_the_model_and_keep_the_experts_names(tiny_model):
    model = tiny_model()
    before = {name: p for name, p in model.named_parameters() if ".experts." in name}
    made = replace_blocks(model, convert(model), lambda block: SoftMoE(block, 2, seed=1))
    assert len(made) == 2
    after = dict(model.named_parameters())
    assert all(after[name] is p for name, p in before.items())
    assert all(p.address.param == name for name, p in after.items())
    down = after["model.layers.1.mlp.experts.down_proj"].address
    assert down == TensorAddress("model.layers.1.mlp.experts.down_proj", (8, 32, 16), 1, "down_proj", 0, 8)
    assert not after["model.layers.1.mlp.slot_vectors"].address.is_expert
    assert not torch.equal(made[0].slot_vectors, made[1].slot_vectors)
    ids_BS = torch.arange(12).view(2, 6)
    model(input_ids=ids_BS, labels=ids_BS, use_cache=False).loss.backward()
    assert [name for name, p in after.items() if p.grad is None or not p.grad.any()] == []


def test_a_block_with_a_shared_expert_is_refused(tiny_model):
    block = convert(tiny_model())[0]
    block.module.shared_expert = torch.nn.Linear(1, 1)
    with pytest.raises(FamilyError, match="would lose"):
        SoftMoE(block, 1, seed=0)
