from __future__ import annotations

import pytest
import torch

from lora.attach import attach, format_table
from lora.config import BankConfig
from lora.errors import AdapterError
from moe.build import new_model
from moe.convert import convert
from moe.families import find_moe_blocks
from moe.layout import Layout

EXPERT = BankConfig("expert-lora", r=4, alpha=8.0)
MOLA = BankConfig("mola", r=2, alpha=4.0, num_experts=4, top_k=2)
IDS = torch.arange(24).reshape(2, 12)


def test_only_adapters_train_and_the_report_counts_them(tiny_moe):
    model = tiny_moe()
    base = sum(p.numel() for p in model.parameters())
    names = {name for name, _ in model.named_parameters()}
    report = attach(model, {"e": EXPERT, "a": MOLA}, convert(model))
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(".adapter." in name for name in trainable)
    assert {name for name, _ in model.named_parameters()} == names | set(trainable)
    assert all(p.address.param == name for name, p in model.named_parameters())
    assert report.frozen == base
    assert report.trainable == {
        "expert adapters": 2 * 8 * 4 * (32 + 32 + 16 + 32),
        "linear banks": 2 * 4 * 2 * ((32 + 32) + (32 + 16)),
        "bank routers": 2 * 2 * 4 * 32,
    }
    assert sum(report.trainable.values()) == sum(p.numel() for p in trainable.values())
    assert sum(m.parameters for m in report.matches) == sum(report.trainable.values())
    table = format_table(report)
    expected = "a linear q_proj 2 4 2 640 1,280 model.layers.0.self_attn.q_proj"
    assert expected in [" ".join(line.split()) for line in table.splitlines()]
    assert "model.layers.0.self_attn.q_proj" in table
    assert f"frozen {base:,}" in table


def test_outputs_are_unchanged_while_b_is_zero(tiny_moe):
    model = tiny_moe().eval()
    tokens = torch.arange(12).view(2, 6)
    blocks = convert(model)
    for block in blocks:
        block.experts.wanted_backend = "grouped_mm"  # as with an adapter: others add up in another order
    with torch.no_grad():
        before = model(tokens).logits
        attach(model, {"e": EXPERT, "a": MOLA}, blocks)
        assert torch.equal(model(tokens).logits, before)


def test_counts_do_not_depend_on_the_expert_parallel_degree(tiny_moe):
    reports = []
    for ep in (1, 4):
        model = tiny_moe()
        reports.append(attach(model, {"e": EXPERT}, convert(model, Layout(ep, ep), ep - 1), layout_ep=ep))
    assert reports[0] == reports[1]


@pytest.mark.parametrize(
    ("banks", "parts"),
    [
        ({"a": BankConfig("mola", targets=["q_prj"])}, ["adapter.a", "q_prj", "k_proj", "o_proj", "q_proj"]),
        ({"e": BankConfig("expert-lora", targets=["w1"])}, ["adapter.e", "w1", "gate_up_proj"]),
        ({"e": EXPERT, "f": BankConfig("expert-lora", targets=["down_proj"])}, ["adapter.f", "down_proj", "adapter.e"]),
        ({"a": BankConfig("mola", top_k=5)}, ["adapter.a", "top_k=5", "num_experts=4"]),
        ({"a": BankConfig("mola", r=0)}, ["adapter.a.r must be at least 1, not 0"]),
        ({"a": BankConfig("lra", r=1)}, ["adapter.a", "'lra'", "mola"]),
        ({"a": MOLA, "b": BankConfig("mola", targets=["self_attn.q_proj"])}, ["adapter.b", "q_proj", "already"]),
        ({"a": BankConfig("lora", ("lm_head",))}, ["adapter.a", "names lm_head, and the output layer", "q_proj"]),
        ({"a": BankConfig("lora", ("*",))}, ["adapter.a", "'*' also names lm_head", "'layers.*.q_proj'"]),
        ({"a": BankConfig("lora", ("layers.7.*",))}, ["adapter.a", "matches no linear layer", "k_proj"]),
        ({"a": BankConfig("lora", ("down_proj",))}, ["no linear layer", "which is for presets of site: experts"]),
        ({"e": BankConfig("expert-lora", ("layers.5.*.down_proj",))}, ["adapter.e", "matches no tensor of routed"]),
    ],
)
def test_banks_that_cannot_be_attached_are_named(tiny_moe, banks, parts):
    model = tiny_moe()
    with pytest.raises(AdapterError) as caught:
        attach(model, banks, convert(model))
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_two_expert_banks_may_share_the_experts(tiny_moe):
    model = tiny_moe()
    up, down = BankConfig("expert-lora", ["gate_up_proj"], r=2), BankConfig("expert-lora", ["down_proj"], r=5)
    blocks = convert(model)
    attach(model, {"up": up, "down": down}, blocks)
    adapter = blocks[0].experts.adapter
    assert (adapter.gate_up_proj.A.shape[1], adapter.down_proj.A.shape[1]) == (2, 5)


