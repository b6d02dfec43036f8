"""The file of trainable experts is checked before a run, and is part of what the run is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moe.build import new_config
from trainer.esft_file import SelectionError, read_selection, write_selection
from trainer.plan import PlanError, plan_run
from trainer.recipe import load_recipe, recipe_fingerprint, recipe_to_yaml

QUICKSTART = Path(__file__).resolve().parents[2] / "recipes" / "quickstart.yaml"
SHAPE = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "num_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 16,
}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (None, "make it with `planaria esft select"),
        ("{", "cannot be read"),
        ("[]", "must hold"),
        ('{"layers": {"0": [1, true]}}', "must hold"),
        ('{"layers": {"zero": [1]}}', "must hold"),
        ('{"layers": {"0": []}}', "chooses no expert"),
    ],
)
def test_a_file_that_is_none_is_refused(tmp_path, text, part):
    path = tmp_path / "chosen.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SelectionError, match=part):
        read_selection(str(path))


def test_what_is_written_is_read_and_nothing_is_overwritten(tmp_path):
    path = str(tmp_path / "chosen.json")
    write_selection(path, {"score": "token", "p": 0.2}, {0: (1, 3), 1: (0,)})
    assert read_selection(path) == {0: (1, 3), 1: (0,)}
    with pytest.raises(SelectionError, match="exists"):
        write_selection(path, {}, {0: (1,)})


@pytest.fixture
def recipe_of(tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_config(
        new_config("qwen3_moe", SHAPE, vocab_size=64), dtype=torch.float32
    ).save_pretrained(tmp_path / "model")

    def build(layers: dict) -> object:
        (tmp_path / "chosen.json").write_text(json.dumps({"layers": layers}))
        model = f"model={{path: {tmp_path / 'model'}, trainable_experts: {tmp_path / 'chosen.json'}}}"
        return load_recipe(QUICKSTART, [model, "data.tokenizer={kind: model}"])

    return build


def test_the_plan_counts_the_chosen_experts_and_refuses_others(recipe_of, tmp_path):
    plan = plan_run(recipe_of({"0": [1, 3], "1": [0]}))
    assert plan.trained == {"experts": 3 * 3 * 32 * 16}
    for layers, part in (({"0": [4]}, "4 in each of its layers 0 to 1"), ({"2": [0]}, "of layer 2")):
        with pytest.raises(PlanError, match=part):
            plan_run(recipe_of(layers))


def test_another_choice_is_another_run(recipe_of, tmp_path):
    one = recipe_fingerprint(recipe_of({"0": [1, 3]}))
    assert recipe_fingerprint(recipe_of({"0": [3, 1, 1]})) == one
    assert recipe_fingerprint(recipe_of({"0": [1]})) != one
    (tmp_path / "again.yaml").write_text(recipe_to_yaml(recipe_of({"0": [1]})))
    assert load_recipe(tmp_path / "again.yaml") == recipe_of({"0": [1]})
