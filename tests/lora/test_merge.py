"""An adapter in its base's weights: the same function, and what bf16 rounds away."""

from __future__ import annotations

import json
import os

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GptOssConfig, MixtralConfig

from lora.config import BankConfig
from lora.errors import AdapterError
from lora.format import collect_adapter, save_adapter
from lora.merge import format_losses, merge_into_folder
from moe.folder import read_tensors
from moe.load import FolderError

TOKENS = torch.arange(48).view(4, 12)
BANKS = {"e": BankConfig("expert-lora", r=3, alpha=4.0), "a": BankConfig("lora", ("q_proj", "o_proj"), r=2, alpha=3.0)}


def logits(model):
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def read(folder, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


@pytest.fixture(scope="module")
def tensors(adapted, tiny_moe):
    return collect_adapter(adapted(tiny_moe(), BANKS))


@pytest.mark.filterwarnings("ignore:.*rank_pattern", "ignore:.*alpha_pattern")
def test_merged_weights_are_the_bits_that_peft_merges(tensors, adapted, tiny_moe, base_folder, tmp_path):
    merge_into_folder(tensors, BANKS, base_folder, tmp_path / "merged")
    got, want = read(tmp_path / "merged"), logits(adapted(tiny_moe(), BANKS))
    assert (logits(got) - want).norm() / want.norm() < 1e-5
    save_adapter(tmp_path / "a", tensors, BANKS, "", base_model=str(base_folder))
    theirs = PeftModel.from_pretrained(read(base_folder), tmp_path / "a").merge_and_unload()
    for name, parameter in theirs.named_parameters():
        assert torch.equal(got.get_parameter(name), parameter), name
    assert torch.equal(logits(got), logits(theirs))


def test_the_folder_has_the_base_s_names_and_companions(tensors, base_folder, tmp_path):
    (base_folder / "tokenizer.json").write_text("{}")
    merge_into_folder(tensors, BANKS, base_folder, tmp_path / "merged")
    before, after = dict(read_tensors(base_folder)), dict(read_tensors(tmp_path / "merged"))
    assert {k: (t.shape, t.dtype) for k, t in before.items()} == {k: (t.shape, t.dtype) for k, t in after.items()}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if any(t in name for t in ("experts.", "q_proj", "o_proj"))}
    assert (tmp_path / "merged" / "tokenizer.json").read_text() == "{}"
    assert (tmp_path / "merged" / "config.json").read_bytes() == (base_folder / "config.json").read_bytes()


def test_what_bf16_rounds_away_is_told(adapted, tiny_moe, tmp_path):
    tiny_moe(torch.bfloat16).save_pretrained(tmp_path / "base")
    shares = []
    for std in (0.2, 0.005):
        tensors = collect_adapter(adapted(tiny_moe(), BANKS, std))
        losses = merge_into_folder(tensors, BANKS, tmp_path / "base", tmp_path / f"merged-{std}")
        assert losses.keys() == {"q_proj", "o_proj", "experts.gate_up_proj", "experts.down_proj"}
        before, after = dict(read_tensors(tmp_path / "base")), dict(read_tensors(tmp_path / f"merged-{std}"))
        error = update = 0.0
        for layer in range(2):
            name, path = (f"model.layers.{layer}.self_attn.q_proj{end}" for end in (".weight", ".adapter"))
            delta = 1.5 * tensors[f"{path}.B"][0].double() @ tensors[f"{path}.A"][0].double()
            assert after[name].dtype == torch.bfloat16
            error += float((after[name].double() - before[name].double() - delta).square().sum())
            update += float(delta.square().sum())
        assert losses["q_proj"].share == pytest.approx((error / update) ** 0.5, rel=1e-3)
        shares.append(losses["q_proj"].share)
    assert shares[0] < 0.02 < 0.5 < shares[1]  # of a small update most is lost
    assert f"{shares[1]:.2%}" in format_losses(losses)


def test_in_fp32_next_to_nothing_is_lost(tensors, base_folder, tmp_path):
    losses = merge_into_folder(tensors, BANKS, base_folder, tmp_path / "merged")
    assert all(loss.share == 0 for loss in losses.values())


