"""More experts that change nothing at first, and old ones that never change."""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from moe.convert import convert
from moe.extend import ExtendError, Extension, extend, freeze_experts
from moe.refs import TensorAddress
from moe.upcycle import Upcycling, upcycle
from tests.moe.test_upcycle import dense_folder, logits
from trainer.cli import main

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "intermediate_size": 24, "max_position_embeddings": 64, "initializer_range": 0.2, "num_experts_per_tok": 2,
    "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
FAMILIES = {
    "mixtral": {"num_local_experts": 6},
    "qwen3_moe": {"num_experts": 6, "moe_intermediate_size": 24, "norm_topk_prob": True, "head_dim": 16},
    "qwen2_moe": {"num_experts": 6, "moe_intermediate_size": 24, "norm_topk_prob": True,
                  "shared_expert_intermediate_size": 8},
    "olmoe": {"num_experts": 6, "norm_topk_prob": True},
    "deepseek_v3": {"n_routed_experts": 6, "n_shared_experts": 1, "moe_intermediate_size": 24, "n_group": 1,
                    "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": None, "kv_lora_rank": 16,
                    "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16, "num_key_value_heads": 2},
    "gpt_oss": {"num_local_experts": 6, "head_dim": 16},
}  # fmt: skip


def folder_of(path, family="qwen3_moe"):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**SIZES, **FAMILIES[family]}))
    model.save_pretrained(path)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_where_no_new_expert_is_chosen_the_extended_model_computes_what_the_old_one_did(tmp_path, family):
    old = folder_of(tmp_path / "old", family)
    assert extend(tmp_path / "old", tmp_path / "new", Extension(experts=8)) == 6
    new, info = AutoModelForCausalLM.from_pretrained(tmp_path / "new", output_loading_info=True)
    assert [name for name in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[name]] == []
    chosen = []
    for block in convert(new):
        assert block.experts.num_experts == 14
        block.gate.register_forward_hook(lambda _m, _a, out: chosen.append(out[2]))
    got, want = logits(new), logits(old)
    untouched_BS = (torch.stack(chosen) < 6).all(-1).all(0).view(2, 12)
    before_BS = untouched_BS.long().cumprod(1).bool()  # attention carries a change to later positions
    assert before_BS.sum() >= 12
    torch.testing.assert_close(got[before_BS], want[before_BS], rtol=1e-5, atol=1e-5)
    assert untouched_BS.float().mean() > 0.75


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_new_experts_are_noisy_copies_in_turn_with_rows_that_differ(tmp_path, family):
    old = folder_of(tmp_path / "old", family).model.layers[1].mlp
    gate = "router" if family == "gpt_oss" else "gate"
    for router in ("mean", "copy"):
        extend(tmp_path / "old", tmp_path / router, Extension(8, noise=0.1, router=router))
        new = AutoModelForCausalLM.from_pretrained(tmp_path / router).model.layers[1].mlp
        assert torch.equal(new.experts.down_proj[:6], old.experts.down_proj)
        old_gate, new_gate = getattr(old, gate), getattr(new, gate)
        assert torch.equal(new_gate.weight[:6], old_gate.weight)
        if family == "gpt_oss":
            assert torch.equal(new.experts.gate_up_proj_bias[:6], old.experts.gate_up_proj_bias)
            added = old_gate.bias.mean().expand(8) if router == "mean" else old_gate.bias[torch.arange(8) % 6]
            torch.testing.assert_close(new_gate.bias, torch.cat([old_gate.bias, added]))
        for j in range(8):
            source = old.experts.down_proj[j % 6].detach()
            ratio = (new.experts.down_proj[6 + j].detach() - source).std() / source.std()
            assert float(ratio) == pytest.approx(0.1, rel=0.15)
        rows = old_gate.weight.detach()
        wanted = rows.mean(0).expand(8, -1) if router == "mean" else rows[torch.arange(8) % 6]
        assert float((new_gate.weight[6:].detach() - wanted).std() / rows.std()) == pytest.approx(0.01, rel=0.2)
        assert len(new_gate.weight.detach().unique(dim=0)) == 14


