"""Names and shapes of the parameters of a new model, family by family, as transformers makes them (no torch here).

Sizes in order of the axes that files have: a linear layer's weight is (out, in).
"""

from __future__ import annotations

from typing import Any

from moe.family_table import FAMILIES, Family, resolved
from trainer.schema import ModelSection

Shapes = dict[str, tuple[int, ...]]


def family_shapes(model: ModelSection, vocab_size: int) -> Shapes:
    """Of the whole model, experts stacked, in transformers' order within a layer or not."""
    assert model.family is not None
    family, sizes = FAMILIES[model.family], resolved(model.family, vars(model))
    hidden = sizes["hidden_size"]
    shapes: Shapes = {"model.embed_tokens.weight": (vocab_size, hidden), "model.norm.weight": (hidden,)}
    if not model.tie_word_embeddings:
        shapes["lm_head.weight"] = (vocab_size, hidden)
    for n in range(sizes["num_hidden_layers"]):
        attention = _latent_attention(sizes) if family.latent_attention else _attention(model.family, family, sizes)
        dense = n < sizes.get("first_k_dense_replace", 0)
        block = _mlp("", sizes["intermediate_size"], hidden) if dense else _block(model.family, family, sizes)
        norms: Shapes = {"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,)}
        layer = norms | {f"self_attn.{k}": v for k, v in attention.items()} | {f"mlp.{k}": v for k, v in block.items()}
        shapes |= {f"model.layers.{n}.{name}": shape for name, shape in layer.items()}
    return shapes


def _attention(name: str, family: Family, sizes: dict[str, Any]) -> Shapes:
    hidden, heads, groups = (sizes[key] for key in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
    head = sizes.get("head_dim") or hidden // heads
    rows = {"q": heads * head, "k": groups * head, "v": groups * head, "o": hidden}
    shapes: Shapes = {f"{part}_proj.weight": (out, hidden) for part, out in rows.items()}
    shapes["o_proj.weight"] = (hidden, heads * head)
    shapes |= {f"{part}_proj.bias": (rows[part],) for part in family.attention_biases}
    if name == "qwen3_moe":
        shapes |= {"q_norm.weight": (head,), "k_norm.weight": (head,)}
    elif name == "olmoe":
        shapes |= {"q_norm.weight": (rows["q"],), "k_norm.weight": (rows["k"],)}
    elif name == "gpt_oss":
        shapes["sinks"] = (heads,)
    return shapes


def _latent_attention(sizes: dict[str, Any]) -> Shapes:
    """DeepSeek's: queries, keys and values through low ranks, and a part of each key that is shared by all heads."""
    hidden, heads, low = sizes["hidden_size"], sizes["num_attention_heads"], sizes["q_lora_rank"]
    rotary, plain, value, rank = (
        sizes[key] for key in ("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "kv_lora_rank")
    )
    query = heads * (rotary + plain)
    shapes: Shapes = {"q_proj.weight": (query, hidden)}
    if low is not None:
        shapes = {
            "q_a_proj.weight": (low, hidden),
            "q_a_layernorm.weight": (low,),
            "q_b_proj.weight": (query, low),
        }
    return shapes | {
        "kv_a_proj_with_mqa.weight": (rank + rotary, hidden),
        "kv_a_layernorm.weight": (rank,),
        "kv_b_proj.weight": (heads * (plain + value), rank),
        "o_proj.weight": (hidden, heads * value),
    }


def _mlp(prefix: str, inner: int, hidden: int) -> Shapes:
    return {
        f"{prefix}gate_proj.weight": (inner, hidden),
        f"{prefix}up_proj.weight": (inner, hidden),
        f"{prefix}down_proj.weight": (hidden, inner),
    }


def _block(name: str, family: Family, sizes: dict[str, Any]) -> Shapes:
    hidden, inner, experts = (sizes[key] for key in ("hidden_size", "moe_intermediate_size", "num_experts"))
    if name == "gpt_oss":
        return {
            "router.weight": (experts, hidden),
            "router.bias": (experts,),
            "experts.gate_up_proj": (experts, hidden, 2 * inner),
            "experts.gate_up_proj_bias": (experts, 2 * inner),
            "experts.down_proj": (experts, inner, hidden),
            "experts.down_proj_bias": (experts, hidden),
        }
    shapes: Shapes = {
        "gate.weight": (experts, hidden),
        "experts.gate_up_proj": (experts, 2 * inner, hidden),
        "experts.down_proj": (experts, hidden, inner),
    }
    if "n_shared_experts" in family.fields:
        shapes |= _mlp("shared_experts.", sizes["n_shared_experts"] * inner, hidden)
    if "shared_expert_intermediate_size" in family.fields:
        shapes |= _mlp("shared_expert.", sizes["shared_expert_intermediate_size"], hidden)
        shapes["shared_expert_gate.weight"] = (1, hidden)
    return shapes
