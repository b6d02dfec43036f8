"""Traces: what is written is read, damage is found, and replayed routing gives the recorded run's very bits."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM

from moe.balance import switch_loss
from moe.context import BatchContext, batch_context
from moe.families import find_moe_blocks
from moe.stats import RoutingMeter
from moe.trace import BalancedRouting, Recorder, Replay, follow_context, read_trace
from moe.tracefile import Trace, TraceError, TraceHeader, TraceRecord, TraceWriter

HEADER = TraceHeader("qwen3_moe", (0, 1), 8, 2)
COMMON = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    "max_position_embeddings": 64, "num_experts_per_tok": 2, "intermediate_size": 16,
}  # fmt: skip
LATENT = {
    "q_lora_rank": None, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
    "first_k_dense_replace": 0, "n_routed_experts": 8, "n_shared_experts": 1, "moe_intermediate_size": 16,
    "n_group": 2, "topk_group": 1, "routed_scaling_factor": 1.5,
}  # fmt: skip
FAMILIES = {
    "mixtral": {"num_local_experts": 8},
    "qwen2_moe": {"num_experts": 8, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    "qwen3_moe": {"num_experts": 8, "moe_intermediate_size": 16, "head_dim": 16, "norm_topk_prob": True},
    "olmoe": {"num_experts": 8},
    "deepseek_v2": {**LATENT, "topk_method": "group_limited_greedy"},
    "deepseek_v3": LATENT,
    "gpt_oss": {"num_local_experts": 8, "head_dim": 16, "layer_types": ["full_attention"] * 2},
}


def model_of(family="qwen3_moe", seed=0):
    torch.manual_seed(seed)
    tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    config = AutoConfig.for_model(family, **{**COMMON, **FAMILIES[family]}, **tokens)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")


def step(model, record=None, replay=None, seed=1):
    """Loss and gradients of one forward pass."""
    ids_BS = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(seed))
    model.zero_grad()
    with batch_context(BatchContext(record=record, replay=replay)):
        loss = model(input_ids=ids_BS, labels=ids_BS, use_cache=False).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_replayed_step_has_the_recorded_ones_bits(family, tmp_path):
    model = model_of(family)
    blocks = find_moe_blocks(model)
    header = TraceHeader(family, tuple(b.layer for b in blocks), 8, 2, weights=True)
    follow_context(blocks)
    recorder = Recorder(TraceWriter(tmp_path / "t", header))
    loss, grads = step(model, record=recorder.at(3, 0))
    recorder.flush()
    plain_loss, plain = step(model)
    assert torch.equal(loss, plain_loss), "recording changes the step"
    again_loss, again = step(model, replay=Replay(tmp_path / "t", header).at(3, 0))
    assert torch.equal(loss, again_loss)
    assert grads.keys() == again.keys() == plain.keys()
    assert all(torch.equal(grads[name], again[name]) for name in grads)


def test_replay_prevails_over_the_gates_own_choice_and_observers_see_it(tmp_path):
    """Another model's routing is followed, counted, and weighted by this model's own logits."""
    other, model = model_of(seed=5), model_of(seed=0)
    follow_context(find_moe_blocks(other))
    recorder = Recorder(TraceWriter(tmp_path / "t", HEADER))
    step(other, record=recorder.at(1, 0))
    recorder.flush()
    blocks = find_moe_blocks(model)
    follow_context(blocks)
    meter, seen = RoutingMeter(), []
    blocks[0].gate.register_forward_hook(lambda _m, _a, out: meter.add(0, out[2], 8))
    blocks[0].gate.register_forward_hook(lambda _m, _a, out: seen.append(out))
    step(model)
    step(model, replay=Replay(tmp_path / "t", HEADER).at(1, 0))
    own, forced = seen
    recorded = {r.layer: r.index_TK for r in read_trace(tmp_path / "t")}
    assert torch.equal(forced[2], torch.from_numpy(recorded[0].astype("int64")))
    assert not torch.equal(own[2], forced[2])
    chosen_TK = own[0].softmax(-1).gather(1, forced[2])
    torch.testing.assert_close(forced[1], chosen_TK / chosen_TK.sum(-1, keepdim=True))
    counts = meter.take().counts_ME[0] - torch.bincount(own[2].flatten(), minlength=8)
    assert torch.equal(counts, torch.bincount(forced[2].flatten(), minlength=8))


def test_a_pass_that_is_recomputed_is_recorded_once(tmp_path):
    model = model_of()
    blocks = find_moe_blocks(model)
    follow_context(blocks)
    recorder = Recorder(TraceWriter(tmp_path / "t", HEADER))
    x_BSH = torch.randn(1, 6, 32, requires_grad=True)
    with batch_context(BatchContext(record=recorder.at(1, 0))):
        y_BSH = checkpoint(blocks[0].module, x_BSH, use_reentrant=False)
        y_BSH.sum().backward()  # recomputed inside the context, too
    recorder.flush()
    (record,) = read_trace(tmp_path / "t")
    assert (record.step, record.micro, record.layer, record.index_TK.shape) == (1, 0, 0, (6, 2))


def test_balanced_routing_gives_every_expert_its_share(tmp_path):
    model = model_of()
    blocks = find_moe_blocks(model)
    follow_context(blocks)
    seen = []
    blocks[1].gate.register_forward_hook(lambda _m, _a, out: seen.append(out))
    step(model, replay=BalancedRouting(24, 8, 2).at(1, 0))
    logits_TE, _, index_TK = seen[0]
    assert torch.bincount(index_TK.flatten()).tolist() == [6] * 8
    assert (index_TK.sort(1).values.diff(dim=1) > 0).all(), "a token chose an expert twice"
    assert float(switch_loss(torch.full_like(logits_TE, 1 / 8), index_TK)) == 2.0


def test_a_gate_whose_weights_we_do_not_know_is_refused():
    model = model_of()
    blocks = find_moe_blocks(model)
    blocks[1].gate.register_buffer("e_score_correction_bias", torch.zeros(8))  # says sigmoid, does softmax
    follow_context(blocks)
    with pytest.raises(TraceError, match=r"layers\.1\.mlp: cannot replay"):
        step(model, replay=BalancedRouting(24, 8, 2).at(1, 0))


def records_of(draw_sizes, header, seed=0):
    random = np.random.default_rng(seed)
    return [
        TraceRecord(
            i // 3,
            i % 3,
            header.layers[i % len(header.layers)],
            random.integers(0, header.num_experts, (tokens, header.top_k)),
            random.random((tokens, header.top_k), dtype="f4") if header.weights else None,
        )
        for i, tokens in enumerate(draw_sizes)
    ]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 5), max_size=6), st.booleans(), st.sampled_from([8, 40_000]), st.data())
def test_what_is_written_is_read_and_a_cut_anywhere_loses_the_last_record_only(
    tmp_path_factory, sizes, weights, num_experts, data
):
    path = tmp_path_factory.mktemp("trace") / "t"
    header = TraceHeader("x", (2, 5), num_experts, 2, weights=weights)
    records = records_of(sizes, header)
    ends = []
    writer = TraceWriter(path, header)
    for record in records:
        ends.append(path.stat().st_size)
        writer.write(record)
    writer.close()

    def same(found, wanted):
        assert len(found) == len(wanted)
        for a, b in zip(found, wanted, strict=True):
            assert (a.step, a.micro, a.layer) == (b.step, b.micro, b.layer)
            assert np.array_equal(a.index_TK, b.index_TK)
            assert (a.weights_TK is None) == (not weights)
            assert not weights or np.array_equal(a.weights_TK, b.weights_TK)

    same(list(read_trace(path)), records)
    assert Trace(path).header == header
    if not records:
        return
    whole = path.read_bytes()
    path.write_bytes(whole[: data.draw(st.integers(ends[-1], len(whole) - 1))])
    same(list(read_trace(path)), records[:-1])
    again = TraceWriter(path, header)  # the torn tail must not swallow the next record
    again.write(records[-1])
    again.close()
    assert path.read_bytes() == whole


def test_a_flipped_byte_anywhere_before_the_end_is_refused_and_never_read_as_a_cut(tmp_path, capsys):
    path = tmp_path / "t"
    writer = TraceWriter(path, HEADER)
    for record in records_of([2, 3], HEADER):
        writer.write(record)
    writer.close()
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
        with pytest.raises(TraceError, match=str(path)):
            Trace(path)
    path.write_bytes(whole[:-1])
    assert len(Trace(path).keys) == 1
    assert "cut short and is left out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": "mixtral"}, "model qwen3_moe, this model has mixtral"),
        ({"num_experts": 16}, "num_experts 8, this model has 16"),
        ({"layers": (0, 1, 2)}, r"layers \(0, 1\)"),
        ({"world": 2}, "world 1, this model has 2"),
    ],
)
def test_another_models_trace_is_refused(tmp_path, change, words):
    TraceWriter(tmp_path / "t", HEADER).close()
    header = TraceHeader(**{**vars(HEADER), **change})
    with pytest.raises(TraceError, match=words):
        Replay(tmp_path / "t", header)
    with pytest.raises(TraceError, match="remove it"):
        TraceWriter(tmp_path / "t", header)


def test_what_was_not_recorded_is_said(tmp_path):
    model = model_of()
    follow_context(find_moe_blocks(model))
    writer = TraceWriter(tmp_path / "t", HEADER)
    writer.write(records_of([3], HEADER)[0])
    with pytest.raises(TraceError, match=r"no step 7, micro-batch 0, layer 0; it has steps 0 to 0"):
        step(model, replay=Replay(tmp_path / "t", HEADER).at(7, 0))
    with pytest.raises(TraceError, match=r"layer 0: the trace has \[3, 2\] \[tokens, choices\], this batch \[24, 2\]"):
        step(model, replay=Replay(tmp_path / "t", HEADER).at(0, 0))
    with pytest.raises(TraceError, match="No such file"):
        Replay(tmp_path / "none", HEADER)
