"""What goes where, from headers alone."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    GptOssConfig,
    MixtralConfig,
    Qwen2MoeConfig,
)

from inference.costmodel import named_profile
from inference.engine import LLM
from inference.errors import InferenceError
from inference.expert_block import ExpertBlock, ExpertShape
from inference.forecast import placement_table
from inference.kv import KVShape
from inference.packed_block import PackedBlock
from inference.placement import RING_BYTES, WORKSPACE, PlacementError, model_sizes, parse_size, place, show_size
from tests.inference.headers import headers_of_a_large_model
from trainer.cli import main

TINY = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": None, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
DEEPSEEK = TINY | LATENT | {"num_key_value_heads": 4, "moe_intermediate_size": 16, "n_routed_experts": 6}
DEEPSEEK |= {"first_k_dense_replace": 1, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
CONFIGS = {
    "mixtral": MixtralConfig(**TINY, num_local_experts=6, num_experts_per_tok=2),
    "qwen2_moe": Qwen2MoeConfig(
        **TINY, moe_intermediate_size=24, shared_expert_intermediate_size=8, num_experts=6, num_experts_per_tok=2
    ),
    "deepseek_v2": DeepseekV2Config(**DEEPSEEK),
    "deepseek_v3": DeepseekV3Config(**DEEPSEEK),
    "gpt_oss": GptOssConfig(**TINY, head_dim=8, num_local_experts=6, num_experts_per_tok=2),
}


@pytest.mark.parametrize("family", CONFIGS)
def test_sizes_are_those_of_the_loaded_model(tmp_path, family):
    model = AutoModelForCausalLM.from_config(CONFIGS[family], dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    sizes = model_sizes(tmp_path)
    routed = {n: p for n, p in model.named_parameters() if ".experts." in n}
    layers = 2 if family.startswith("deepseek") else 3
    assert (sizes.layers, sizes.moe_layers, sizes.experts, sizes.top_k) == (3, layers, 6, 2)
    assert (sizes.hidden, sizes.dtype) == (32, "bfloat16")
    assert sizes.intermediate == next(
        p.shape[2 if family != "gpt_oss" else 1] for n, p in routed.items() if "down" in n
    )
    assert sizes.total_experts * sizes.expert_bytes == sum(2 * p.numel() for p in routed.values())
    rest = sum(p.numel() for n, p in model.named_parameters() if n not in routed)
    rest += sum(b.numel() for n, b in model.named_buffers() if n in model.state_dict())
    assert sizes.dense_bytes == 2 * rest
    kv = KVShape.of(AutoConfig.from_pretrained(tmp_path))
    assert sizes.kv_bytes == kv.bytes_per_block(1, torch.bfloat16)


def test_a_large_model_is_read_from_its_headers(sizes):
    assert (sizes.moe_layers, sizes.experts, sizes.intermediate) == (48, 128, 768)
    assert sizes.expert_bytes == 3 * 2048 * 768 * 2
    assert sizes.kv_bytes == 48 * 2 * 4 * 128 * 2
    assert sizes.table_bytes == 151936 * 2048 * 2


def test_an_embedding_that_is_the_output_too_is_multiplied_by(tmp_path):
    sizes = model_sizes(headers_of_a_large_model(tmp_path, layers=1, experts=2, tied=True))
    assert sizes.table_bytes == 0
    assert sizes.dense_elements * 2 == sizes.dense_bytes


def test_layers_past_the_last_are_not_counted(tmp_path):
    """DeepSeek-V3's files have one more, which predicts the token after the next."""
    folder = headers_of_a_large_model(tmp_path, layers=3, experts=4)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    (tmp_path / "two").mkdir()
    two = model_sizes(headers_of_a_large_model(tmp_path / "two", layers=2, experts=4))
    assert model_sizes(folder) == two


