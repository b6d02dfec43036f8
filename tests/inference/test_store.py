from __future__ import annotations

import errno
import json
import os
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config

from inference.engine import LLM
from inference.errors import InferenceError
from inference.expert_block import ExpertBlock, ExpertShape
from inference.store import ExpertStore, TensorFiles

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reads_one_expert_into_a_block(model_folder, dtype):
    store = ExpertStore(TensorFiles(model_folder), PATHS, SHAPE)
    layout = ExpertBlock(SHAPE, dtype)
    block_B = torch.full((layout.elements,), float("nan"), dtype=dtype)
    assert store.read(3, 5, layout, block_B) == store.bytes_per_expert == 3 * 64 * 32 * 4
    gate_up, down = layout.split(block_B)
    tensors = load_file(model_folder / "model.safetensors")
    assert torch.equal(gate_up[:32], tensors[f"{EXPERT_5}.gate_proj.weight"].to(dtype))
    assert torch.equal(gate_up[32:], tensors[f"{EXPERT_5}.up_proj.weight"].to(dtype))
    assert torch.equal(down, tensors[f"{EXPERT_5}.down_proj.weight"].to(dtype))


def test_a_file_cut_short_while_it_is_served_is_named_with_layer_expert_and_tensor(copy):
    store = ExpertStore(TensorFiles(copy), PATHS, SHAPE)
    layout = ExpertBlock(SHAPE, torch.float32)
    os.truncate(copy / "model.safetensors", 100_000)
    with pytest.raises(InferenceError, match=r"L03\.E005\.gate_up_proj.*model\.safetensors: ends before byte"):
        store.read(3, 5, layout, torch.empty(layout.elements))


def test_a_file_that_the_system_can_no_longer_read_is_named_too(model_folder, monkeypatch):
    store = ExpertStore(TensorFiles(model_folder), PATHS, SHAPE)
    layout = ExpertBlock(SHAPE, torch.float32)

    def stale(*_):
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(os, "preadv", stale)
    with pytest.raises(InferenceError, match=r"L01\.E002\.gate_up_proj.*Stale file handle"):
        store.read(1, 2, layout, torch.empty(layout.elements))


def test_a_read_that_the_system_cuts_into_pieces_is_whole(model_folder, monkeypatch):
    store = ExpertStore(TensorFiles(model_folder), PATHS, SHAPE)
    layout = ExpertBlock(SHAPE, torch.float32)
    whole, pieces = torch.zeros(layout.elements), torch.zeros(layout.elements)
    store.read(2, 9, layout, whole)
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, into, at: preadv(fd, [into[0][:1000]], at))
    store.read(2, 9, layout, pieces)
    assert torch.equal(whole, pieces)
    assert whole.any()


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
    layout = ExpertBlock(SHAPE, torch.float32)
    a_B, b_B = torch.zeros(layout.elements), torch.zeros(layout.elements)
    assert fused.read(2, 9, layout, a_B) == split.read(2, 9, layout, b_B)
    assert torch.equal(a_B, b_B)


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


def test_a_quantised_dense_tensor_is_refused(rewrite):
    """Without its scales it would be read as a number of another size."""
    name = "model.norm.weight"
    message = refused(rewrite(lambda t: t.update({name: t[name].to(torch.float8_e4m3fn)})))
    assert f"tensor {name} in " in message
    assert "is F8_E4M3; only F32, BF16, F16 are served" in message


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
