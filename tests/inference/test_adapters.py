"""Adapters as `lora.format` saves them, on the offloaded runtime."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from inference.engine import LLM
from inference.errors import InferenceError
from inference.model import Model
from inference.opening import adapt, join, open_base, open_kv
from inference.requests import Request, SamplingParams
from inference.runtime import Runtime
from lora.attach import attach
from lora.config import BankConfig
from lora.errors import AdapterError
from lora.format import apply_adapter, collect_adapter, load_adapter, save_adapter
from moe.convert import convert
from moe.fingerprint import fingerprint
from trainer import generate

EXPERTS = BankConfig(preset="expert-lora", targets=("gate_up_proj", "down_proj"), r=4, alpha=8.0)
ROUTED = BankConfig(preset="mola", targets=("q_proj", "v_proj"), r=4, alpha=8.0, num_experts=4, top_k=2)


def save(folder, model_folder, banks):
    """An adapter whose every factor is set, so that each of them moves the output."""
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    attach(model, banks, convert(model), layout_ep=1)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".B"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    save_adapter(folder, collect_adapter(model), banks, fingerprint(model_folder))
    return folder


@pytest.fixture(scope="module")
def expert_adapter(model_folder, tmp_path_factory):
    return save(tmp_path_factory.mktemp("adapters") / "experts", model_folder, {"experts": EXPERTS})


@pytest.fixture(scope="module")
def mixed_adapter(model_folder, tmp_path_factory):
    banks = {"experts": EXPERTS, "attention": ROUTED}
    return save(tmp_path_factory.mktemp("adapters") / "mixed", model_folder, banks)


@pytest.fixture(scope="module")
def merged_tokens(model_folder, expert_adapter, prompts, huggingface_tokens):
    """transformers' generate on weights into which the adapter was merged: W + alpha/r B A."""
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    plain = huggingface_tokens(model, prompts[:2], 64)
    factors = load_file(expert_adapter / "bank.safetensors")
    with torch.no_grad():
        for layer, block in enumerate(model.model.layers):
            for name in EXPERTS.targets:
                path = f"model.layers.{layer}.mlp.experts.adapter.{name}"
                delta = EXPERTS.alpha / EXPERTS.r * factors[f"{path}.B"] @ factors[f"{path}.A"]
                getattr(block.mlp.experts, name).add_(delta)
    merged = huggingface_tokens(model, prompts, 64)
    assert merged[:2] != plain, "the adapter must matter"
    return merged


@pytest.mark.parametrize("budget", [0.0, 0.1, 1.0])
def test_greedy_tokens_equal_those_of_the_merged_model(model_folder, expert_adapter, prompts, merged_tokens, budget):
    llm = LLM(model_folder, expert_budget=budget, adapter=expert_adapter, device="cpu", poison=True)
    assert [g.token_ids for g in llm.generate(prompts, 64)] == merged_tokens


def test_routed_and_expert_banks_together_equal_the_training_model(
    model_folder, mixed_adapter, prompts, huggingface_tokens
):
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    apply_adapter(model, load_adapter(mixed_adapter))
    expected = huggingface_tokens(model.eval(), prompts[:4], 32)
    llm = LLM(model_folder, expert_budget=0.1, adapter=mixed_adapter, device="cpu", poison=True)
    assert [g.token_ids for g in llm.generate(prompts[:4], 32)] == expected
    plain = LLM(model_folder, expert_budget=0.1, device="cpu")
    assert [g.token_ids for g in plain.generate(prompts[:4], 32)] != expected


@pytest.mark.parametrize("preset", ["expert-lora-shared", "expert-lora-shared-outer"])
def test_factors_that_experts_share_give_the_training_models_tokens(
    model_folder, prompts, huggingface_tokens, tmp_path, preset
):
    folder = save(tmp_path / "shared", model_folder, {"experts": BankConfig(preset, r=4, alpha=8.0, dropout=0.1)})
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    apply_adapter(model, load_adapter(folder))
    expected = huggingface_tokens(model.eval(), prompts[:4], 32)
    llm = LLM(model_folder, expert_budget=0.1, adapter=folder, device="cpu", poison=True)
    assert [g.token_ids for g in llm.generate(prompts[:4], 32)] == expected
    plain = LLM(model_folder, expert_budget=0.1, device="cpu")
    assert [g.token_ids for g in plain.generate(prompts[:4], 32)] != expected


def test_logits_with_an_adapter_have_the_same_bits_at_every_budget(model_folder, mixed_adapter, prompts):
    runs = []
    for budget in (0.0, 0.1, 1.0):
        llm = LLM(model_folder, expert_budget=budget, adapter=mixed_adapter, device="cpu", poison=True)
        runs.append([llm.logits(prompt) for prompt in prompts[:6]])
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


