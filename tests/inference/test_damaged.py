"""Folders whose config.json does not fit, and settings that cannot be: each is refused in a sentence, at opening."""

from __future__ import annotations

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from inference.engine import LLM
from inference.errors import InferenceError
from inference.prompts import check_text


@pytest.fixture
def changed(model_folder, tmp_path):
    def make(**fields):
        copy = tmp_path / "model"
        shutil.copytree(model_folder, copy)
        file = copy / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))
        return copy

    return make


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"num_experts_per_tok": 99}, "num_experts_per_tok=99 of 16"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok=0 of 16"),
        ({"hidden_size": "64"}, "config.json"),
        ({"hidden_size": None}, "config.json"),
        ({"eos_token_id": "x"}, "config.json"),
        ({"hidden_act": "nonsense"}, "config.json"),
        ({"dtype": "float8"}, "config.json"),
        ({"quantization_config": {"quant_method": "fp8"}}, r"quantization_config \(fp8\).* plain \(F32 in model.safe"),
        ({"num_hidden_layers": 2}, r"holds model\.layers\.2\..*num_hidden_layers=2"),
    ],
)
def test_a_config_that_does_not_fit_is_refused_at_opening(changed, fields, said):
    with pytest.raises(InferenceError, match=said):
        LLM(changed(**fields))


@pytest.fixture
def with_tensor(model_folder, tmp_path):
    def make(name, like):
        copy = tmp_path / "model"
        shutil.copytree(model_folder, copy)
        tensors = load_file(copy / "model.safetensors")
        save_file(tensors | {name: tensors[like].clone()}, copy / "model.safetensors", {"format": "pt"})
        return copy

    return make


@pytest.mark.parametrize(
    ("name", "like"),
    [
        ("model.layers.1.mlp.experts.16.gate_proj.weight", "model.layers.1.mlp.experts.15.gate_proj.weight"),
        ("model.layers.1.mlp.shared_expert_gate.weight", "model.layers.1.mlp.gate.weight"),
        ("model.layers.1.self_attn.q_proj.bias", "model.norm.weight"),
        ("score.weight", "model.norm.weight"),
    ],
)
def test_a_tensor_that_the_model_has_no_place_for_is_refused(with_tensor, name, like):
    """Another expert, a bias, a head of another task: left out, the answers would be another model's."""
    with pytest.raises(InferenceError, match=f"holds {name}, and the model .* has no place for it"):
        LLM(with_tensor(name, like))


def test_frequencies_that_older_files_hold_are_no_weights(with_tensor, prompts):
    with LLM(with_tensor("model.layers.0.self_attn.rotary_emb.inv_freq", "model.norm.weight")) as llm:
        assert llm.generate([prompts[0]], 1)


def test_layers_that_predict_later_tokens_may_stand_behind_the_others(changed, prompts):
    with LLM(changed(num_hidden_layers=2, num_nextn_predict_layers=2)) as llm:
        assert llm.generate([prompts[0]], 1)


@pytest.mark.parametrize("wrong", [["a"], "a", 1.5, [2, 512], -1, True, {"a": 1}])
def test_an_end_that_is_no_token_is_refused(changed, wrong):
    folder = changed()
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": wrong}))
    with pytest.raises(InferenceError, match=r"generation_config.json: eos_token_id .* is no token"):
        LLM(folder)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "tokenizer.json"])
def test_a_damaged_tokenizer_is_refused(changed, name):
    folder = changed()
    (folder / name).write_text("[]")
    with pytest.raises(InferenceError, match="tokenizer"):
        LLM(folder)


def test_more_keys_and_values_than_memory_are_refused_with_both_figures(model_folder):
    with pytest.raises(InferenceError, match=r"take [\d.]+ GB, and [\d.]+ GB of cpu are free"):
        LLM(model_folder, kv_tokens=10**12)


def test_text_that_is_not_utf8_is_refused(model_folder):
    check_text("ä€😀")
    with LLM(model_folder) as llm, pytest.raises(InferenceError, match="not UTF-8 from character 3"):
        llm.generate(["hi \udcff\udcfe"], 1)
