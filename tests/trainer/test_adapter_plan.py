"""What a plan predicts from shapes is what attaching makes: numbers, places and bytes."""

from __future__ import annotations

import pytest
import torch

from lora.attach import attach, places_of
from lora.config import BankConfig
from lora.presets import PRESETS, expand
from moe.build import new_model
from moe.convert import convert
from trainer.model_shapes import model_shapes
from trainer.plan import PlanError, bank_parameters

MOE = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 8,
    "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8,
}  # fmt: skip
LATENT = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "num_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16, "n_shared_experts": 1, "kv_lora_rank": 8, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8, "v_head_dim": 8, "first_k_dense_replace": 1, "intermediate_size": 24,
}  # fmt: skip
FAMILIES = {
    "qwen3_moe": MOE,
    "mixtral": MOE,
    "qwen2_moe": {**MOE, "shared_expert_intermediate_size": 20},
    "deepseek_v3": LATENT,
    "gpt_oss": MOE,
}


def of_family(family: str):
    return new_model(family, FAMILIES[family], vocab_size=64, seed=0, dtype=torch.float32)


def shapes_of(model) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


@pytest.mark.parametrize("family", FAMILIES)
def test_places_read_off_shapes_are_those_of_the_modules(family):
    model = of_family(family)
    shapes = shapes_of(model)
    theirs, ours = places_of(model, convert(model)), model_shapes(shapes, 2).places
    for site in ("linear", "experts", "ffn", "parallel"):
        assert sorted(ours.of(site)) == sorted(theirs.of(site)), site
    assert set(ours.refused) >= set(theirs.refused)


def banks_for(preset: str, family: str) -> dict[str, BankConfig]:
    full = expand(BankConfig(preset))
    more = {"num_tasks": 3} if full.router == "task" else {}
    targets = full.targets
    if family == "deepseek_v3" and full.site == "linear":
        targets = ("kv_a_proj_with_mqa", "layers.[12].self_attn.o_proj")
    elif preset == "loramoe" and family != "deepseek_v3":
        targets = ("shared_expert.*_proj",) if family == "qwen2_moe" else ("q_proj", "o_proj")
    return {"one": BankConfig(preset, targets, **more)}


def has_place(preset: str, family: str) -> bool:
    return expand(BankConfig(preset)).site != "ffn" or family == "deepseek_v3"


CASES = [(preset, family) for family in FAMILIES for preset in PRESETS if has_place(preset, family)]


@pytest.mark.parametrize(("preset", "family"), CASES)
def test_predicted_parameters_are_the_attached_ones(preset, family):
    model, banks = of_family(family), banks_for(preset, family)
    shapes = shapes_of(model)
    report = attach(model, banks, convert(model))
    found = bank_parameters(banks, shapes, 2)["one"]
    attached = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert found.total == sum(p.numel() for p in attached.values()) == sum(m.parameters for m in report.matches)
    assert found.of_experts == sum(p.numel() for p in attached.values() if p.address.is_expert)


@pytest.mark.parametrize(
    ("bank", "part"),
    [
        (BankConfig("expert-lora", r=8, rank_rule="per_active"), 4),
        (BankConfig("expert-lora", r=8, rank_rule="per_total"), 1),
        (BankConfig("mola", r=(2, 4), num_experts=(2, 6)), None),
        (BankConfig("moslora", num_experts=3, combine="sum"), None),
        (BankConfig("hydralora", mixer=True), None),
        (BankConfig("adamole", num_experts=(2, 3)), None),
        (BankConfig("mov", num_experts=4, combine="top_k", top_k=2), None),
    ],
)
def test_ranks_lists_and_mixers_are_counted_too(bank, part):
    model = of_family("qwen3_moe")
    shapes = shapes_of(model)
    report = attach(model, {"one": bank}, convert(model))
    assert bank_parameters({"one": bank}, shapes, 2)["one"].total == sum(report.trainable.values())
    if part:
        assert {m.r for m in report.matches} == {part}


def test_what_attach_would_refuse_the_plan_refuses():
    shapes = shapes_of(of_family("qwen3_moe"))
    for bank, part in [
        (BankConfig("mixlora"), "matches no dense feed-forward block"),
        (BankConfig("lora", ("lm_head",)), "output layer"),
        (BankConfig("lora", ("mlp.gate",)), "routers choose experts"),
        (BankConfig("mola", num_experts=(2, 3, 4)), "do not divide the model's 2 layers"),
    ]:
        with pytest.raises(PlanError, match=part):
            bank_parameters({"one": bank}, shapes, 2)
