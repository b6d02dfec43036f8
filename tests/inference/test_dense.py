"""Dense models, the bases of adapters, in the runtime: all of them resident, with and without an adapter."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from inference.engine import LLM
from inference.errors import InferenceError
from inference.offload import Crossing
from lora.attach import attach
from lora.config import BankConfig
from lora.format import collect_adapter, save_adapter
from moe.fingerprint import fingerprint

BANKS = {"ffn": BankConfig("mixlora", num_experts=4, r=2), "attention": BankConfig("lora", r=2)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("dense")
    torch.manual_seed(0)
    sizes = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, initializer_range=0.3, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(sizes).save_pretrained(out)
    return out


def test_a_dense_model_generates_what_transformers_does(folder, huggingface_tokens):
    prompts = [[1, 2, 3], [9, 8, 7, 6]]
    want = huggingface_tokens(AutoModelForCausalLM.from_pretrained(folder), prompts, 12)
    llm = LLM(folder, device="cpu")
    assert [list(g.token_ids) for g in llm.generate(prompts, 12)] == [list(row) for row in want]
    assert "a dense model, all of it resident; 24 tokens" in str(llm.stats())


def test_an_adapter_computes_in_the_runtime_what_it_does_in_training(folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder)
    attach(model, BANKS, [])
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    save_adapter(tmp_path / "adapter", collect_adapter(model), BANKS, fingerprint(folder))
    with torch.no_grad():
        want = model.eval()(torch.tensor([[5, 4, 3, 2]])).logits[0]
    llm = LLM(folder, adapter=tmp_path / "adapter", device="cpu")
    torch.testing.assert_close(llm.logits([5, 4, 3, 2]), want)
    assert not torch.allclose(want, LLM(folder, device="cpu").logits([5, 4, 3, 2]))
    assert len(llm.generate([[5, 4]], 6)[0].token_ids) == 6


@pytest.mark.parametrize("budget", [0.0, 0.5])
def test_a_budget_of_experts_means_nothing_to_a_dense_model(folder, budget):
    with pytest.raises(InferenceError, match=f"is a dense model: .* an expert budget of {budget} means nothing"):
        LLM(folder, expert_budget=budget)
    with pytest.raises(InferenceError, match=r"without experts: prefetch=next_gate \(--prefetch\) means nothing"):
        LLM(folder, crossing=Crossing("next_gate"))
