from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora.attach import attach
from lora.config import BankConfig
from lora.errors import AdapterError
from lora.format import apply_adapter, collect_adapter, load_adapter, save_adapter
from lora.presets import bank_of, expand
from moe.convert import convert
from moe.layout import Layout

BANKS = {
    "e": BankConfig("expert-lora", r=4, alpha=8.0),
    "a": BankConfig("mola", ("q_proj", "self_attn.o_proj"), r=2, alpha=4.0, num_experts=4, top_k=2),
}
TOKENS = torch.arange(24).view(2, 12)


@pytest.fixture
def trained(tiny_moe):
    """A model with both kinds of banks and nothing at its starting value."""
    model = tiny_moe()
    attach(model, BANKS, convert(model))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if ".adapter." in path:
                parameter.normal_(0, 0.2, generator=generator)
    return model.eval()


@pytest.fixture
def folder(trained, tmp_path):
    save_adapter(tmp_path / "adapter", collect_adapter(trained), BANKS, "base-1")
    return tmp_path / "adapter"


def test_a_fresh_model_with_the_loaded_adapter_gives_the_same_bits(trained, folder, tiny_moe):
    adapter = load_adapter(folder)
    assert (adapter.banks, adapter.base_fingerprint) == ({n: expand(b) for n, b in BANKS.items()}, "base-1")
    fresh = tiny_moe().eval()
    with torch.no_grad():
        before = fresh(TOKENS).logits
        report = apply_adapter(fresh, adapter, base_fingerprint="base-1")
        want = trained(TOKENS).logits
        assert torch.equal(fresh(TOKENS).logits, want)
        assert not torch.allclose(before, want, atol=1e-2)
    assert {match.bank for match in report.matches} == {"a", "e"}


def test_each_rank_takes_its_share_of_the_experts(trained, folder, tiny_moe):
    adapter = load_adapter(folder)
    model = tiny_moe()
    convert(model, Layout(4, 4), 2)
    apply_adapter(model, adapter)
    for path, parameter in model.named_parameters():
        if ".adapter." in path:
            whole = trained.get_parameter(path)
            assert torch.equal(parameter, whole[4:6] if ".experts." in path else whole), path
    with pytest.raises(AdapterError, match="gather"):
        collect_adapter(model)


def test_bfloat16_survives(trained, tmp_path):
    tensors = {path: tensor.bfloat16() for path, tensor in collect_adapter(trained).items()}
    save_adapter(tmp_path / "a", tensors, BANKS, "")
    loaded = load_adapter(tmp_path / "a").tensors
    assert all(torch.equal(loaded[path], tensor) for path, tensor in tensors.items())
    assert loaded.keys() == tensors.keys()


def test_a_flipped_bit_in_any_tensor_is_named(folder):
    file = folder / "bank.safetensors"
    content = file.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    start = 8 + int.from_bytes(content[:8], "little")
    header.pop("__metadata__")
    for path, entry in header.items():
        damaged = bytearray(content)
        damaged[start + entry["data_offsets"][1] - 1] ^= 1
        file.write_bytes(damaged)
        with pytest.raises(AdapterError, match=path.replace(".", r"\.")):
            load_adapter(folder)
    file.write_bytes(content)
    load_adapter(folder)


