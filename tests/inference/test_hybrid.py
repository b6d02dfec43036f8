"""The executor with the CPU as its second lane: who computes what, and that it comes out the same."""

from __future__ import annotations

import dataclasses
import os
import shutil

import pytest
import torch
from torch.nn.functional import silu
from transformers import AutoModelForCausalLM, GptOssConfig

from inference.banks import ExpertBanks, NoRegistrar
from inference.cache import ExpertCache
from inference.compiled_experts import COMPILED, compiled_kernels
from inference.costmodel import MachineProfile, Rates, Timing
from inference.cpu_lane import LaneError
from inference.engine import LLM
from inference.errors import InferenceError
from inference.expert_block import ExpertBlock, ExpertShape
from inference.experts import Arithmetic, OffloadedExperts
from inference.hybrid import host_weights, open_cpu_lane
from inference.store import ExpertStore, TensorFiles
from moe.refs import ExpertRef
from tests.inference.linked import Linked

LAYERS, EXPERTS, TOP_K = 4, 16, 4
SIZE = 3 * 64 * 32 * 4
# A link and cores that carry an expert in 20 and 30 microseconds, whether the other is busy or not.
EVEN = MachineProfile(
    name="even",
    hardware="made up",
    source="made up",
    dtype="float32",
    hidden=64,
    intermediate=32,
    threads=2,
    dram=Rates(SIZE / 30e-6, SIZE / 30e-6),
    cpu=(Timing("linear", 2, 1, 30e-6), Timing("linear", 2, 64, 60e-6)),
    cpu_overlapped=SIZE / 30e-6,
    link=Rates(SIZE / 20e-6, SIZE / 20e-6),
    gpu=(Timing("gpu", 1, 1, 1e-6),),
    gpu_memory=1e12,
    gpu_flops=1e14,
)


@pytest.fixture(scope="module")
def store(model_folder):
    paths = {layer: f"model.layers.{layer}.mlp.experts" for layer in range(LAYERS)}
    return ExpertStore(TensorFiles(model_folder), paths, ExpertShape(EXPERTS, 64, 32))


@pytest.fixture
def hybrid(store):
    """Makes a linked model with both lanes, and closes it."""
    lanes = []

    def make(slots, banks=True, profile=EVEN):
        linked = Linked(store, slots, banks=banks)
        lanes.append(open_cpu_lane(linked.banks, linked.modules[0].arithmetic, profile))
        linked.executor.cpu, linked.executor.plan = lanes[-1].experts, lanes[-1].plan
        return linked

    yield make
    for lane in lanes:
        lane.close()


def batch(tokens, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, 64, generator=generator)
    index = torch.rand(tokens, EXPERTS, generator=generator).argsort(dim=1)[:, :TOP_K]
    return x, index, torch.rand(tokens, TOP_K, generator=generator)


def run(linked, store, tokens, passes=5, adapter=None):
    cache = ExpertCache(store, store.total)
    resident = {layer: OffloadedExperts(cache, layer, silu) for layer in store.layers}
    for modules in (linked.modules, resident):
        for module in modules.values():
            module.adapter = adapter
    for number in range(passes):
        for layer in range(LAYERS):
            call = batch(tokens, 10 * number + layer)
            torch.testing.assert_close(linked(layer, *call), resident[layer](*call), rtol=1e-5, atol=1e-5)
            linked.link.advance(1e-4)


@pytest.mark.parametrize("banks", [True, False], ids=["banked", "read"])
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("slots", [1, 12])
def test_both_lanes_carry_their_part_and_results_are_close(hybrid, store, slots, tokens, banks):
    linked = hybrid(slots, banks)
    run(linked, store, tokens)
    fetched, computed = linked.cache.counts.misses, linked.cache.counts.computed
    assert fetched > 0
    assert computed > 0
    if tokens == 1:
        assert 0.8 < fetched / computed < 3, "20 to 30 microseconds"
    assert linked.executor.plan.modes["split"] > 0
    assert linked.executor.plan.newest.reason().startswith(("split", "fetch", "cpu"))


