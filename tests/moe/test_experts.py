"""The experts seam against the naive reference and transformers, with gradients."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from moe.convert import convert
from moe.experts import Experts
from moe.families import FamilyError, find_moe_blocks
from moe.kernels.reference import moe_reference
from moe.layout import Layout


def random_experts(num_experts=5, hidden=8, inner=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    gate_up = torch.nn.Parameter(torch.randn(num_experts, 2 * inner, hidden, generator=generator, dtype=torch.float64))
    down = torch.nn.Parameter(torch.randn(num_experts, hidden, inner, generator=generator, dtype=torch.float64))
    return Experts(gate_up, down, layer=0)


@pytest.mark.parametrize(
    ("num_tokens", "top_k", "allowed"),
    [(7, 2, [0, 1, 2, 3, 4]), (9, 3, [1, 2, 4]), (1, 1, [3]), (0, 2, [0, 1])],
    ids=["all", "empty experts", "one token", "no tokens"],
)
def test_experts_equal_the_reference_with_gradients(num_tokens, top_k, allowed):
    experts = random_experts()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(num_tokens, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    choice = [torch.randperm(len(allowed), generator=generator)[:top_k] for _ in range(num_tokens)]
    index = torch.tensor(allowed)[torch.stack(choice)] if num_tokens else torch.empty(0, top_k, dtype=torch.long)
    weights = torch.rand(num_tokens, top_k, generator=generator, dtype=torch.float64, requires_grad=True)
    inputs = (x, weights, experts.gate_up_proj, experts.down_proj)

    ours = experts(x, index, weights)
    theirs = moe_reference(x, index, weights, experts.gate_up_proj, experts.down_proj)
    torch.testing.assert_close(ours, theirs)
    upstream = torch.randn(ours.shape, generator=generator, dtype=torch.float64)
    got = torch.autograd.grad(ours, inputs, upstream)
    want = torch.autograd.grad(theirs, inputs, upstream, allow_unused=True, materialize_grads=True)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)


def test_a_converted_model_keeps_logits_gradients_and_parameter_names(tiny_model):
    original, converted = tiny_model(), tiny_model()
    convert(converted)
    ids = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(3))
    want, got = original(input_ids=ids, labels=ids), converted(input_ids=ids, labels=ids)
    torch.testing.assert_close(got.logits, want.logits, rtol=1e-5, atol=1e-6)
    want.loss.backward()
    got.loss.backward()
    want_grads = dict(original.named_parameters())
    for name, parameter in converted.named_parameters():
        torch.testing.assert_close(parameter.grad, want_grads[name].grad, rtol=1e-4, atol=1e-7, msg=name)


def test_each_rank_gets_its_own_experts_under_global_names(tiny_model):
    whole = find_moe_blocks(tiny_model())
    for rank in range(4):
        model = tiny_model()
        blocks = convert(model, Layout(world=4, ep=2), rank)
        first = 4 * (rank % 2)
        for block, full in zip(blocks, whole, strict=True):
            torch.testing.assert_close(block.experts.down_proj, full.experts.down_proj[first : first + 4])
            units = [span.unit for span in block.experts.down_proj.address.units()]
            assert units == [f"L{block.layer:02d}.E{e:03d}.down_proj" for e in range(first, first + 4)]


def test_a_dense_model_is_refused_with_what_was_looked_for():
    config = AutoConfig.for_model(
        "llama",
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    with pytest.raises(FamilyError, match=r"no MoE block.*`gate` or `router`"):
        convert(AutoModelForCausalLM.from_config(config))
