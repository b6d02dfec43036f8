"""Tiny configurations of the seven families, and a router of each with random weights."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from moe.families import find_moe_blocks

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    "intermediate_size": 32, "max_position_embeddings": 64, "num_experts_per_tok": 3, "head_dim": 16,
}  # fmt: skip
MLA = {
    "kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
    "moe_intermediate_size": 16, "n_routed_experts": 8, "n_shared_experts": 1, "first_k_dense_replace": 0,
    "n_group": 4, "topk_group": 2, "head_dim": 8,
}  # fmt: skip
QWEN = {"num_experts": 8, "moe_intermediate_size": 16, "norm_topk_prob": True}
FAMILIES = {
    "mixtral": {"num_local_experts": 8},
    "qwen2_moe": {**QWEN, "norm_topk_prob": False, "shared_expert_intermediate_size": 16},
    "qwen3_moe": QWEN,
    "olmoe": {"num_experts": 8, "norm_topk_prob": False},
    "deepseek_v2": {**MLA, "topk_method": "group_limited_greedy", "routed_scaling_factor": 2.5},
    "deepseek_v3": {**MLA, "norm_topk_prob": True, "routed_scaling_factor": 2.5},
    "gpt_oss": {"num_local_experts": 8},
}


def tiny(family, seed=0, **changes):
    """A model of the family whose routers have weights and biases that matter."""
    config = AutoConfig.for_model(family, **{**SIZES, **FAMILIES[family], **changes})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for block in find_moe_blocks(model):
        with torch.no_grad():
            for tensor in (*block.gate.parameters(), *block.gate.buffers()):
                tensor.normal_(0, 0.3 if tensor.dim() > 1 else 0.1)
    return model
