"""Dense bases: adapters train on them, the plan counts them, and whatever needs experts is refused with a way out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lora.attach import attach
from lora.presets import expansions
from moe.convert import assign_addresses
from moe.family_table import DENSE
from moe.load import FolderError, empty_model, fill
from trainer.build import build_model
from trainer.plan import PlanError, plan_run
from trainer.plan_card import card
from trainer.recipe import load_recipe
from trainer.rendezvous import Process
from trainer.schema import Recipe

MIXLORA = Path(__file__).resolve().parents[2] / "recipes" / "mixlora.yaml"
SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 64, "max_position_embeddings": 128,
}  # fmt: skip


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("dense")
    for family in DENSE:
        tied = family == "qwen3"
        config = AutoConfig.for_model(family, **SIZES, tie_word_embeddings=tied)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / family)
    return {family: folder / family for family in DENSE}


def recipe_of(base: Path, *overrides: str) -> Recipe:
    return load_recipe(MIXLORA, [f"model.path={base}", *overrides])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", DENSE)
def test_a_folder_loads_with_the_bits_of_from_pretrained(bases, family, dtype):
    model = empty_model(bases[family], dtype=dtype)
    assign_addresses(model)
    fill(model, bases[family])
    want = AutoModelForCausalLM.from_pretrained(bases[family], dtype=dtype).state_dict()
    got = model.state_dict()
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)
    assert all(parameter.address.param == path for path, parameter in model.named_parameters())


def test_a_folder_that_lacks_a_tensor_is_refused_by_its_name(bases, tmp_path):
    config = AutoConfig.for_model("llama", **SIZES | {"num_hidden_layers": 3})
    config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((bases["llama"] / "model.safetensors").read_bytes())
    model = empty_model(tmp_path, dtype=torch.float32)
    assign_addresses(model)
    with pytest.raises(FolderError, match=r"missing model\.layers\.2\.input_layernorm\.weight"):
        fill(model, tmp_path)


@pytest.mark.parametrize("family", DENSE)
def test_the_plan_counts_what_attach_puts_there(bases, family):
    recipe = recipe_of(bases[family])
    plan = plan_run(recipe)
    model = AutoModelForCausalLM.from_pretrained(bases[family])
    report = attach(model, recipe.adapter, [])
    assert sum(plan.trained.values()) == sum(report.trainable.values())
    assert sum(plan.total.values()) == report.frozen == plan.active
    text = card(recipe, num_files=1, num_bytes=1)
    assert "none in the base, which is dense, 2 layers" in text
    assert "adapter.ffn" in text


def test_a_dense_run_prints_its_banks_in_full(bases, capsys):
    recipe = recipe_of(bases["llama"])
    build_model(recipe, Process(0, 1, 0, torch.device("cpu")), vocab_size=64)
    said = capsys.readouterr().out.splitlines()
    assert [line for line in said if " = " in line] == expansions(recipe.adapter)
    assert sum(line.startswith("bank ") for line in said) == 1


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("adapter={}", "is a dense llama model, and planaria trains mixtures of experts: add an adapter section"),
        ("parallel.ep=2", r"parallel\.ep: .* is a dense llama model, without routed experts; set it to 1"),
        ("adapter={e: {preset: expert-lora}}", "adapter.e: preset expert-lora belongs to routed experts"),
        ("adapter={e: {preset: perft-r}}", "adapter.e: preset perft-r belongs to routed experts"),
        ("model.experts_backend=grouped_mm", "model.experts_backend: .* remove it"),
        ("model.router_aux_loss_coef=0.1", "model.router_aux_loss_coef: .* remove it"),
        ("log.routing_trace=true", "log.routing_trace: .* remove it"),
        ("adapter={f: {preset: mixlora, targets: [attn]}}", "'attn' matches no dense feed-forward block"),
        ("data.sequence_length=256", "more than the 128 positions"),
    ],
)
def test_what_a_dense_base_cannot_do_is_refused(bases, override, message):
    with pytest.raises(PlanError, match=message):
        plan_run(recipe_of(bases["llama"], override))


def test_a_family_that_is_neither_is_refused(bases, tmp_path):
    AutoConfig.for_model("gpt2").save_pretrained(tmp_path)
    with pytest.raises(PlanError, match=r"'gpt2'; planaria trains mixtral.*, and adapters on llama, mistral"):
        plan_run(recipe_of(tmp_path))
    with pytest.raises(FolderError, match="or for adapters llama, mistral, qwen2, qwen3; found 'gpt2'"):
        empty_model(tmp_path, dtype=torch.float32)