@pytest.mark.parametrize(
    "bank",
    [
        BankConfig("expert-lora-shared", r=3, alpha=4.0),
        BankConfig("expert-lora-shared-outer", r=3, alpha=4.0),
        BankConfig("moslora", r=3, alpha=4.0),
        BankConfig("lora", r=2, alpha=3.0, num_experts=3, combine="sum"),
        BankConfig("rslora", r=3, alpha=4.0),
    ],
    ids=["shared", "shared outer", "moslora", "sum", "rslora"],
)
def test_other_banks_that_are_lora_merge_too(adapted, tiny_moe, base_folder, tmp_path, bank):
    ours = adapted(tiny_moe(), {"b": bank})
    merge_into_folder(collect_adapter(ours), {"b": bank}, base_folder, tmp_path / "merged")
    got, want = logits(read(tmp_path / "merged")), logits(ours)
    assert (want - logits(tiny_moe())).norm() / want.norm() > 0.05
    assert (got - want).norm() / want.norm() < 1e-5


def test_files_with_other_names_and_stacked_ones(adapted, tmp_path):
    mixtral = MixtralConfig(
        hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        num_local_experts=4, num_experts_per_tok=2, vocab_size=64, initializer_range=0.2, head_dim=8,
    )  # fmt: skip
    gpt_oss = GptOssConfig(
        hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        num_local_experts=4, num_experts_per_tok=2, vocab_size=64, initializer_range=0.2, head_dim=8,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    for config in (mixtral, gpt_oss):
        base, merged = tmp_path / config.model_type, tmp_path / f"{config.model_type}-merged"
        torch.manual_seed(2)
        AutoModelForCausalLM.from_config(config, attn_implementation="eager").save_pretrained(base)
        ours = adapted(read(base), BANKS)
        merge_into_folder(collect_adapter(ours), BANKS, base, merged)
        want = logits(ours)
        assert (logits(read(base)) - want).norm() / want.norm() > 0.05
        assert (logits(read(merged)) - want).norm() / want.norm() < 1e-5


def test_what_does_not_merge_is_refused_by_name(tensors, adapted, tiny_moe, base_folder, tmp_path):
    routed = {"m": BankConfig("mola", r=2)}
    cases = [
        (routed, r"adapter\.m \(mola\) weighs its experts by a router for each token; planaria's own folder"),
        ({"m": BankConfig("mov")}, r"adapter\.m \(mov\) scales outputs by vectors"),
        ({"m": BankConfig("moelora-task", r=8)}, r"router for each task; tasks can be had"),
        ({"m": BankConfig("mixlora")}, r"adapter\.m \(mixlora\) runs a whole feed-forward block.*upcycled can be had"),
        ({"m": BankConfig("perft-s")}, r"adapter\.m \(perft-s\) adds a branch beside the block"),
    ]
    for banks, message in cases:
        with pytest.raises(AdapterError, match=message):
            merge_into_folder({}, banks, base_folder, tmp_path / "merged")
    with pytest.raises(FolderError, match="exists"):
        merge_into_folder(tensors, BANKS, base_folder, tmp_path)
    assert os.listdir(tmp_path) == []


def test_another_base_is_refused_and_nothing_is_left(tensors, base_folder, tmp_path):
    weights = load_file(base_folder / "model.safetensors")
    cases = [
        ("model.layers.1.self_attn.o_proj.weight", None, r"has no tensor model\.layers\.1\.self_attn\.o_proj\.weight"),
        ("model.layers.0.mlp.experts.3.up_proj.weight", None, r"has no tensor .*experts\.3\.up_proj\.weight"),
        ("model.layers.0.self_attn.q_proj.weight", torch.ones(4, 32), r"q_proj\.weight has shape \[4, 32\]"),
        ("model.layers.0.self_attn.q_proj.weight", torch.ones(32, 32, dtype=torch.int8), "torch.int8"),
    ]
    for number, (name, tensor, message) in enumerate(cases):
        changed = {key: value for key, value in weights.items() if key != name}
        base = tmp_path / str(number)
        base.mkdir()
        save_file(changed if tensor is None else changed | {name: tensor}, base / "model.safetensors")
        (base / "config.json").write_text((base_folder / "config.json").read_text())
        with pytest.raises(AdapterError, match=message):
            merge_into_folder(tensors, BANKS, base, tmp_path / "merged")
        assert sorted(os.listdir(tmp_path)) == [str(n) for n in range(number + 1)]
    assert json.loads((base_folder / "config.json").read_text())["model_type"] == "qwen3_moe"
