"""Sound models that the doctor must not complain of, though they are unusual."""

import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from moe.upcycle import TARGETS, Upcycling, upcycle
from tests.trainer.test_doctor import QWEN3, trained
from trainer import cli


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_an_expert_may_have_any_width(tmp_path, family):
    """transformers' grouped products in bf16 take multiples of 8 only."""
    if family == "gpt_oss":
        fields = {"num_local_experts": 8, "head_dim": 16, "intermediate_size": 13}
        fields["layer_types"] = ["full_attention"] * 2
    else:
        fields = {**QWEN3, "moe_intermediate_size": 13}
    trained(family, fields).save_pretrained(tmp_path / "odd")
    assert cli.main(["doctor", str(tmp_path / "odd")]) == 0


@pytest.mark.parametrize("source", list(TARGETS))
def test_what_upcycling_makes_is_sound(tmp_path, capsys, source):
    """Also where the family needs a shared expert, whose last product begins at zero."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = AutoConfig.for_model(source, **sizes, num_hidden_layers=2, vocab_size=260, head_dim=8)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "dense")
    upcycle(tmp_path / "dense", tmp_path / "sparse", Upcycling(copies=4, parts=2, noise=0.1))
    assert cli.main(["doctor", str(tmp_path / "sparse")]) == 0
    said = "train from the second step model.layers.0.mlp.shared_expert.gate_proj.weight: " in capsys.readouterr().out
    assert said == (source == "qwen2")
    (weights,) = (tmp_path / "sparse").glob("*.safetensors")
    if source == "qwen2":  # with nothing to pass a gradient on, they never train
        tensors = load_file(weights)
        tensors["model.layers.0.mlp.shared_expert.gate_proj.weight"].zero_()
        tensors["model.layers.0.mlp.shared_expert.up_proj.weight"].zero_()
        save_file(tensors, weights, {"format": "pt"})
        assert cli.main(["doctor", str(tmp_path / "sparse")]) == 1
        assert "model.layers.0.mlp.shared_expert.down_proj.weight: got no gradient" in capsys.readouterr().out


def test_tied_sharded_rounded_and_stacked_folders_are_sound(tmp_path, capsys):
    model = trained("qwen3_moe", QWEN3, tie_word_embeddings=True).bfloat16()
    model.save_pretrained(tmp_path / "tied", max_shard_size="20KB")
    assert len(list((tmp_path / "tied").glob("*.safetensors"))) > 2
    assert cli.main(["doctor", str(tmp_path / "tied")]) == 0
    fields = {"num_local_experts": 8, "head_dim": 16, "intermediate_size": 16, "layer_types": ["full_attention"] * 2}
    model = trained("gpt_oss", fields)
    model.save_pretrained(tmp_path / "stacked")
    assert cli.main(["doctor", str(tmp_path / "stacked")]) == 0
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[3] = model.model.layers[1].mlp.experts.down_proj[6]
        model.model.layers[0].mlp.experts.gate_up_proj[5, 1, 2] = math.inf
    model.save_pretrained(tmp_path / "stacked")
    capsys.readouterr()
    assert cli.main(["doctor", str(tmp_path / "stacked"), "--files-only"]) == 1
    out = capsys.readouterr().out
    assert "L00.E005.gate_up_proj: 1 of 8192 values are NaN or infinite" in out
    assert "L01.E003.down_proj: is the same, bit for bit, in L01.E003, L01.E006" in out
    next(iter((tmp_path / "tied").glob("*-00002-*"))).unlink()
    assert cli.main(["doctor", str(tmp_path / "tied")]) == 2
    assert "is named in model.safetensors.index.json and is not there" in capsys.readouterr().err
