from __future__ import annotations

import hashlib
import json
import os
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora.attach import attach
from lora.config import BankConfig
from lora.errors import AdapterError
from lora.format import apply_adapter, collect_adapter, load_adapter, save_adapter
from lora.presets import PRESETS, expand
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


# Each kind of tensor that banks train: factors, mixers, vectors, shared factors, routers, thresholds, embeddings.
OF_EVERY_KIND = {
    "lora": BankConfig("lora", ("q_proj",), r=2),
    "moslora": BankConfig("moslora", ("k_proj",), r=2),
    "mov": BankConfig("mov", ("v_proj",), num_experts=3),
    "adamole": BankConfig("adamole", ("layers.0.self_attn.o_proj",), r=2),
    "moelora-task": BankConfig("moelora-task", ("layers.1.self_attn.o_proj",), r=8, num_experts=4, num_tasks=3),
    "outer": BankConfig("expert-lora-shared-outer", ("gate_up_proj",), r=(2, 3)),
    "shared": BankConfig("expert-lora-shared", ("down_proj",), r=3),
}
OTHERS = {
    "hydralora": BankConfig("hydralora", ("q_proj",)),
    "molora": BankConfig("molora", ("k_proj",)),
    "loramoe": BankConfig("loramoe", ("v_proj",)),
    "moelora": BankConfig("moelora", ("layers.0.self_attn.o_proj",)),
    "mola": BankConfig("mola", ("layers.1.self_attn.o_proj",), num_experts=(2, 4)),
    "expert-lora": BankConfig("expert-lora"),
}


@pytest.mark.parametrize("banks", [OF_EVERY_KIND, OTHERS], ids=["every kind", "other presets"])
def test_any_bank_s_tensors_survive_and_its_fields_are_kept(adapted, tiny_moe, tmp_path, banks):
    tensors = collect_adapter(adapted(tiny_moe(), banks))
    topology = {"workers": 4, "ep": 2, "zero": 1, "dtype": "fp32"}
    save_adapter(tmp_path / "a", tensors, banks, "base", topology=topology)
    loaded = load_adapter(tmp_path / "a")
    assert loaded.banks == {name: expand(bank) for name, bank in banks.items()}
    assert loaded.topology == topology
    assert loaded.tensors.keys() == tensors.keys()
    fresh = tiny_moe()
    apply_adapter(fresh, loaded)
    for path, tensor in tensors.items():
        assert torch.equal(fresh.get_parameter(path), tensor), path


def test_branches_beside_blocks_survive_too(adapted, tiny_moe, tmp_path):
    for preset in ("perft-r", "perft-e", "perft-d", "perft-s"):
        banks = {"p": BankConfig(preset, r=2)}
        ours = adapted(tiny_moe(), banks)
        save_adapter(tmp_path / preset, collect_adapter(ours), banks, "base")
        fresh = tiny_moe().eval()
        apply_adapter(fresh, load_adapter(tmp_path / preset))
        with torch.no_grad():
            assert torch.equal(fresh(TOKENS).logits, ours(TOKENS).logits), preset


def test_a_changed_default_of_a_preset_changes_no_adapter_that_exists(adapted, tiny_moe, tmp_path, monkeypatch):
    banks = {"a": BankConfig("hydralora", ("q_proj",))}
    save_adapter(tmp_path / "a", collect_adapter(adapted(tiny_moe(), banks)), banks, "")
    before = load_adapter(tmp_path / "a").banks["a"]
    monkeypatch.setitem(PRESETS, "hydralora", PRESETS["hydralora"] | {"alpha": 1.0, "num_experts": 7, "top_p": 0.3})
    after = load_adapter(tmp_path / "a")
    assert replace(after.banks["a"], top_p=before.top_p) == before  # which is of no use to it
    apply_adapter(tiny_moe(), after)
    assert expand(banks["a"]) != before