def test_refuses_unconverted_or_adapted_experts(tiny_moe):
    model = tiny_moe()
    with pytest.raises(AdapterError, match=r"model\.layers\.0\.mlp\.experts .Qwen3MoeExperts.*convert"):
        attach(model, {"e": EXPERT}, find_moe_blocks(model))
    blocks = convert(model)
    attach(model, {"e": EXPERT, "a": MOLA}, blocks)
    with pytest.raises(AdapterError, match="already has an adapter"):
        attach(model, {"e": EXPERT}, blocks)
    model = tiny_moe()
    with pytest.raises(AdapterError, match=r"ep=2.*ep=1"):
        attach(model, {"e": EXPERT}, convert(model, Layout(2, 2)), layout_ep=1)


def test_never_wraps_a_router_even_if_it_is_a_linear_layer(tiny_moe):
    model = tiny_moe()
    for layer in model.model.layers:
        layer.mlp.gate = torch.nn.Linear(32, 8, bias=False)
    with pytest.raises(AdapterError, match=r"'gate' names model\.layers\.0\.mlp\.gate, and routers .* layers k_proj, "):
        attach(model, {"a": BankConfig("mola", ("gate",))}, convert(model))


SHAPE = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}  # fmt: skip
LATENT = {
    "n_shared_experts": 1, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "first_k_dense_replace": 1, "intermediate_size": 24,
}  # fmt: skip


def of_family(family, **more):
    model = new_model(family, {**SHAPE, **more}, vocab_size=64, seed=0, dtype=torch.float32)
    return model, convert(model)


def test_transposed_and_interleaved_experts_take_an_expert_bank_and_attention_another():
    model, blocks = of_family("gpt_oss", num_key_value_heads=1)
    report = attach(model, {"experts": BankConfig("expert-lora", r=2), "attention": MOLA}, blocks)
    assert [match.target for match in report.matches][-4:] == ["q_proj"] * 2 + ["v_proj"] * 2
    factors = blocks[0].experts.adapter.gate_up_proj
    assert (factors.A.shape, factors.B.shape) == ((4, 2, 32), (4, 32, 2))
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(("share", "stacks"), [("all", (1, 1, 1, 1)), ("outer", (1, 8, 8, 1)), ("none", (8, 8, 8, 8))])
def test_factors_that_experts_share_are_one_and_ordinary_parameters(tiny_moe, share, stacks):
    model = tiny_moe()
    attach(model, {"e": BankConfig("expert-lora", r=4, share=share)}, convert(model, Layout(2, 2), 1), layout_ep=2)
    adapter = model.model.layers[0].mlp.experts.adapter
    found = dict(adapter.named_parameters())
    for parameter, stack in zip(found.values(), stacks, strict=True):
        assert parameter.shape[0] == (1 if stack == 1 else 4)
        assert parameter.address.global_shape[0] == stack
        assert parameter.address.is_expert == (stack > 1)
        assert hasattr(parameter, "group_name") == (stack > 1)
    other = tiny_moe()
    attach(other, {"e": BankConfig("expert-lora", r=4, share=share)}, convert(other))
    for name, parameter in other.model.layers[0].mlp.experts.adapter.named_parameters():
        mine = parameter if parameter.shape[0] == 1 else parameter[4:]
        assert torch.equal(found[name], mine), name


def test_only_routed_experts_of_layers_that_have_them_get_an_expert_bank():
    model, blocks = of_family("deepseek_v3", **LATENT)
    for block in blocks:
        block.experts.wanted_backend = "grouped_mm"  # as with an adapter: others add up in another order
    before = model(input_ids=IDS).logits
    report = attach(model, {"experts": BankConfig("expert-lora", r=2)}, blocks)
    assert {match.path for match in report.matches} == {"model.layers.1.mlp.experts"}
    assert torch.equal(model(input_ids=IDS).logits, before)
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_a_projection_that_latent_attention_does_not_have_is_named():
    model, blocks = of_family("deepseek_v3", **LATENT)
    with pytest.raises(AdapterError, match=r"'v_proj' matches no linear layer; the model has: .*kv_b_proj"):
        attach(model, {"attention": MOLA}, blocks)


def test_patterns_give_banks_to_some_layers_and_a_wildcard_leaves_the_router_alone(tiny_moe):
    model = tiny_moe()
    model.model.layers[0].mlp.gate = torch.nn.Linear(32, 8, bias=False)
    banks = {
        "attention": BankConfig("lora", ("layers.0.*",), r=2),
        "upper": BankConfig("expert-lora", ("layers.1.*.gate_up_proj",), r=3),
        "lower": BankConfig("expert-lora", ("layers.0.*_proj", "layers.1.mlp.experts.down_proj"), r=5),
    }
    report = attach(model, banks, convert(model))
    assert {m.path for m in report.matches if m.bank == "attention"} == {
        f"model.layers.0.self_attn.{name}_proj" for name in "qkvo"
    }
    low, up = (layer.mlp.experts.adapter for layer in model.model.layers)
    assert [low.gate_up_proj.A.shape[1], low.down_proj.A.shape[1]] == [5, 5]
    assert [up.gate_up_proj.A.shape[1], up.down_proj.A.shape[1]] == [3, 5]


def test_rank_per_active_expert_asks_the_model_how_many_a_token_has(tiny_moe):
    model = tiny_moe()
    attach(model, {"e": BankConfig("expert-lora", r=8, rank_rule="per_active")}, convert(model))
    assert model.model.layers[0].mlp.experts.adapter.down_proj.A.shape[1] == 4