def test_vram_is_filled_to_the_last_slot(sizes):
    placed = place(sizes, kv_tokens=4096, gpu=True, vram=parse_size("8GiB"))
    assert 0 < placed.slots < sizes.total_experts
    assert placed.nbytes <= 8 << 30 < placed.nbytes + sizes.expert_bytes
    assert placed.streamed == 2 * 128
    assert placed.workspace == WORKSPACE
    # A CPU has no link to stream over and needs nothing for CUDA.
    assert place(sizes, kv_tokens=4096, gpu=False, vram=parse_size("8GiB")).slots > placed.slots + 256
    # Left to itself, what is kept for keys and values takes a quarter at most.
    assert place(sizes, gpu=True, vram=8 << 30).kv_tokens == (2 << 30) // sizes.kv_bytes
    assert place(sizes, gpu=True, vram=80 << 30).kv_tokens == 32768


def test_where_all_fits_nothing_streams(sizes):
    all_of_it = place(sizes, kv_tokens=16, gpu=True)
    assert (all_of_it.slots, all_of_it.streamed) == (sizes.total_experts, 0)
    assert place(sizes, kv_tokens=16, gpu=True, vram=all_of_it.nbytes).slots == sizes.total_experts
    less = place(sizes, kv_tokens=16, gpu=True, vram=all_of_it.nbytes - 1)
    assert less.slots == sizes.total_experts - 1 - 256


def test_packed_experts_take_three_quarters_of_the_link_and_a_ring_of_the_gpus_memory(sizes):
    packed = sizes.kept(pack=True)
    assert not sizes.packed
    assert packed.packed
    assert sizes.kept(pack=False) == sizes
    assert not dataclasses.replace(sizes, intermediate=760).kept(pack=True).packed, "rows of whole groups only"
    assert not dataclasses.replace(sizes, dtype="float16").kept(pack=True).packed
    assert packed.host_expert_bytes == 0.75 * packed.expert_bytes == 0.75 * sizes.host_expert_bytes
    some = [place(each, gpu=True, expert_budget=0.1) for each in (sizes, packed)]
    assert some[1].nbytes - some[0].nbytes == RING_BYTES
    assert [place(each, gpu=True, expert_budget=1.0).nbytes for each in (sizes, packed)] == [
        place(sizes, gpu=True).nbytes
    ] * 2, "nothing crosses"
    large = dataclasses.replace(packed, expert_bytes=352 << 20)
    placed = place(large, gpu=True, kv_tokens=4096, vram=200 << 30)
    assert (placed.workspace, placed.ring) == (WORKSPACE, 2 * (352 << 20))
    assert placed.nbytes <= 200 << 30


def test_host_memory_of_packed_experts_is_what_banks_register(sizes):
    packed = sizes.kept(pack=True)
    layout = ExpertBlock(ExpertShape(sizes.experts, sizes.hidden, sizes.intermediate), torch.bfloat16)
    assert packed.bank_expert_bytes == PackedBlock(layout.elements).stride
    assert 1.562 < packed.bank_expert_bytes / layout.elements < 1.564, "1.5, and 8 for each 128"
    assert sizes.bank_expert_bytes == layout.nbytes
    for each in (packed, sizes):
        table = placement_table(place(each, gpu=True, expert_budget=0.1), named_profile("h200"))
        assert table[-1].endswith(f" {show_size(sizes.total_experts * each.bank_expert_bytes)}")
        assert f"all {sizes.total_experts} experts" in table[-1]


def test_what_does_not_fit_is_refused_with_what_would(sizes):
    with pytest.raises(PlacementError, match=r"2\.15 GB do not hold .* dense part takes 3\.0\d GB") as refused:
        place(sizes, kv_tokens=4096, gpu=True, vram=2 << 30)
    asked = str(refused.value).partition("at least ")[2].partition(",")[0]
    assert place(sizes, kv_tokens=4096, gpu=True, vram=parse_size(asked)).slots == 1
    with pytest.raises(PlacementError, match=r"workspace 537 MB, two layers that prompts stream through 2\.42 GB"):
        place(sizes, kv_tokens=4096, gpu=True, vram=parse_size(asked) - 1_000_000)
    said = r"workspace 537 MB, a ring for packed experts 67\.1 MB, two layers"
    with pytest.raises(PlacementError, match=said):
        place(sizes.kept(pack=True), kv_tokens=4096, gpu=True, vram=2 << 30)
    table = placement_table(place(sizes.kept(pack=True), gpu=True, expert_budget=0.1), named_profile("h200"))
    assert sum(line.startswith("ring for packed experts ") and line.endswith("67.1 MB") for line in table) == 1
    assert not any("ring" in line for line in placement_table(place(sizes, gpu=True), named_profile("h200")))


