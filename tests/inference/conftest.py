"""A tiny Qwen3-MoE with a trained tokenizer, saved as `save_pretrained` saves it."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

from inference.placement import model_sizes
from tests.inference.headers import headers_of_a_large_model

TEXT = [
    "A planarian regrows whole from any fragment, and so should a training run.",
    "The gate scores every expert; the best four of sixteen compute the token.",
    "def fetch(layer, expert):\n    return slots[layer][expert]\n",
    "Memory is finite, experts are many, and most of them sleep most of the time.",
]


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=512, special_tokens=["<eos>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(TEXT, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        moe_intermediate_size=32,
        num_experts=16,
        num_experts_per_tok=4,
        vocab_size=512,
        norm_topk_prob=True,
        max_position_embeddings=256,
        initializer_range=0.2,  # large enough that experts decide which token comes next
        eos_token_id=None,
        bos_token_id=None,
    )
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def prompts():
    """16 prompts of 3 to 18 tokens over the vocabulary, all different."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(1, 512, (3 + i,), generator=generator).tolist() for i in range(16)]


@pytest.fixture(scope="session")
def huggingface_tokens():
    """The new tokens of transformers' own greedy generate, one prompt at a time."""

    def run(model, prompts, new_tokens):
        tokens = []
        for prompt in prompts:
            out = model.generate(
                torch.tensor([prompt], device=model.device),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long, device=model.device),
                max_new_tokens=new_tokens,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
            tokens.append(tuple(out[0, len(prompt) :].tolist()))
        return tokens

    return run


@pytest.fixture(scope="session")
def large(tmp_path_factory):
    return headers_of_a_large_model(tmp_path_factory.mktemp("large"))


@pytest.fixture(scope="session")
def sizes(large):
    return model_sizes(large)