@pytest.mark.parametrize("banks", [True, False], ids=["banked", "read"])
def test_the_compiled_kernel_is_used_where_it_was_fastest(hybrid, store, banks):
    if not compiled_kernels(torch.float32):
        pytest.skip("no C compiler")
    profile = dataclasses.replace(EVEN, cpu=(*EVEN.cpu, Timing(COMPILED, 2, 1, 25e-6), Timing(COMPILED, 2, 64, 1e-3)))
    linked = hybrid(12, banks, profile)
    used = []
    submit = linked.executor.cpu.compiled.submit
    linked.executor.cpu.compiled.submit = lambda work, *rest: used.append(len(work)) or submit(work, *rest)
    with torch.inference_mode():
        run(linked, store, 1)
    assert linked.cache.counts.computed > 0
    assert sum(used) == linked.cache.counts.computed


def test_a_profile_that_counts_on_a_compiler_says_so_without_one(store, monkeypatch):
    def missing():
        raise LaneError("no C compiler")

    monkeypatch.setattr("inference.cpu_lane.library", missing)
    profile = dataclasses.replace(EVEN, cpu=(Timing(COMPILED, 2, 1, 25e-6),))
    linked = Linked(store, 1, banks=False)
    with pytest.raises(InferenceError, match=r"profile of even counts on .* no C compiler; measure this machine"):
        open_cpu_lane(linked.banks, linked.modules[0].arithmetic, profile)


def test_experts_under_an_adapter_stay_on_the_device(hybrid, store):
    class Deltas(torch.nn.Module):
        def gate_up_delta(self, x_NH, counts_E):
            return x_NH.repeat(1, 1) * 0.1

        def down_delta(self, a_NI, counts_E):
            return a_NI.repeat(1, 2) * 0.1

    linked = hybrid(12)
    run(linked, store, 3, passes=2, adapter=Deltas())
    assert linked.cache.counts.computed == 0
    assert linked.cache.counts.misses > 0


def test_all_layouts_are_computed_on_the_cpu(tmp_path):
    """gpt_oss: transposed, interleaved and biased experts, in a bank and before there is one."""
    config = GptOssConfig(
        vocab_size=96, hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_local_experts=6, num_experts_per_tok=2, initializer_range=0.5,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path)
    llm = LLM(tmp_path, device="cpu")
    module = llm.model.model.layers[1].mlp.experts
    x_RH = torch.randn(3, 32)
    scores = torch.ones(3, 1)
    for banks in (True, False):
        linked = Linked(llm.cache.store, 2, banks=banks)
        profile = dataclasses.replace(EVEN, hidden=32, intermediate=24)
        lane = open_cpu_lane(linked.banks, module.arithmetic, profile)
        y_RH = lane.experts.submit(1, [(4, 3)], x_RH).result()
        lane.close()
        torch.testing.assert_close(y_RH, module(x_RH, torch.full((3, 1), 4), scores), rtol=1e-5, atol=1e-5)


def test_weights_come_from_the_bank_once_it_is_there(store):
    linked = Linked(store, 1, banks=True)
    expert = host_weights(linked.banks)(2, 5)
    block_B = linked.banks.block(ExpertRef(2, 5))
    assert expert.gate_up_2IH.data_ptr() == block_B.data_ptr(), "a view, no copy"
    read = host_weights(Linked(store, 1, banks=False).banks)(2, 5)
    assert torch.equal(read.gate_up_2IH, expert.gate_up_2IH)
    assert torch.equal(read.down_HI, expert.down_HI)


def test_before_there_is_a_bank_a_file_that_ends_too_soon_is_said(model_folder, tmp_path):
    folder = shutil.copytree(model_folder, tmp_path / "model")
    paths = {layer: f"model.layers.{layer}.mlp.experts" for layer in range(LAYERS)}
    cut = ExpertStore(TensorFiles(folder), paths, ExpertShape(EXPERTS, 64, 32))
    weights = host_weights(Linked(cut, 1, banks=False).banks)
    os.truncate(folder / "model.safetensors", 4096)
    with pytest.raises(InferenceError, match=r"L02\.E005"):
        weights(2, 5)


def test_experts_have_the_precision_of_banks_before_there_is_one(store):
    banks = ExpertBanks(store, ExpertBlock(store.shape, torch.bfloat16), NoRegistrar(), start=False)
    assert host_weights(banks)(2, 5).dtype == torch.bfloat16


def test_the_activation_between_products_is_one_function(store):
    shape = store.shape
    do = Arithmetic(shape.form, silu, shape.biased)
    h = torch.randn(3, 2 * shape.intermediate)
    assert torch.equal(do.between(h), do.gated(*h.chunk(2, -1)))