def test_shares_of_experts_are_slots_as_before(sizes):
    of = {b: place(sizes, kv_tokens=1, gpu=False, expert_budget=b).slots for b in (0.0, 1e-9, 0.25, 1.0)}
    assert of == {0.0: 0, 1e-9: 1, 0.25: 1536, 1.0: 6144}
    assert place(sizes, kv_tokens=1, gpu=False, expert_budget=0.0).slot_bytes == sizes.expert_bytes


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("8GiB", 8 << 30), ("1.5 GB", 1_500_000_000), ("800mib", 800 << 20), ("123", 123), ("2TB", 2 * 10**12)],
)
def test_sizes_are_read(text, nbytes):
    assert parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "8G", "GiB", "-1GB", "0", "8GiB/s", "1e9", "nan"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(PlacementError, match="8GiB"):
        parse_size(text)


def test_sizes_are_shown_with_three_digits():
    assert [show_size(n) for n in (12, 1234, 9_437_184, 57.98e9, 1234e9)] == [
        "12 B",
        "1.23 kB",
        "9.44 MB",
        "58 GB",
        "1234 GB",
    ]


@pytest.mark.parametrize(
    "damage",
    ["no folder", "no config", "dense", "no experts", "cut short", "no heads", "int8", "index", "index list", "shard"],
)
def test_folders_that_cannot_be_planned_for_are_named(tmp_path, large, damage):
    config = json.loads((large / "config.json").read_text())
    header = (large / "model.safetensors").read_bytes()
    if damage == "dense":
        config["model_type"] = "llama"
    if damage == "no heads":
        del config["num_attention_heads"]
    if damage == "int8":
        config["torch_dtype"] = "int8"
    if damage == "no experts":
        header = (2).to_bytes(8, "little") + b"{}"
    if damage == "cut short":
        header = header[:100]
    if damage != "no config":
        (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(header)
    indices = {"index": {}, "index list": [], "shard": {"weight_map": {"a": "model-00001.safetensors"}}}
    if damage in indices:
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(indices[damage]))
    folder = tmp_path / "nowhere" if damage == "no folder" else tmp_path
    with pytest.raises(InferenceError, match=str(folder)):
        model_sizes(folder)


def test_vram_gives_a_model_that_many_slots_and_the_same_text(model_folder, prompts):
    sizes = model_sizes(model_folder)
    room = sizes.dense_bytes + 256 * sizes.kv_bytes + 7 * sizes.expert_bytes
    llm = LLM(model_folder, vram=room, kv_tokens=256, device="cpu")
    assert llm.stats().slots == 7
    assert llm.generate(prompts[:2], 8) == LLM(model_folder, device="cpu").generate(prompts[:2], 8)
    with pytest.raises(InferenceError, match="give at least"):
        LLM(model_folder, vram="100kB", device="cpu")
    with pytest.raises(InferenceError, match="both"):
        LLM(model_folder, 0.5, vram="1GB", device="cpu")


def test_generate_takes_vram(model_folder, capsys):
    sizes = model_sizes(model_folder)
    mb = math.ceil((sizes.dense_bytes + sizes.kv_bytes * 2000 + 16 * sizes.expert_bytes) / 1e6)
    assert main(["generate", str(model_folder), "--prompt", "def", "--max-new-tokens", "2", "--vram", f"{mb}MB"]) == 0
    assert "resident" in capsys.readouterr().out
    assert main(["generate", str(model_folder), "--prompt", "def", "--vram", "1kB"]) == 2
    assert "dense part takes" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["9" * 400, "1" + "0" * 307 + "TiB", "9e99GiB"])
def test_sizes_beyond_all_numbers_are_refused(text):
    with pytest.raises(PlacementError, match="is not a size"):
        parse_size(text)