def test_the_manifest_says_what_the_adapter_is(adapted, tiny_moe, tmp_path):
    save_adapter(tmp_path / "a", collect_adapter(adapted(tiny_moe(), OF_EVERY_KIND)), OF_EVERY_KIND, "base")
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    assert manifest["schema"] == 2
    assert manifest["versions"].keys() >= {"torch", "transformers", "peft"}
    assert manifest["exports"]["peft"].startswith("adapter.mov (mov) scales outputs")
    entry = manifest["tensors"]["model.layers.1.mlp.experts.adapter.gate_up_proj.A"]
    assert (entry["shape"], entry["dtype"], len(entry["sha256"])) == ([1, 3, 32], "float32", 64)
    plain = {"e": BankConfig("expert-lora", r=2)}
    save_adapter(tmp_path / "b", collect_adapter(adapted(tiny_moe(), plain)), plain, "base")
    exports = json.loads((tmp_path / "b" / "manifest.json").read_text())["exports"]
    assert [form for form, why in exports.items() if why == "exact"] == ["peft", "peft-per-expert", "merged"]


def first_schema(folder, tensors, banks):
    """The adapter folder that planaria 0.1 wrote of expert-lora and mola."""
    folder.mkdir()
    save_file(tensors, folder / "bank.safetensors")
    manifest = {
        "schema": 1,
        "layout": "A=E,r,in;B=E,out,r;router=E,in",
        "base_fingerprint": "base-1",
        "banks": banks,
        "loads_in_peft": False,
        "versions": {"planaria": "0.1.0"},
        "tensors": {
            path: {
                "shape": list(tensor.shape),
                "dtype": "float32",
                "sha256": hashlib.sha256(tensor.numpy().tobytes()).hexdigest(),
            }
            for path, tensor in tensors.items()
        },
    }
    content = json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode()
    manifest["sha256"] = hashlib.sha256(content).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_the_first_schema_is_read(trained, tiny_moe, tmp_path):
    tensors = {path.removesuffix(".weight"): tensor for path, tensor in collect_adapter(trained).items()}
    given = {"num_experts": 4, "top_k": 2, "router_aux_loss_coef": 0.0}  # of every bank, with or without a use
    banks = {
        "e": {"preset": "expert-lora", "targets": [], "r": 4, "alpha": 8.0} | given,
        "a": {"preset": "mola", "targets": ["q_proj", "self_attn.o_proj"], "r": 2, "alpha": 4.0} | given,
    }
    adapter = load_adapter(first_schema(tmp_path / "old", tensors, banks))
    assert adapter.banks == {name: expand(bank) for name, bank in BANKS.items()}
    fresh = tiny_moe().eval()
    apply_adapter(fresh, adapter)
    with torch.no_grad():
        assert torch.equal(fresh(TOKENS).logits, trained(TOKENS).logits)


def test_what_this_version_does_not_know_is_refused_with_its_name(trained, folder, tmp_path):
    tensors = collect_adapter(trained)
    for preset, extra, message in [
        ("mixlora", {}, "'mixlora', which schema 1 never had"),
        (None, {}, "None, which schema 1 never had"),
    ]:
        old = first_schema(tmp_path / str(preset), tensors, {"e": {"preset": preset} | extra})
        with pytest.raises(AdapterError, match=message):
            load_adapter(old)
    manifest = folder / "manifest.json"
    content = json.loads(manifest.read_text())
    for change, message in [
        ({"schema": 3}, "has schema 3, this version reads 1 and 2"),
        ({"banks": {"e": content["banks"]["e"] | {"sparsity": 2}}}, r"adapter\.e has the field 'sparsity'"),
        ({"banks": {"e": content["banks"]["e"] | {"preset": "super"}}}, "no preset 'super'"),
    ]:
        changed = {key: value for key, value in (content | change).items() if key != "sha256"}
        text = json.dumps(changed, sort_keys=True, separators=(",", ":"))
        manifest.write_text(json.dumps(changed | {"sha256": hashlib.sha256(text.encode()).hexdigest()}))
        with pytest.raises(AdapterError, match=message):
            load_adapter(folder)


def test_foreign_files_are_never_replaced(trained, folder, tmp_path):
    tensors = collect_adapter(trained)
    (folder / "notes.txt").write_text("mine")
    peft = tmp_path / "peft"
    peft.mkdir()
    (peft / "adapter_config.json").write_text("{}")
    (tmp_path / "file").write_text("mine")
    for place, message in [
        (folder, "holds notes.txt"),
        (peft, "holds adapter_config.json"),
        (tmp_path / "file", "a file"),
    ]:
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(AdapterError, match=message):
            save_adapter(place, tensors, BANKS, "base-2")
        assert sorted(tmp_path.rglob("*")) == before
    assert load_adapter(folder).base_fingerprint == "base-1"


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
