"""A model small enough to compare in milliseconds."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from moe.build import new_model
from tests.forked import run_ranks


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


_SHAPE = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_experts": 8, "num_experts_per_tok": 3,
    "moe_intermediate_size": 24, "max_position_embeddings": 64, "initializer_range": 0.1,
}  # fmt: skip
_GROUPED = {**_SHAPE, "num_key_value_heads": 1, "head_dim": 16}
_LATENT = {
    **_SHAPE, "num_hidden_layers": 3, "n_shared_experts": 2, "kv_lora_rank": 12, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12, "v_head_dim": 10, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 1.5,
    "first_k_dense_replace": 1, "intermediate_size": 40,
}  # fmt: skip
TINY_FAMILIES = {
    "mixtral": {**_GROUPED, "sliding_window": 8},
    "qwen2_moe": {**_GROUPED, "shared_expert_intermediate_size": 20, "norm_topk_prob": False},
    "qwen3_moe": {**_GROUPED, "tie_word_embeddings": True},
    "olmoe": {**_SHAPE, "num_key_value_heads": 1},
    "deepseek_v2": {**_LATENT, "q_lora_rank": 14},
    "deepseek_v3": _LATENT,
    "gpt_oss": {**_GROUPED, "sliding_window": 8, "num_attention_heads": 4},
}


@pytest.fixture(scope="session")
def tiny_families():
    """Recipe keys of a small model of each family, with every part that the family can have."""
    return TINY_FAMILIES


@pytest.fixture(scope="session")
def tiny_family(tiny_families):
    """Builds one; biases and buffers that start at zero get values, so that losing them shows."""

    def build(family, seed=0, dtype=torch.float32, **changes):
        fields = {**tiny_families[family], **changes}
        return with_values(new_model(family, fields, vocab_size=64, seed=seed, dtype=dtype))

    return build


def with_values(model):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith(("bias", "sinks")):
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)
    return model


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory):
    """The folder in which two ranks, started once, left what the tests of several files compare."""
    folder = tmp_path_factory.mktemp("two_ranks")
    run_ranks(everything, folder, folder)
    return folder


def everything(rank, world, folder):
    from tests.moe import balance_rank, dispatch_worker, family_worker

    dispatch_worker.report(rank, world, world, folder / "dispatch.json")
    family_worker.report(rank, folder)
    balance_rank.report(rank, folder)
