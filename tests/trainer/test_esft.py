"""Scores are shares of what the router decided for the recipe's own rows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from moe.build import new_config
from trainer.data import load, sample_order
from trainer.esft import main, score_experts
from trainer.esft_file import SelectionError, read_selection
from trainer.recipe import load_recipe

QUICKSTART = Path(__file__).resolve().parents[2] / "recipes" / "quickstart.yaml"
SHAPE = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "num_experts": 6,
    "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 16,
}  # fmt: skip


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """A model with a tokenizer of bytes, and the recipe's overrides to read a little text with it."""
    folder = tmp_path_factory.mktemp("esft")
    common = ["data.include=[json/*.py]", "data.sequence_length=32", f"data.cache_dir={folder / 'cache'}"]
    bytes_recipe = load_recipe(QUICKSTART, [*common, "data.tokenizer={kind: bytes}"])
    data = load(bytes_recipe)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = new_config("qwen3_moe", SHAPE, vocab_size=data.vocab_size)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder / "model")
    for file in Path(data.tokenizer_dir).iterdir():
        (folder / "model" / file.name).write_bytes(file.read_bytes())
    return [*common, f"model={{path: {folder / 'model'}}}", "data.tokenizer={kind: model}"]


def test_scores_are_those_of_transformers_own_router(settings):
    recipe = load_recipe(QUICKSTART, settings)
    seen, tokens = score_experts(recipe, "token", 100)
    _, gates = score_experts(recipe, "gate", 100)
    assert seen == 128, "whole rows of 32 tokens"
    model = AutoModelForCausalLM.from_pretrained(recipe.model.path, dtype=torch.float32)
    data = load(recipe)
    rows = [data.train[sample_order(i, len(data.train), recipe.train.seed)] for i in range(4)]
    ids_BS = torch.stack([torch.from_numpy(row) for row in rows])
    with torch.no_grad():
        logits = model(input_ids=ids_BS, output_router_logits=True).router_logits
    for layer, logits_TE in enumerate(logits):
        top_TK, index_TK = logits_TE.softmax(-1).topk(2)
        weights_TK = top_TK / top_TK.sum(-1, keepdim=True)
        for expert in range(6):
            chose_TK = index_TK == expert
            assert tokens[layer][expert] == int(chose_TK.sum())
            assert gates[layer][expert] == pytest.approx(float((weights_TK * chose_TK).sum()), rel=1e-4, abs=1e-6)


def test_a_larger_p_selects_more_and_mistakes_are_named(settings, tmp_path):
    few, all_of_them = tmp_path / "few.json", tmp_path / "all.json"
    assert main(str(QUICKSTART), settings, str(few), "token", 0.3, 64) == 0
    assert main(str(QUICKSTART), settings, str(all_of_them), "token", 1.0, 64) == 0
    for layer, experts in read_selection(str(few)).items():
        assert 1 <= len(experts) < 6
        assert set(experts) < set(read_selection(str(all_of_them))[layer])
    with pytest.raises(SelectionError, match="--p 0 "):
        main(str(QUICKSTART), settings, str(tmp_path / "no.json"), "token", 0, 64)
    with pytest.raises(SelectionError, match=r"give model\.path"):
        main(str(QUICKSTART), [], str(tmp_path / "no.json"), "token", 0.2, 64)
