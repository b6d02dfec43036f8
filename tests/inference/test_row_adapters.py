"""Rows of several adapters in one pass: each gets what it gets in a pass of its own."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import AutoModelForCausalLM, DeepseekV2Config, LlamaConfig, LlamaForCausalLM

from inference.engine import LLM
from inference.offload import Crossing
from inference.requests import Request
from inference.rows import Rows, Span
from inference.transfer import SimulatedLink
from lora.attach import attach
from lora.config import BankConfig
from lora.format import collect_adapter, save_adapter
from moe.convert import convert
from moe.fingerprint import fingerprint
from tests.inference.test_engine import FAMILIES, tiny
from tests.inference.test_hybrid import EVEN

ATTENTION = ("q_proj", "v_proj", "o_proj")
MIXTURE = {
    "plain": {"attention": BankConfig("lora", ATTENTION, r=4)},
    "routed": {"attention": BankConfig("mola", ("q_proj", "k_proj"), r=4, num_experts=4, top_k=2)},
    "soft": {"attention": BankConfig("hydralora", ATTENTION, r=2, num_experts=3)},
    "scales": {"attention": BankConfig("mov", ("k_proj", "v_proj"), num_experts=3)},
    "experts": {"experts": BankConfig("expert-lora", ("gate_up_proj", "down_proj"), r=4)},
    "down only": {"experts": BankConfig("expert-lora", ("down_proj",), r=4)},
}
DENSE = {
    "plain": {"attention": BankConfig("lora", ("q_proj", "up_proj"), r=4)},
    "block": {"ffn": BankConfig("mixlora", num_experts=4, r=2)},
}


def save(folder, model_folder, banks):
    """An adapter whose every factor moves the output."""
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    dense = model.config.model_type == "llama"
    attach(model, banks, [] if dense else convert(model))
    generator = torch.Generator().manual_seed(len(str(folder)))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    save_adapter(folder, collect_adapter(model), banks, fingerprint(model_folder))
    return folder


@pytest.fixture(scope="module")
def folders(model_folder, tmp_path_factory):
    home = tmp_path_factory.mktemp("adapters")
    return {name: save(home / name, model_folder, banks) for name, banks in MIXTURE.items()}


def in_one_pass(llm, parts):
    """Scores of every row of (adapter, token ids), all computed together."""
    placed, shares, tables = [], [], []
    for name, ids in parts:
        tables.append(llm.engine.pool.begin(name, ids, share=False))
        placed.append((ids, Span(tuple(tables[-1].blocks), 0, len(ids))))
        shares.append((name, len(ids)))
    rows = dataclasses.replace(Rows.of(placed, every=True), shares=tuple(shares))
    logits = llm.engine.joint.model.forward(rows).split([len(ids) for _, ids in parts])
    for table in tables:
        llm.engine.pool.end(table)
    return logits


def check(llm, prompts, names, tolerance=1e-4):
    """A few names at a time, in any order, with and without rows of the base."""
    rounds = [[*names, None], [None, *reversed(names)], names[:2], [names[-1], None]]
    plain = llm.logits(prompts[3])
    for turn, chosen in enumerate(rounds):
        parts = [(name, prompts[(turn + number) % 6]) for number, name in enumerate(chosen)]
        for (name, ids), got in zip(parts, in_one_pass(llm, parts), strict=True):
            torch.testing.assert_close(got, llm.logits(ids, name), rtol=tolerance, atol=tolerance)
    for name in names:
        assert not torch.allclose(llm.logits(prompts[3], name), plain, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("linked", [False, True], ids=["in memory", "behind a link"])
def test_adapters_of_all_kinds_get_what_each_gets_alone(model_folder, folders, prompts, linked):
    crossing = Crossing("next_gate", cpu=True, profile=EVEN, link=SimulatedLink(rate=5e7)) if linked else None
    with LLM(model_folder, 0.3, device="cpu", poison=True, adapters=folders, crossing=crossing) as llm:
        assert llm.engine.joint.names == {None, *folders}
        check(llm, prompts, list(folders))
        if linked:  # experts under an adapter stay on the device; those of rows without one do not
            before = llm.cache.counts.computed
            in_one_pass(llm, [("experts", prompts[0]), (None, prompts[1])])
            assert llm.cache.counts.computed == before
            in_one_pass(llm, [("plain", prompts[0]), (None, prompts[1])])
            assert llm.cache.counts.computed > before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("cpu", [False, True], ids=["fetched", "and computed"])
def test_adapters_of_all_kinds_get_what_each_gets_alone_on_a_gpu(model_folder, folders, prompts, cpu):
    crossing = Crossing(cpu=cpu, profile=EVEN if cpu else None)
    with LLM(model_folder, 0.3, device="cuda", poison=True, adapters=folders, crossing=crossing) as llm:
        check(llm, prompts, list(folders), tolerance=1e-3)


def test_blocks_that_an_adapter_computes_its_own_way(tmp_path, prompts):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=512, initializer_range=0.3, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    folders = {name: save(tmp_path / name, tmp_path / "model", banks) for name, banks in DENSE.items()}
    check(LLM(tmp_path / "model", device="cpu", adapters=folders), prompts, list(folders))


def test_what_cannot_share_a_pass_has_its_own(model_folder, folders, prompts, tmp_path):
    """Banks beside a whole block; the others of the step share theirs."""
    beside = save(tmp_path / "beside", model_folder, {"beside": BankConfig("perft-r", r=4, num_experts=4, top_k=2)})
    adapters = {"plain": folders["plain"], "beside": beside}
    llm = LLM(model_folder, 0.3, device="cpu", poison=True, adapters=adapters)
    assert llm.engine.joint.names == {None, "plain"}
    made, seen = {}, []
    llm.engine.watch = lambda one: seen.append([name for name, _ in one.shares])
    for number, name in enumerate(("beside", None, "plain", "beside")):
        llm.engine.submit(Request(f"{number}", tuple(prompts[number]), max_new_tokens=4, adapter=name))
    while llm.engine.has_work():
        for output in llm.engine.step():
            made.setdefault(output.id, []).extend(output.new_ids)
    assert seen == [["beside"], [None, "plain"]] * 4
    for number, name in enumerate(("beside", None, "plain", "beside")):
        (alone,) = llm.generate([prompts[number]], 4, adapter=name)
        assert made[f"{number}"] == list(alone.token_ids)


def test_an_adapter_on_what_makes_keys_of_the_past_has_a_pass_of_its_own(tmp_path):
    tiny(DeepseekV2Config, **FAMILIES[DeepseekV2Config]).save_pretrained(tmp_path / "model")
    banks = {"a": {"a": BankConfig("lora", ("kv_b_proj",), r=2)}, "b": {"b": BankConfig("lora", ("o_proj",), r=2)}}
    folders = {name: save(tmp_path / name, tmp_path / "model", bank) for name, bank in banks.items()}
    llm = LLM(tmp_path / "model", device="cpu", adapters=folders)
    assert llm.engine.joint.names == {None, "b"}
    for parts in ([("b", [5, 6, 7]), (None, [8, 9])], [(None, [5, 6, 7, 8]), ("b", [1])]):
        for (name, ids), got in zip(parts, in_one_pass(llm, parts), strict=True):
            torch.testing.assert_close(got, llm.logits(ids, name), rtol=1e-4, atol=1e-4)


def test_one_that_fails_is_computed_by_itself_under_its_own_adapter(model_folder, folders, prompts):
    llm = LLM(model_folder, device="cpu", adapters=folders)

    def fail(made):
        if len(made.shares) > 1:
            raise IndexError("index out of range in self")

    llm.engine.watch = fail
    made = {}
    for name in ("plain", "experts", None):
        llm.engine.submit(Request(f"{name}", tuple(prompts[4]), max_new_tokens=5, adapter=name))
    while llm.engine.has_work():
        for output in llm.engine.step():
            made.setdefault(output.id, []).extend(output.new_ids)
    for name in ("plain", "experts", None):
        assert made[f"{name}"] == list(llm.generate([prompts[4]], 5, adapter=name)[0].token_ids)
