from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM


@pytest.fixture(scope="session")
def tiny_moe():
    """Builds a Qwen3-MoE of 2 layers and 8 experts, hidden 32; the same weights every time."""

    def build(dtype: torch.dtype = torch.float32) -> Qwen3MoeForCausalLM:
        config = Qwen3MoeConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            moe_intermediate_size=16,
            intermediate_size=16,
            num_experts=8,
            num_experts_per_tok=2,
            norm_topk_prob=True,
            vocab_size=64,
            initializer_range=0.2,
            tie_word_embeddings=False,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return Qwen3MoeForCausalLM(config).to(dtype).train()

    return build


@pytest.fixture(scope="session")
def tiny_dense():
    """Builds a Llama of 2 layers, hidden 32; the same weights every time."""

    def build() -> LlamaForCausalLM:
        config = LlamaConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=48,
            vocab_size=64,
            initializer_range=0.2,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return LlamaForCausalLM(config).train()

    return build
