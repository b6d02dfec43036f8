"""Samples that share a row do not see each other: their logits and gradients are those of each sample alone."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, masking_utils

from lora.attach import attach
from lora.config import BankConfig
from moe.context import BatchContext, batch_context
from trainer.batches import make_batch
from trainer.chat_data import IGNORED, ChatRow
from trainer.sample_borders import respect_borders

_SPEC = importlib.util.spec_from_file_location(
    "tiny_families", Path(__file__).resolve().parents[1] / "moe" / "tiny_families.py"
)
tiny_families = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(tiny_families)
# What makes positions and windows matter within the short samples of these tests.
CHANGES = {
    "gpt_oss": {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "mixtral": {"sliding_window": 5},
    "mistral": {"sliding_window": 5},
}
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def told(monkeypatch):
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", masking_utils.find_packed_sequence_indices)
    mapping = type(masking_utils.ALL_MASK_ATTENTION_FUNCTIONS)._global_mapping
    before = dict(mapping)
    respect_borders()
    respect_borders()  # once is enough
    yield
    mapping.update(before)


def row_of(samples, length, tasks=None):
    """A row of (ids, learn) samples, put together by hand."""
    ids_S, labels_S = np.zeros(length, np.int64), np.full(length, IGNORED, np.int64)
    segment_S, position_S = np.full(length, len(samples), np.int64), np.zeros(length, np.int64)
    task_S, at = np.zeros(length, np.int64) if tasks else None, 0
    for i, (ids, learn) in enumerate(samples):
        for j, (token, counts) in enumerate(zip(ids, learn, strict=True)):
            ids_S[at], segment_S[at], position_S[at] = token, i, j
            labels_S[at] = token if counts else IGNORED
            if tasks:
                task_S[at] = tasks[i]
            at += 1
    position_S[at:] = range(length - at)
    places = tuple(f"x:{i + 1}" for i in range(len(samples)))
    return ChatRow(ids_S, labels_S, segment_S, position_S, task_S, np.arange(length) < at, places, (0,) * len(samples))


def some_samples(lengths, seed=0):
    random = np.random.default_rng(seed)
    return [(random.integers(1, 64, n), np.arange(n) >= max(1, n // 2)) for n in lengths]


def built(family, attention):
    changes = {**CHANGES.get(family, {}), "attn_implementation": attention}
    if family in tiny_families.FAMILIES:
        return tiny_families.tiny(family, **changes).eval()
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**tiny_families.SIZES, "initializer_range": 0.2, **changes})
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.mark.parametrize("family", [*sorted(tiny_families.FAMILIES), "llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_samples_have_the_logits_of_each_alone(family, attention):
    if family == "gpt_oss" and attention == "sdpa":
        pytest.skip("its attention sinks are eager only")
    model = built(family, attention)
    rows = [some_samples(lengths, seed) for seed, lengths in enumerate([(9, 7, 11), (20, 3)])]
    batch = make_batch([row_of(samples, 30) for samples in rows], CPU, 1.0)
    inputs = {name: batch.inputs[name] for name in ("input_ids", "position_ids")}
    with torch.no_grad():
        with batch_context(BatchContext(balance=False, **batch.facts)):
            packed = model(**inputs, use_cache=False).logits
        leaking = model(**inputs, use_cache=False).logits
        for row, samples in enumerate(rows):
            at = 0
            for number, (ids, _) in enumerate(samples):
                alone = model(input_ids=torch.from_numpy(ids)[None], use_cache=False).logits[0]
                got = packed[row, at : at + len(ids)]
                assert float((got - alone).abs().max()) <= 2e-6 * max(1.0, float(alone.abs().max())), (row, number)
                if number:
                    assert float((leaking[row, at : at + len(ids)] - alone).abs().max()) > 1e-3
                at += len(ids)


def drawn_mask(device):
    """The mask of two packed rows, True where a token is seen."""
    config = tiny_families.tiny("qwen3_moe", attn_implementation="sdpa").config
    batch = make_batch([row_of(some_samples((3, 4)), 8), row_of(some_samples((8,)), 8)], device, 1.0)
    embeds = torch.zeros(2, 8, 32, device=device)
    context = BatchContext(balance=False, **batch.facts)
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
    try:
        with batch_context(context):
            return masking_utils.create_causal_mask(
                config=config, inputs_embeds=embeds, attention_mask=None, past_key_values=None,
                position_ids=batch.inputs["position_ids"],
            )  # fmt: skip
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def test_masks_are_block_diagonal_and_no_row_of_them_is_empty():
    mask_B1SS = drawn_mask(CPU)
    blocks = torch.block_diag(*(torch.ones(n, n) for n in (3, 4, 1))).tril().bool()
    assert torch.equal(mask_B1SS[0, 0], blocks)
    assert torch.equal(mask_B1SS[1, 0], torch.ones(8, 8).tril().bool())


class _Copies(TorchDispatchMode):
    """Counts the tensors that are copied from one device to another."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        if op is torch.ops.aten._to_copy.default and out.device != args[0].device:
            self.shapes.append(tuple(out.shape))
        return out