def test_what_cannot_be_extended_is_refused_and_leaves_nothing(tmp_path):
    dense_folder(tmp_path / "dense")
    with pytest.raises(ExtendError, match="upcycle first"):
        extend(tmp_path / "dense", tmp_path / "new", Extension(2))
    config = AutoConfig.for_model("deepseek_v3", n_routed_experts=8, n_group=4)
    config.save_pretrained(tmp_path / "grouped")
    with pytest.raises(ExtendError, match="this deepseek_v3 routes by n_group=4 groups of 2 neighbouring experts"):
        extend(tmp_path / "grouped", tmp_path / "new", Extension(2))
    with pytest.raises(ExtendError, match="at least one"):
        Extension(0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "grouped"]


def test_the_command_extends_an_upcycled_model(tmp_path, capsys):
    dense_folder(tmp_path / "dense")
    upcycle(tmp_path / "dense", tmp_path / "moe", Upcycling(copies=2, top_groups=1))
    words = ["extend", str(tmp_path / "moe"), str(tmp_path / "more"), "--experts", "3", "--router", "copy"]
    assert main(words) == 0
    assert AutoConfig.from_pretrained(tmp_path / "more").num_experts == 5
    assert "model.frozen_experts=2" in capsys.readouterr().out
    assert main(words) == 2


def test_a_frozen_part_changes_no_output_and_no_gradient_of_what_trains(tiny_model):
    plain, split = tiny_model(), tiny_model()
    blocks = convert(plain), convert(split)
    freeze_experts(split, blocks[1], 5)
    ids_BS = torch.arange(24).view(2, 12)
    losses = []
    for model in (plain, split):
        losses.append(model(input_ids=ids_BS, labels=ids_BS, use_cache=False).loss)
        losses[-1].backward()
    assert torch.equal(*losses)
    for one, other in zip(*blocks, strict=True):
        for name in ("gate_up_proj", "down_proj"):
            trained = other.experts.parametrizations[name].original
            assert torch.equal(trained.grad, getattr(one.experts, name).grad[5:])
        assert torch.equal(other.gate.weight.grad, one.gate.weight.grad)
    trained = {name for name, p in split.named_parameters() if p.requires_grad}
    assert len(trained) == 6, "routers and the new experts' two tensors, of two layers"
    address = blocks[1][1].experts.parametrizations.down_proj.original.address
    assert address == TensorAddress("model.layers.1.mlp.experts.down_proj", (3, 32, 16), 1, "down_proj", 5, 8)
    assert [span.unit for span in address.units()] == [f"L01.E{e:03d}.down_proj" for e in (5, 6, 7)]


def test_adamw_with_weight_decay_leaves_frozen_experts_alone(tiny_model):
    model = tiny_model()
    blocks = convert(model)
    before = copy.deepcopy({name: p.detach() for name, p in model.named_parameters()})
    freeze_experts(model, blocks, 5)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.5)
    ids_BS = torch.arange(24).view(2, 12)
    for _ in range(3):
        model(input_ids=ids_BS, labels=ids_BS, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for block in blocks:
        for name in ("gate_up_proj", "down_proj"):
            was, now = before[f"{block.path}.experts.{name}"], getattr(block.experts, name).detach()
            assert torch.equal(now[:5], was[:5])
            assert (now[5:] != was[5:]).all()
    assert torch.equal(model.lm_head.weight, before["lm_head.weight"])


def test_all_experts_may_be_frozen_and_more_may_not(tiny_model):
    model = tiny_model()
    blocks = convert(model)
    freeze_experts(model, blocks, 8)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {f"{b.path}.gate.weight" for b in blocks}
    with pytest.raises(ExtendError, match="has 8 experts"):
        freeze_experts(model, blocks, 9)
