from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config

from inference.engine import LLM
from inference.store import ExpertShape, ExpertStore, InferenceError, TensorFiles

PATHS = {layer: f"model.layers.{layer}.mlp.experts" for layer in range(4)}
SHAPE = ExpertShape(num_experts=16, hidden=64, intermediate=32)
EXPERT_5 = "model.layers.3.mlp.experts.5"


@pytest.fixture
def copy(model_folder, tmp_path):
    return shutil.copytree(model_folder, tmp_path / "copy")


@pytest.fixture
def rewrite(copy):
    """Applies a change to the dict of tensors and saves it again."""

    def apply(change):
        tensors = load_file(copy / "model.safetensors")
        change(tensors)
        save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
        return copy

    return apply


def refused(folder) -> str:
    with pytest.raises(InferenceError) as error:
        LLM(folder)
    return str(error.value)


def test_copies_one_expert_into_a_slot(model_folder):
    store = ExpertStore(TensorFiles(model_folder), PATHS, SHAPE)
    gate_up, down = torch.empty(64, 64), torch.empty(64, 32)
    assert store.copy_into(3, 5, gate_up, down) == store.bytes_per_expert == 3 * 64 * 32 * 4
    tensors = load_file(model_folder / "model.safetensors")
    assert torch.equal(gate_up[:32], tensors[f"{EXPERT_5}.gate_proj.weight"])
    assert torch.equal(gate_up[32:], tensors[f"{EXPERT_5}.up_proj.weight"])
    assert torch.equal(down, tensors[f"{EXPERT_5}.down_proj.weight"])


def test_views_lie_in_the_mapped_file(model_folder):
    store = ExpertStore(TensorFiles(model_folder), PATHS, SHAPE)
    spans = []
    with open("/proc/self/maps") as maps:
        for line in maps:
            if str(model_folder) in line:
                lo, hi = (int(part, 16) for part in line.split()[0].split("-"))
                spans.append(range(lo, hi))
    for view in store.views(1, 7):
        assert any(view.data_ptr() in span for span in spans)


def test_fused_and_split_folders_hold_the_same_experts(model_folder, rewrite):
    split = ExpertStore(TensorFiles(model_folder), PATHS, SHAPE)

    def fuse(tensors):
        for path in PATHS.values():
            parts = {
                name: torch.stack([tensors.pop(f"{path}.{e}.{name}.weight") for e in range(16)])
                for name in ("gate_proj", "up_proj", "down_proj")
            }
            tensors[f"{path}.gate_up_proj"] = torch.cat([parts["gate_proj"], parts["up_proj"]], dim=1)
            tensors[f"{path}.down_proj"] = parts["down_proj"]

    fused = ExpertStore(TensorFiles(rewrite(fuse)), PATHS, SHAPE)
    for layer, expert in ((0, 0), (2, 9), (3, 15)):
        for a, b in zip(split.views(layer, expert), fused.views(layer, expert), strict=True):
            assert torch.equal(a, b)
    assert fused.bytes_per_expert == split.bytes_per_expert


def test_a_missing_expert_tensor_is_named(rewrite):
    message = refused(rewrite(lambda t: t.pop(f"{EXPERT_5}.up_proj.weight")))
    assert "L03.E005.up_proj" in message
    assert f"{EXPERT_5}.up_proj.weight" in message


def test_a_misshapen_expert_tensor_is_named_with_its_file(rewrite):
    message = refused(rewrite(lambda t: t.update({f"{EXPERT_5}.down_proj.weight": torch.zeros(64, 31)})))
    assert "L03.E005.down_proj" in message
    assert "model.safetensors" in message
    assert "[64, 31]" in message
    assert "[64, 32]" in message


def test_a_quantised_expert_is_refused(rewrite):
    name = f"{EXPERT_5}.down_proj.weight"
    message = refused(rewrite(lambda t: t.update({name: t[name].to(torch.int8)})))
    assert "L03.E005.down_proj" in message
    assert "I8" in message


def test_a_layer_without_experts_is_named(rewrite):
    def drop(tensors):
        for name in [n for n in tensors if n.startswith("model.layers.2.mlp.experts.")]:
            del tensors[name]

    assert "layer 2 has no expert tensors" in refused(rewrite(drop))


def test_a_missing_or_misshapen_dense_tensor_is_named(rewrite):
    assert "model.norm.weight" in refused(rewrite(lambda t: t.pop("model.norm.weight")))
    message = refused(rewrite(lambda t: t.update({"model.norm.weight": torch.zeros(63)})))
    assert re.search(r"model\.norm\.weight in .*model\.safetensors has shape \[63\]", message)


def test_a_truncated_file_is_refused(copy):
    file = copy / "model.safetensors"
    with open(file, "r+b") as handle:
        handle.truncate(file.stat().st_size - 4096)
    message = refused(copy)
    assert str(file) in message
    assert "cut short" in message


def test_a_damaged_header_is_refused(copy):
    with open(copy / "model.safetensors", "r+b") as handle:
        handle.seek(20)
        handle.write(b"\xff" * 64)
    assert "model.safetensors: damaged" in refused(copy)


def test_a_missing_shard_is_named(copy):
    index = {"weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model-00002-of-00002.safetensors" in refused(copy)
    (copy / "model.safetensors.index.json").write_text("{")
    assert "not a safetensors index" in refused(copy)


def test_folders_that_are_no_moe_say_so(copy, tmp_path):
    assert "no such folder" in refused(tmp_path / "nowhere")
    GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64).save_pretrained(copy)
    assert "no MoE block" in refused(copy)
    (copy / "model.safetensors").unlink()
    assert "no model.safetensors" in refused(copy)