def test_several_adapters_at_once_give_what_each_gives_alone(model_folder, expert_adapter, mixed_adapter, prompts):
    folders = {"experts": expert_adapter, "mixed": mixed_adapter}
    llm = LLM(model_folder, expert_budget=0.3, adapters=folders, device="cpu", poison=True)
    prompt = prompts[15] * 3  # three full blocks, which other adapters must not find
    for i, name in enumerate([None, "mixed", "experts"] * 2):
        params = SamplingParams(temperature=0.7, seed=i)
        llm.engine.submit(Request(f"{i} {name}", tuple(prompt), params, 12, name))
        llm.engine.submit(Request(f"{i} {name}, short", tuple(prompts[i]), max_new_tokens=12, adapter=name))
    made: dict[str, list[int]] = {}
    while llm.engine.has_work():
        for output in llm.engine.step():
            made.setdefault(output.id, []).extend(output.new_ids)
    passes, steps = llm.engine.counts.passes, llm.engine.counts.steps
    assert passes == steps, "all adapters of a step share a pass"
    for name, folder in {None: None, **folders}.items():
        single = LLM(model_folder, expert_budget=0.3, adapter=folder, device="cpu", poison=True)
        assert torch.equal(llm.logits(prompt, name), single.logits(prompt))
        for i in range(6):
            if f"{i} {name}" in made:
                (long,) = single.generate([prompt], 12, temperature=0.7, seed=i)
                (short,) = single.generate([prompts[i]], 12)
                assert made[f"{i} {name}"] == list(long.token_ids)
                assert made[f"{i} {name}, short"] == list(short.token_ids)
    assert llm.generate([prompts[3]], 8, adapter="mixed") != llm.generate([prompts[3]], 8)


def test_adapters_share_the_weights_of_the_base(model_folder, expert_adapter, mixed_adapter):
    base = open_base(model_folder, 0.3, torch.device("cpu"), None, poison=True, policy=None)
    kv = open_kv(base, 64)

    def held(*modules):
        for module in modules:
            Model(module, kv)  # which joins projections, once for all
        tensors = [t for m in modules for n, t in m.named_parameters() if ".adapter." not in n]
        return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}

    alone = held(base.module)
    trees = adapt(base, {"one": expert_adapter, "two": expert_adapter, "mixed": mixed_adapter})
    joint, names = join(base, trees)
    assert names == {None, *trees}
    assert held(base.module, *trees.values(), joint) == alone
    assert all(layer.mlp.experts.cache is base.cache for tree in trees.values() for layer in tree.model.layers)


def test_adapters_that_are_asked_for_wrongly_are_refused(model_folder, expert_adapter):
    with pytest.raises(InferenceError, match="adapter and adapters are both given"):
        LLM(model_folder, adapter=expert_adapter, adapters={"one": expert_adapter})
    llm = LLM(model_folder, adapters={"one": expert_adapter}, device="cpu")
    with pytest.raises(InferenceError, match="no adapter 'law'; loaded: one"):
        llm.generate([[1]], 4, adapter="law")


def test_adapters_that_have_to_see_a_prompt_whole_or_twice_are_refused(model_folder, tmp_path):
    banks = {"prompted": BankConfig("milora", ("self_attn.*_proj",), r=2, top_k=2)}
    folder = save(tmp_path / "prompted", model_folder, banks)
    with pytest.raises(AdapterError, match=r"adapter\.prompted \(milora\) has to see a prompt whole .* in pieces"):
        LLM(model_folder, adapter=folder, device="cpu")
    folder = save(tmp_path / "twice", model_folder, {"twice": BankConfig("x-lora", ("q_proj",), num_experts=2, r=2)})
    with pytest.raises(AdapterError, match=r"adapter\.twice \(x-lora\) runs the model twice; this runtime"):
        LLM(model_folder, adapter=folder, device="cpu")


def test_an_adapter_of_another_base_is_refused(model_folder, expert_adapter, tmp_path):
    other = shutil.copytree(model_folder, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AdapterError, match="was trained on base"):
        LLM(other, adapter=expert_adapter)


def test_the_command_serves_an_adapter_and_refuses_a_damaged_one(model_folder, expert_adapter, tmp_path, capsys):
    def run(adapter):
        return generate.main(str(model_folder), "The gate scores", adapter and str(adapter), 16, Runtime(0.25))

    assert run(None) == 0
    plain = capsys.readouterr().out
    assert run(expert_adapter) == 0
    adapted = capsys.readouterr().out
    assert adapted.split("experts: ")[0] != plain.split("experts: ")[0]
    damaged = shutil.copytree(expert_adapter, tmp_path / "damaged")
    with open(damaged / "bank.safetensors", "r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    assert run(damaged) == 2
    assert "checksum" in capsys.readouterr().err
