"""What a run exports belongs to the banks that the run attached, whatever their order and wildcards."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig

from lora.attach import attach
from lora.format import apply_adapter, collect_adapter, load_adapter
from moe.convert import convert
from trainer.export import write_adapter
from trainer.recipe import load_recipe

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "mixlora.yaml"
ALL, BESIDE = "all: {preset: lora, targets: [layers.*], r: 2}", "p: {preset: perft-r, r: 3}"
EXPERTS = "e: {preset: expert-lora, r: 4, alpha: 10.0, dropout: 0.25}"


def adapted(folder, banks):
    """A recipe with these banks on a small Mixtral, the model with them, and what was attached."""
    config = MixtralConfig(
        hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        num_local_experts=4, num_experts_per_tok=2, vocab_size=64, max_position_embeddings=512,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "base")
    recipe = load_recipe(RECIPE, [f"model.path={folder / 'base'}", f"adapter={{{', '.join(banks)}}}"])
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    return recipe, model, attach(model, recipe.adapter, convert(model))


@pytest.mark.parametrize("order", [(ALL, BESIDE, EXPERTS), (EXPERTS, BESIDE, ALL)], ids=["wildcard first", "last"])
def test_each_tensor_goes_to_the_bank_that_trained_it(tmp_path, order):
    recipe, model, report = adapted(tmp_path, order)
    write_adapter(recipe, collect_adapter(model), tmp_path / "out")
    adapter = load_adapter(tmp_path / "out")
    sites = {match.path: match.bank for match in report.matches}
    for path, owner in adapter.owners.items():
        place, _, inner = path.rpartition(".adapter.")
        assert owner == sites.get(place, sites.get(f"{place}.{inner.partition('.')[0]}")), path
    assert set(adapter.owners.values()) == {"all", "p", "e"}
    apply_adapter(AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32), adapter)


def test_dropout_that_peft_cannot_have_is_said(tmp_path, capsys):
    recipe, model, _ = adapted(tmp_path, ["a: {preset: lora, dropout: 0.1}", EXPERTS])
    write_adapter(recipe, collect_adapter(model), tmp_path / "out")
    assert "lora_dropout 0, the banks have adapter.a 0.1, adapter.e 0.25: PEFT takes one" in capsys.readouterr().out
    recipe, model, _ = adapted(tmp_path / "routed", ["a: {preset: mola, dropout: 0.1}"])
    write_adapter(recipe, collect_adapter(model), tmp_path / "routed" / "out")
    assert "lora_dropout" not in capsys.readouterr().out  # PEFT refuses this one