def test_other_damage_is_reported_with_its_file(folder, tmp_path):
    bank, manifest = folder / "bank.safetensors", folder / "manifest.json"
    content, text = bank.read_bytes(), manifest.read_text()
    bank.write_bytes(content[: len(content) // 2])
    with pytest.raises(AdapterError, match=r"bank\.safetensors is damaged"):
        load_adapter(folder)
    tensors = load_file_of(content, tmp_path)
    lost = sorted(tensors)[0]
    save_file({path: t for path, t in tensors.items() if path != lost}, bank)
    with pytest.raises(AdapterError, match=f"lacks the tensor {lost}"):
        load_adapter(folder)
    save_file(tensors | {"stray": torch.ones(1)}, bank)
    with pytest.raises(AdapterError, match="stray"):
        load_adapter(folder)
    bank.write_bytes(content)
    manifest.write_text(text.replace('"alpha": 8.0', '"alpha": 9.0'))
    with pytest.raises(AdapterError, match=r"manifest\.json is damaged"):
        load_adapter(folder)
    manifest.write_text(text[:-20])
    with pytest.raises(AdapterError, match=r"manifest\.json is damaged"):
        load_adapter(folder)
    bank.unlink()
    manifest.write_text(text)
    with pytest.raises(AdapterError, match=r"has no bank\.safetensors"):
        load_adapter(folder)
    with pytest.raises(AdapterError, match="is no adapter"):
        load_adapter(tmp_path / "nowhere")


def load_file_of(content: bytes, tmp_path):
    (tmp_path / "copy.safetensors").write_bytes(content)
    return load_file(tmp_path / "copy.safetensors")


def test_replaces_a_folder_whole_and_leaves_nothing_behind(trained, folder):
    changed = {path: tensor + 1 for path, tensor in collect_adapter(trained).items()}
    save_adapter(folder, changed, BANKS, "base-2")
    assert load_adapter(folder).base_fingerprint == "base-2"
    assert sorted(os.listdir(folder.parent)) == ["adapter"]
    assert sorted(os.listdir(folder)) == ["adapter_config.json", "bank.safetensors", "manifest.json"]


def test_wrong_tensors_are_refused_before_anything_is_written(trained, tmp_path):
    tensors = collect_adapter(trained)
    path = "model.layers.0.mlp.experts.adapter.down_proj.A"
    cases = [
        ({p: t for p, t in tensors.items() if p != path}, BANKS, "down_proj.A is not"),
        (tensors | {path: tensors[path][:, :3]}, BANKS, r"down_proj: the shapes .* do not agree"),
        (tensors | {"model.norm.weight": torch.ones(3)}, BANKS, "model.norm.weight belongs to none"),
        (tensors, {"e": BANKS["e"]}, "belongs to none of the banks e"),
        (tensors, BANKS | {"k": BankConfig("mola", ("k_proj",), r=2)}, "adapter.k has no tensors"),
        ({}, {}, "at least one bank"),
    ]
    for wrong, banks, message in cases:
        with pytest.raises(AdapterError, match=message):
            save_adapter(tmp_path / "never", wrong, banks, "")
    assert os.listdir(tmp_path) == []


def test_a_model_that_does_not_fit_is_refused(folder, tiny_moe):
    adapter = load_adapter(folder)
    with pytest.raises(AdapterError, match="trained on base base-1, this model is other"):
        apply_adapter(tiny_moe(), adapter, base_fingerprint="other")
    shallow = tiny_moe()
    del shallow.model.layers[1]
    with pytest.raises(AdapterError, match=r"no place for the adapter tensor model\.layers\.1\."):
        apply_adapter(shallow, adapter)
    narrow = tiny_moe()
    experts = narrow.model.layers[1].mlp.experts
    experts.gate_up_proj = torch.nn.Parameter(experts.gate_up_proj[:, :16])
    experts.down_proj = torch.nn.Parameter(experts.down_proj[:, :, :8])
    with pytest.raises(
        AdapterError, match=r"layers\.1\.mlp\.experts\.adapter\.gate_up_proj\.B.*\(8, 32, 4\).*\(8, 16, 4\)"
    ):
        apply_adapter(narrow, adapter)


def test_bank_of_tells_expert_tensors_from_linears_of_the_same_name():
    banks = {"e": BankConfig("expert-lora"), "a": BankConfig("mola", ("down_proj",))}
    assert bank_of("model.layers.0.mlp.experts.adapter.down_proj.A", banks) == "e"
    assert bank_of("model.layers.0.mlp.shared_expert.down_proj.adapter.A", banks) == "a"
    assert bank_of("model.layers.0.self_attn.q_proj.adapter.A", banks) is None
