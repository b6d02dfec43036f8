"""A model small enough to compare in milliseconds."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM


@pytest.fixture(scope="session")
def tiny_model():
    """Builds a two-layer Qwen3-MoE with eight experts; the same seed gives the same weights."""

    def build(seed=0):
        config = AutoConfig.for_model(
            "qwen3_moe", vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=16, moe_intermediate_size=16, num_experts=8, num_experts_per_tok=2,
            intermediate_size=32, max_position_embeddings=64, norm_topk_prob=True,
        )  # fmt: skip
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)

    return build
