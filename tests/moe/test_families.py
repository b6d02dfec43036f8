"""The parity ladder: every family against transformers' own forward and backward pass.

Names as in moe: T tokens, K choices, H hidden.
"""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from moe.build import new_config
from moe.convert import convert
from moe.families import FamilyError, find_moe_blocks
from moe.family_table import FAMILIES
from moe.layout import Layout

EVERY = pytest.mark.parametrize("family", sorted(FAMILIES))
TOLERANCE = 1e-6
BATCHES_SBT = torch.randint(0, 64, (20, 4, 16), generator=torch.Generator().manual_seed(7)) ** 2 // 64


def distance(got, want):
    """Norm of the difference over norm of the reference."""
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).norm() / want.norm().clamp(min=1e-30))


def pair(tiny_family, family):
    """transformers' model, and the same one with our experts."""
    theirs = tiny_family(family)
    ours = copy.deepcopy(theirs)
    convert(ours)
    return theirs, ours


def routing(model, ids_BT):
    """Every gate's chosen experts in one forward pass, layer by layer."""
    chosen = []
    hooks = [b.gate.register_forward_hook(lambda _m, _a, out: chosen.append(out[-1])) for b in find_moe_blocks(model)]
    with torch.no_grad():
        model(input_ids=ids_BT)
    for hook in hooks:
        hook.remove()
    return chosen


@EVERY
def test_every_layer_chooses_the_same_experts(tiny_family, family):
    theirs, ours = pair(tiny_family, family)
    want, got = routing(theirs, BATCHES_SBT[0]), routing(ours, BATCHES_SBT[0])
    assert len(want) == 2
    for theirs_TK, ours_TK in zip(want, got, strict=True):
        assert theirs_TK.shape == (64, 3)
        assert theirs_TK.unique().numel() > 3, "the router sends everything to the same experts"
        assert torch.equal(theirs_TK, ours_TK)


@EVERY
def test_a_block_has_the_output_and_gradients_of_transformers(tiny_family, family):
    theirs, ours = pair(tiny_family, family)
    generator = torch.Generator().manual_seed(2)
    x_BTH = torch.randn(3, 11, 32, generator=generator)
    upstream_BTH = torch.randn(3, 11, 32, generator=generator)
    results = []
    for model in (theirs, ours):
        module, inputs = find_moe_blocks(model)[0].module, x_BTH.clone().requires_grad_()
        output = module(inputs)
        output = output[0] if isinstance(output, tuple) else output
        output.backward(upstream_BTH)
        results.append((output.detach(), inputs.grad, {name: p.grad for name, p in module.named_parameters()}))
    (want, want_x, wanted), (got, got_x, gotten) = results
    assert distance(got, want) <= TOLERANCE
    assert distance(got_x, want_x) <= TOLERANCE
    assert gotten.keys() == wanted.keys()
    for name, grad in wanted.items():
        assert grad.abs().sum() > 0, f"{name} plays no part"
        assert distance(gotten[name], grad) <= TOLERANCE, name


@EVERY
def test_a_model_has_the_logits_and_gradients_of_transformers(tiny_family, family):
    theirs, ours = pair(tiny_family, family)
    ids_BT = BATCHES_SBT[0]
    outputs = [model(input_ids=ids_BT, labels=ids_BT) for model in (theirs, ours)]
    assert distance(outputs[1].logits, outputs[0].logits) <= TOLERANCE
    for output in outputs:
        output.loss.backward()
    gotten = dict(ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        assert distance(gotten[name].grad, parameter.grad) <= TOLERANCE, name


@EVERY
def test_twenty_sgd_steps_follow_the_loss_curve_of_transformers(tiny_family, family):
    curves = []
    for model in pair(tiny_family, family):
        # Plain SGD: AdamW would hide gradients of a wrong scale.
        optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.3), []
        for ids_BT in BATCHES_SBT:
            loss = model(input_ids=ids_BT, labels=ids_BT).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        curves.append(losses)
    assert curves[0][-1] < curves[0][0] - 0.1, "nothing was learned: the comparison would be empty"
    assert curves[1] == pytest.approx(curves[0], rel=1e-5)


@EVERY
def test_a_rank_holds_its_half_of_the_experts_under_global_names(tiny_family, family):
    whole = find_moe_blocks(tiny_family(family))
    for rank in range(2):
        for block, full in zip(convert(tiny_family(family), Layout(2, 2), rank), whole, strict=True):
            for name, parameter in block.experts.named_parameters():
                assert torch.equal(parameter, getattr(full.experts, name)[4 * rank : 4 * rank + 4])
                units = [span.unit for span in parameter.address.units()]
                assert units == [f"L{block.layer:02d}.E{e:03d}.{name}" for e in range(4 * rank, 4 * rank + 4)]


def test_half_precision_leaves_the_correction_bias_and_the_rotary_frequencies_alone(tiny_family):
    model, exact = tiny_family("deepseek_v3", dtype=torch.bfloat16), tiny_family("deepseek_v3")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    buffers = dict(model.named_buffers())
    assert any(name.endswith("e_score_correction_bias") for name in buffers)
    for name, buffer in exact.named_buffers():
        assert buffers[name].dtype == buffer.dtype == torch.float32
        assert torch.equal(buffers[name], buffer)


@EVERY
def test_a_key_that_the_family_does_not_have_is_refused(tiny_families, family):
    foreign = "v_head_dim" if "v_head_dim" not in FAMILIES[family].fields else "head_dim"
    with pytest.raises(FamilyError, match=rf"{family} has no {foreign}; it has hidden_size"):
        new_config(family, {**tiny_families[family], foreign: 8}, vocab_size=64)


def test_a_missing_key_and_an_unknown_family_are_refused(tiny_families):
    fields = dict(tiny_families["deepseek_v2"])
    del fields["kv_lora_rank"]
    with pytest.raises(FamilyError, match="deepseek_v2 needs kv_lora_rank"):
        new_config("deepseek_v2", fields, vocab_size=64)
    with pytest.raises(FamilyError, match="no family 'llama4'; planaria has mixtral, "):
        new_config("llama4", {}, vocab_size=64)


FOREIGN = {
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 16},
    "jetmoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 16, "kv_channels": 8},
    "llama4_text": {
        "num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size": 16, "intermediate_size_mlp": 16,
        "head_dim": 8, "interleave_moe_layer_step": 1,
    },
    "glm4_moe": {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 0,
        "intermediate_size": 16, "head_dim": 8,
    },
    "llama": {"intermediate_size": 16},
}  # fmt: skip


@pytest.mark.parametrize("kind", sorted(FOREIGN))
def test_a_family_that_we_do_not_know_is_refused_with_what_was_looked_for_and_found(kind):
    sizes = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
             "num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}  # fmt: skip
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, **FOREIGN[kind]))
    with pytest.raises(FamilyError, match=r"looked for .*, found |looked for .*; found ") as refusal:
        convert(model)
    assert type(model).__name__ in str(refusal.value)