@pytest.mark.parametrize(("tasks", "fields"), [([1, 0], 7), (None, 6)])
def test_a_batch_is_copied_to_its_device_at_once(tasks, fields):
    rows = [row_of(some_samples((3, 4)), 8, tasks), row_of(some_samples((6, 2)), 8, tasks)]
    with _Copies() as copies:
        batch = make_batch(rows, torch.device("meta"), 1.0)
    assert copies.shapes == [(fields, 2, 8)]
    here = make_batch(rows, CPU, 1.0)
    for got, want in zip(
        [*batch.inputs.values(), *batch.facts.values()], [*here.inputs.values(), *here.facts.values()], strict=True
    ):
        if isinstance(want, torch.Tensor):
            assert (got.dtype, got.shape) == (want.dtype, want.shape)
    assert [here.facts[f"{name}_T"].dtype for name in ("mask", "segment")] == [torch.bool, torch.int64]
    assert batch.consumed == here.consumed


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_batch_goes_to_a_gpu_without_a_wait_and_whole():
    rows = [row_of(some_samples((3, 4)), 8, [1, 0]), row_of(some_samples((6, 2)), 8, [0, 1])]
    here = make_batch(rows, CPU, 1.0)
    torch.ones(1, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        there = make_batch(rows, torch.device("cuda"), 1.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for name in ("input_ids", "labels", "position_ids"):
        assert torch.equal(there.inputs[name].cpu(), here.inputs[name])
    for name in ("mask_T", "segment_T", "task_T"):
        assert torch.equal(there.facts[name].cpu(), here.facts[name])


@pytest.mark.gpu
def test_a_gpu_draws_the_same_masks_without_reading_back():
    assert torch.equal(drawn_mask(torch.device("cuda")).cpu(), drawn_mask(CPU))


def test_the_loss_and_its_gradient_are_the_mean_over_the_answer_tokens_of_the_whole_global_batch():
    """Two ranks with two micro-batches each, of very different numbers of answer tokens; one has a padded row."""
    rows = [row_of(some_samples(lengths, seed), 24) for seed, lengths in enumerate([(20,), (3, 4), (12, 12), (5,)])]
    model = tiny_families.tiny("qwen3_moe")
    total = sum(int((row.labels_S != IGNORED).sum()) for row in rows)
    losses = []
    for row in rows:  # as the engine does: each divided by ranks and micro-steps, then summed
        batch = make_batch([row], CPU, total / 4)
        with batch_context(BatchContext(**batch.facts)):
            loss = model(**batch.inputs, use_cache=False).loss / 4
        loss.backward()
        losses.append(loss.detach())
    got = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    terms = []
    for row in rows:
        for i in range(len(row.places)):
            here = row.segment_S == i
            ids = torch.from_numpy(row.ids_S[here])
            logits = model(input_ids=ids[None], use_cache=False).logits[0]
            for t in range(1, len(ids)):
                if row.labels_S[here][t] != IGNORED:
                    terms.append(F.cross_entropy(logits[t - 1][None], ids[t][None]))
    want = torch.stack(terms).mean()
    want.backward()
    assert len(terms) == total
    torch.testing.assert_close(sum(losses), want.detach(), rtol=1e-6, atol=0)
    for name, parameter in model.named_parameters():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(got[name], grad, rtol=1e-4, atol=1e-8)


def test_a_micro_batch_without_answers_gives_zero_and_no_nan():
    row = row_of([(np.arange(1, 9), np.zeros(8, bool))], 8)
    model = tiny_families.tiny("qwen3_moe")
    batch = make_batch([row], CPU, 5.0)
    with batch_context(BatchContext(**batch.facts)):
        loss = model(**batch.inputs, use_cache=False).loss
    loss.backward()
    assert loss.item() == 0
    assert all(bool((p.grad == 0).all()) for p in model.parameters() if p.grad is not None)


def test_padding_is_marked_and_tasks_belong_to_their_samples():
    batch = make_batch([row_of(some_samples((4, 3)), 10, [2, 1]), row_of(some_samples((10,)), 10, [1])], CPU, 1.0)
    facts = batch.facts
    assert facts["shape"] == (2, 10)
    assert facts["mask_T"].tolist() == [True] * 7 + [False] * 3 + [True] * 10
    assert facts["segment_T"].tolist() == [0] * 4 + [1] * 3 + [2] * 3 + [0] * 10
    assert facts["task_T"].tolist() == [2] * 4 + [1] * 3 + [0] * 3 + [1] * 10
    assert facts["samples"] == 3
    unnamed = make_batch([row_of(some_samples((4, 3)), 10)], CPU, 1.0)
    assert BatchContext(**unnamed.facts).task_T is None, "else adapters would take all samples for ones of task 0"
    assert batch.inputs["position_ids"][0].tolist() == [0, 1, 2, 3, 0, 1, 2, 0, 1, 2]
    assert batch.inputs["labels"][0, 4] == IGNORED, "no sample's first token is predicted from the sample before"


def test_a_prompt_is_what_comes_before_its_samples_first_token_with_loss():
    labels_BS = np.array([[-100, -100, 5, -100, 6, -100, 7, -100, -100, -100], [-100] * 4 + [1] * 6])
    segment_BS = np.array([[0, 0, 0, 0, 0, 1, 1, 2, 2, 2], [0] * 10])
    row = row_of(some_samples((10,)), 10)
    rows = [
        replace(row, labels_S=labels, segment_S=segment, mask_S=np.arange(10) < (9 if i == 0 else 10))
        for i, (labels, segment) in enumerate(zip(labels_BS, segment_BS, strict=True))
    ]
    prompt_T = make_batch(rows, CPU, 1.0).facts["prompt_T"]
    assert prompt_T.view(2, 10).int().tolist() == [[1, 1, 0, 0, 0, 1, 0, 1, 1, 0], [1, 1, 1, 1, 0, 0, 0, 0, 0, 0]]


def test_packed_samples_are_weighed_by_their_own_prompts_and_by_their_own_first_pass():
    model = built("llama", "sdpa")
    banks = {
        "prompted": BankConfig("milora", ("self_attn.*_proj",), r=2, top_k=2),
        "twice": BankConfig("x-lora", ("down_proj",), num_experts=3, r=2),
    }
    attach(model, banks, [])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if ".adapter." in path:
                parameter.normal_(0, 0.5, generator=generator)

    def logits(batch, **changes):
        inputs = {name: batch.inputs[name] for name in ("input_ids", "position_ids")}
        with torch.no_grad(), batch_context(BatchContext(balance=False, **batch.facts | changes)):
            return model.eval()(**inputs, use_cache=False).logits

    samples, at = some_samples((9, 7, 11)), 0
    batch = make_batch([row_of(samples, 30)], CPU, 1.0)
    packed, everywhere = logits(batch), logits(batch, prompt_T=batch.facts["mask_T"])
    for sample in samples:
        length = len(sample[0])
        alone = logits(make_batch([row_of([sample], length)], CPU, 1.0))[0]
        torch.testing.assert_close(packed[0, at : at + length], alone, rtol=1e-4, atol=1e-5)
        assert (everywhere[0, at : at + length] - alone).abs().max() > 1e-3
        at += length
