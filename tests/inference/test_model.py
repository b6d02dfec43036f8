"""The runtime's own forward pass against transformers', family by family."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from inference.attention import gathered
from inference.errors import InferenceError
from inference.kv import KVShape, PagedKV
from inference.model import Model, Rows, Span
from inference.rows import groups, written
from lora.attach import attach
from lora.config import BankConfig

SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 96, "max_position_embeddings": 512, "initializer_range": 0.2,
    "tie_word_embeddings": False,
}  # fmt: skip
MOE = {"moe_intermediate_size": 16, "num_experts": 6, "num_experts_per_tok": 2}
FAMILIES = {
    "llama": {"attention_bias": True},
    "llama3-rope": {
        "model_type": "llama",
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "tied": {"model_type": "llama", "tie_word_embeddings": True},
    "mistral": {"sliding_window": 7, "head_dim": 16},
    "qwen2": {
        "use_sliding_window": True, "sliding_window": 5,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
    },
    "qwen3": {"head_dim": 16},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 9},
    "qwen2_moe": MOE | {"shared_expert_intermediate_size": 24},
    "qwen3_moe": MOE | {"head_dim": 16, "mlp_only_layers": [1], "norm_topk_prob": True},
    "olmoe": {"num_experts": 6, "num_experts_per_tok": 2, "clip_qkv": 1.5, "num_key_value_heads": 4},
}  # fmt: skip
LATENT = {
    "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 12, "v_head_dim": 10, "num_key_value_heads": 4,
    "n_routed_experts": 8, "moe_intermediate_size": 16, "num_experts_per_tok": 2, "n_shared_experts": 1,
    "first_k_dense_replace": 1, "attention_bias": True,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 0.7, "beta_fast": 32.0,
    "beta_slow": 1.0, "original_max_position_embeddings": 16,
}  # fmt: skip
FAMILIES |= {
    "deepseek_v2": LATENT | {"q_lora_rank": None, "n_group": 1, "topk_group": 1, "topk_method": "greedy"},
    "deepseek_v3": LATENT | {"q_lora_rank": 24, "n_group": 2, "topk_group": 1},
    "deepseek_v3-halves": LATENT | {
        "model_type": "deepseek_v3", "q_lora_rank": None, "n_group": 2, "topk_group": 1, "rope_interleave": False,
        "rope_parameters": YARN, "v_head_dim": 24,
    },
    "gpt_oss": {
        "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "sliding_window": 6, "rope_parameters": YARN,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
}  # fmt: skip
LENGTHS = (19, 1, 33, 8)


def tiny(family, dtype=torch.float32, **more):
    sizes = SIZES | FAMILIES[family] | more
    torch.manual_seed(0)
    config = AutoConfig.for_model(sizes.pop("model_type", family), **sizes)
    module = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "norm" in name or name.endswith(("bias", "sinks")):
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return module


def texts():
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 96, (length,), generator=generator).tolist() for length in LENGTHS]


def paged(module, dtype=torch.float32, block_size=4):
    """A pool whose blocks are handed out in a random order, and the blocks of each text."""
    kv = PagedKV(KVShape.of(module.config), 64, block_size, dtype=dtype)
    free = list(range(64))
    random.Random(5).shuffle(free)
    return kv, [tuple(free.pop() for _ in range(-(-length // block_size))) for length in LENGTHS]


@torch.no_grad()
def reference(module, ids):
    return module(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


def run(model, texts, tables, chunks):
    """All scores of each text, fed in ``chunks``: for each call how many rows of each text."""
    done, found = [0] * len(texts), [[] for _ in texts]
    for call in chunks:
        parts = [
            (ids[at : at + rows], Span(table, at, min(rows, len(ids) - at)))
            for ids, table, at, rows in zip(texts, tables, done, call, strict=True)
            if rows and at < len(ids)
        ]
        if not parts:
            break
        fed = [min(rows, len(ids) - at) for ids, at, rows in zip(texts, done, call, strict=True)]
        scores = model.forward(Rows.of(parts, every=True)).split([span.rows for _, span in parts])
        for number in range(len(texts)):
            if fed[number]:
                found[number].append(scores[sum(1 for n in range(number) if fed[n])])
        done = [at + rows for at, rows in zip(done, fed, strict=True)]
    return [torch.cat(parts) for parts in found]


CHUNKS = {
    "whole": [(40, 40, 40, 40)],
    "chunked": [(7, 1, 16, 3), (7, 0, 16, 3), (7, 0, 16, 3)],
    "decoding beside a prompt": [(6, 1, 0, 3), (1, 0, 20, 1), (1, 0, 12, 1), *[(1, 0, 1, 1)] * 12],
    "decoding": [(4, 1, 21, 4), *[(1, 0, 1, 1)] * 15],
}


@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_transformers(family, chunks):
    module = tiny(family)
    expected = [reference(module, ids) for ids in texts()]
    kv, tables = paged(module)
    found = run(Model(module, kv), texts(), tables, chunks)
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-5)


def test_a_window_that_reaches_back_leaves_out_the_blocks_before_it():
    spans = (Span((9, 3, 7, 5), 13, 1),)
    (group,) = groups(spans, 4, 3, torch.device("cpu"))
    assert group.keys.tolist() == [[7, 5]]
    assert group.length == 6
    assert group.mask.flatten().tolist() == [False, False, False, True, True, True]


def test_a_long_sequence_does_not_pad_short_ones_to_its_length():
    spans = [Span(tuple(range(blocks)), 4 * blocks - 1, 1) for blocks in (3, 60, 15, 40, 500)]
    found = groups(spans, 4, None, torch.device("cpu"))
    rows = [torch.arange(5)[group.rows].tolist() for group in found]
    assert rows == [[0, 2], [1, 3], [4]]
    assert [group.length for group in found] == [60, 240, 2000]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 30), st.one_of(st.just(1), st.integers(1, 12))), min_size=1, max_size=5),
    st.integers(1, 7),
    st.one_of(st.none(), st.integers(1, 20)),
    st.randoms(use_true_random=False),
)
def test_every_row_sees_the_keys_before_it_and_no_others(parts, block_size, window, randomness):
    """Pool positions hold (sequence, position); each row's visible keys are spelled out and compared."""
    needed = [-(-(start + rows) // block_size) for start, rows in parts]
    numbers = list(range(sum(needed) + 2))
    randomness.shuffle(numbers)
    spans = []
    for (start, rows), count in zip(parts, needed, strict=True):
        spans.append(Span(tuple(numbers.pop() for _ in range(count)), start, rows))
    pool = torch.full(((sum(needed) + 2) * block_size, 2), -1)
    owners = []
    for number, span in enumerate(spans):
        whole = Span(span.blocks, 0, span.length)
        for position, slot in enumerate(written([whole], block_size)):
            pool[slot] = torch.tensor([number, position])
        owners += [(number, position) for position in range(span.start, span.length)]
    pool_NSC = pool.view(-1, block_size, 2)
    seen = {}
    for group in groups(spans, block_size, window, torch.device("cpu")):
        keys_BLC = gathered(pool_NSC, group)
        rows = torch.arange(len(owners))[group.rows].view(group.sequences, group.queries)
        mask = torch.ones(group.queries, group.length).tril().bool() if group.causal else group.mask
        for b in range(group.sequences):
            for q in range(group.queries):
                row_L = torch.ones(group.length, dtype=torch.bool)
                if mask is not None:
                    row_L = mask[q] if mask.dim() == 2 else mask[b, 0, 0]
                seen[int(rows[b, q])] = [tuple(key) for key in keys_BLC[b][row_L].tolist()]
    for row, (number, position) in enumerate(owners):
        first = 0 if window is None else max(position - window + 1, 0)
        assert seen[row] == [(number, at) for at in range(first, position + 1)]


def test_rows_are_written_to_their_blocks():
    assert written([Span((4, 1), 2, 4), Span((0,), 0, 1)], 4) == [18, 19, 4, 5, 0]
    with pytest.raises(AssertionError, match="too few blocks"):
        written([Span((4,), 2, 4)], 4)


def test_scores_come_in_the_order_wanted():
    module = tiny("llama")
    kv, tables = paged(module)
    ids = texts()[0]
    parts = [(ids, Span(tables[0], 0, len(ids)))]
    every, last = Rows.of(parts, every=True), Rows.of(parts)
    model = Model(module, kv)
    all_LV = model.forward(every)
    assert last.logit_rows == (len(ids) - 1,)
    torch.testing.assert_close(model.forward(last), all_LV[-1:])
    chosen = Rows(every.token_R, every.position_R, every.spans, (7, 2))
    torch.testing.assert_close(model.forward(chosen), all_LV[[7, 2]])


def test_joined_weights_are_held_once():
    module = tiny("qwen2")
    Model(module, paged(module)[0])
    attention = module.model.layers[0].self_attn
    mlp = module.model.layers[0].mlp
    for together in ((attention.q_proj, attention.k_proj, attention.v_proj), (mlp.gate_proj, mlp.up_proj)):
        assert len({part.weight.untyped_storage().data_ptr() for part in together}) == 1


@pytest.mark.parametrize(
    ("family", "banks"),
    [
        ("llama", {"all": BankConfig("lora", targets=("q_proj", "o_proj", "up_proj", "down_proj"), r=2)}),
        ("qwen3", {"ffn": BankConfig("mixlora", num_experts=4, r=2), "attention": BankConfig("lora", r=2)}),
        ("deepseek_v3", {"latent": BankConfig("lora", targets=("kv_b_proj", "q_a_proj", "o_proj"), r=2)}),
        ("deepseek_v2", {"query": BankConfig("lora", targets=("q_proj", "down_proj"), r=2)}),
        ("gpt_oss", {"attention": BankConfig("mola", targets=("q_proj", "v_proj"), r=2, num_experts=4, top_k=2)}),
        ("qwen2_moe", {"shared": BankConfig("lora", targets=("shared_expert.up_proj", "k_proj", "v_proj"), r=2)}),
    ],
)
def test_adapters_on_attention_dense_blocks_and_shared_experts_count(family, banks):
    module = tiny(family)
    plain = reference(module, texts()[0])
    attach(module, banks, [])
    for parameter in module.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    kv, tables = paged(module)
    expected = [reference(module, ids) for ids in texts()]
    assert not torch.allclose(plain, expected[0], atol=1e-2)
    for got, want in zip(run(Model(module, kv), texts(), tables, CHUNKS["chunked"]), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
def test_absorbed_attention_is_the_same_function(family):
    """In fp64 and without mixtures (whose gates round to fp32): made keys in chunks against absorbed ones."""
    module = tiny(family, torch.float64, first_k_dense_replace=3)
    made, absorbed = (
        run(Model(module, paged(module, torch.float64)[0]), texts(), paged(module)[1], CHUNKS[how])
        for how in ("whole", "decoding")
    )
    for one, other in zip(made, absorbed, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


def test_families_that_are_not_served_are_named():
    module = tiny("llama")
    module.config.model_type = "mamba"
    with pytest.raises(InferenceError, match="type 'mamba' are not served; served are llama, mistral"):
        Model(module, paged(module)[0])


def test_rotations_that_depend_on_the_length_of_the_text_are_refused():
    module = tiny("llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    with pytest.raises(InferenceError, match="rope_type 'dynamic' is not served"):
        Model(module, paged(module)[0])


def test_a_block_has_the_bytes_of_its_positions():
    config = tiny("qwen3").config
    assert PagedKV.bytes_per_block(config, torch.bfloat16, 8) == 3 * 8 * 2 * 2 * 16 * 2
    kv = PagedKV(KVShape.of(config), 5, 8, dtype=torch.bfloat16)
    assert kv.pool_LNSCD.nbytes == 5 * PagedKV.bytes_per_block(config, torch.bfloat16, 8)
