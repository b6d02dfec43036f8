"""A folder of a large model without its weights."""

from __future__ import annotations

import json


def headers_of_a_large_model(folder, layers=48, experts=128, hidden=2048, inner=768, vocab=151936, tied=False):
    """A folder like Qwen3-30B-A3B's, whose tensors have shapes and no bytes."""
    shapes = {"model.embed_tokens.weight": [vocab, hidden], "model.norm.weight": [hidden]}
    shapes |= {} if tied else {"lm_head.weight": [vocab, hidden]}
    for n in range(layers):
        block = f"model.layers.{n}"
        shapes |= {f"{block}.self_attn.{p}_proj.weight": [4096 if p == "q" else 512, hidden] for p in "qkv"}
        shapes |= {f"{block}.self_attn.o_proj.weight": [hidden, 4096], f"{block}.mlp.gate.weight": [experts, hidden]}
        for e in range(experts):
            shapes |= {f"{block}.mlp.experts.{e}.{p}_proj.weight": [inner, hidden] for p in ("gate", "up")}
            shapes[f"{block}.mlp.experts.{e}.down_proj.weight"] = [hidden, inner]
    header = json.dumps({n: {"dtype": "BF16", "shape": s, "data_offsets": [0, 0]} for n, s in shapes.items()}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    config = {"model_type": "qwen3_moe", "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": 32}
    config |= {"num_key_value_heads": 4, "head_dim": 128, "num_experts_per_tok": 8, "torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder
