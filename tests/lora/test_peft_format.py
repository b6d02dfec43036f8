"""What PEFT itself computes from our folders: the same function to the last bit, or nothing at all."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    LlamaConfig,
    MixtralConfig,
    Qwen2MoeConfig,
)

from lora.base_facts import BaseFacts
from lora.config import BankConfig
from lora.errors import AdapterError
from lora.format import Adapter, apply_adapter, collect_adapter, load_adapter, save_adapter
from lora.peft_format import pack_a, pack_b, peft_files, unpack_a, unpack_b, write_peft
from lora.peft_import import import_adapter
from moe.fingerprint import fingerprint

TOKENS = torch.arange(48).view(4, 12)
# PEFT looks for the patterns among modules alone, and warns falsely where they are of parameters.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*rank_pattern", "ignore:.*alpha_pattern", "ignore:.*no module was matched", "ignore:.*missing adapter keys"
)
EXPERTS = {"e": BankConfig("expert-lora", r=4, alpha=6.8)}
ATTENTION = {"a": BankConfig("lora", ("q_proj", "o_proj"), r=3, alpha=4.1)}
ROUTED = EXPERTS | {"a": BankConfig("mola", r=2)}
CASES = {
    "experts": EXPERTS,
    "down only": {"down": BankConfig("expert-lora", ("down_proj",), r=3, alpha=6.0)},
    "gate_up only": {"up": BankConfig("expert-lora", ("gate_up_proj",), r=3, alpha=1.5)},
    "a rank for each": {
        "up": BankConfig("expert-lora", ("gate_up_proj",), r=3, alpha=6.0),
        "down": BankConfig("expert-lora", ("down_proj",), r=6, alpha=2.5),
    },
    "a rank for each layer": {"e": BankConfig("expert-lora", r=(2, 4), alpha=8.0)},
    "attention": ATTENTION,
    "attention and experts": EXPERTS | ATTENTION,
    "one layer of the attention": EXPERTS | {"a": BankConfig("lora", ("layers.1.*.v_proj",), r=2, alpha=3.0)},
    "rslora": {
        "e": BankConfig("expert-lora", r=3, alpha=2.0, scaling="sqrt_r"),
        "a": BankConfig("rslora", r=5, alpha=2.0),
    },
    "rslora beside lora": EXPERTS | {"a": BankConfig("rslora", r=4, alpha=2.0)},
    "one layer of the experts": {"e": BankConfig("expert-lora", ("layers.1.*",), r=3, alpha=4.0)},
    "shared": {"e": BankConfig("expert-lora-shared", r=3, alpha=4.0)},
    "shared outer": {"e": BankConfig("expert-lora-shared-outer", r=3, alpha=4.0)},
}
PER_EXPERT = [name for name in CASES if "only" not in name and name != "attention"]


def loaded(folder, base):
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return PeftModel.from_pretrained(model, folder).eval()


def logits(model):
    with torch.no_grad():
        return model.eval()(TOKENS).logits


@pytest.mark.parametrize("name", CASES)
def test_native_to_peft_to_logits_differs_by_nothing(adapted, tiny_moe, base_folder, plain_logits, tmp_path, name):
    """0.0 in fp32 against LoRA written down plainly on the same transformers modules, from the native tensors.

    Our own training modules factor and sort what PEFT folds, so their logits differ by fp32 rounding: the second bar.
    """
    banks = CASES[name]
    ours = adapted(tiny_moe(), banks)
    tensors = collect_adapter(ours)
    save_adapter(tmp_path / "adapter", tensors, banks, fingerprint(base_folder), base_model=str(base_folder))
    want, base = plain_logits(tiny_moe(), tensors, banks, TOKENS), logits(tiny_moe())
    assert (want - base).norm() / base.norm() > 0.1
    layouts = [tmp_path / "adapter"]
    if name in PER_EXPERT:
        write_peft(tensors, banks, tmp_path / "apart", BaseFacts.read(base_folder), per_expert=True)
        layouts.append(tmp_path / "apart")
    for folder in layouts:
        got = logits(loaded(folder, base_folder))
        assert float((got - want).abs().max()) == 0.0, folder.name
    assert (logits(ours) - want).norm() / want.norm() < 1e-5
    assert load_adapter(tmp_path / "adapter").base == BaseFacts(str(base_folder), "qwen3_moe", 8)


@pytest.mark.parametrize("name", [n for n in CASES if not n.startswith("shared")])
def test_native_to_peft_to_native_gives_equal_bytes_and_logits(adapted, tiny_moe, base_folder, tmp_path, name):
    banks = CASES[name]
    tensors, facts = collect_adapter(adapted(tiny_moe(), banks)), BaseFacts.read(base_folder)
    for per_expert in [False, True] if name in PER_EXPERT else [False]:
        there, back = tmp_path / f"peft-{per_expert}", tmp_path / f"native-{per_expert}"
        write_peft(tensors, banks, there, facts, per_expert=per_expert)
        import_adapter(there, back, base_folder)
        found = load_adapter(back)
        assert found.tensors.keys() == tensors.keys()
        assert all(torch.equal(found.tensors[path], tensor) for path, tensor in tensors.items())
        again, before = tiny_moe().eval(), tiny_moe().eval()
        apply_adapter(again, found, base_fingerprint=fingerprint(base_folder))
        apply_adapter(before, Adapter(tensors, banks, ""))
        assert torch.equal(logits(again), logits(before))


@pytest.mark.parametrize(
    "bank",
    [BankConfig("moslora", r=3, alpha=4.0), BankConfig("lora", r=2, alpha=3.0, num_experts=3, combine="sum")],
    ids=["a mixer", "a sum of several"],
)
def test_what_is_lora_by_arithmetic_only_is_the_same_to_rounding(adapted, tiny_moe, base_folder, tmp_path, bank):
    ours = adapted(tiny_moe(), {"a": bank})
    save_adapter(tmp_path / "a", collect_adapter(ours), {"a": bank}, "", base_model=str(base_folder))
    got, want, base = logits(loaded(tmp_path / "a", base_folder)), logits(ours), logits(tiny_moe())
    assert (want - base).norm() / base.norm() > 0.05
    assert (got - want).norm() / want.norm() < 2e-6


def test_bf16_factors_and_base_give_the_same_bits_as_well(adapted, tiny_moe, plain_logits, tmp_path):
    banks = EXPERTS | ATTENTION
    tiny_moe(torch.bfloat16).save_pretrained(tmp_path / "base")
    tensors = {path: tensor.bfloat16() for path, tensor in collect_adapter(adapted(tiny_moe(), banks)).items()}
    save_adapter(tmp_path / "a", tensors, banks, "", base_model=str(tmp_path / "base"))
    # In fp32, where factors and weights are what bf16 left of them.
    wide = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    want = plain_logits(wide, {path: tensor.float() for path, tensor in tensors.items()}, banks, TOKENS)
    assert torch.equal(logits(loaded(tmp_path / "a", tmp_path / "base")), want)


def mixtral():
    return MixtralConfig(
        hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        num_local_experts=4, num_experts_per_tok=2, vocab_size=64, initializer_range=0.2, head_dim=8,
    )  # fmt: skip


def qwen2_moe():
    return Qwen2MoeConfig(
        hidden_size=32, moe_intermediate_size=16, intermediate_size=24, shared_expert_intermediate_size=24,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2,
        vocab_size=64, initializer_range=0.2,
    )  # fmt: skip


def deepseek():
    return DeepseekV3Config(
        hidden_size=32, moe_intermediate_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2, kv_lora_rank=8,
        q_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, first_k_dense_replace=1, n_group=2,
        topk_group=1, vocab_size=64, initializer_range=0.2,
    )  # fmt: skip


def llama():
    return LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, initializer_range=0.2,
    )  # fmt: skip


BESIDE = BankConfig("lora", ("shared_experts.down_proj", "layers.0.mlp.gate_proj", "kv_b_proj"), r=2, alpha=3.0)
SHARED_EXPERT = BankConfig("lora", ("shared_expert.up_proj", "shared_expert.down_proj"), r=2, alpha=3.0)


@pytest.mark.parametrize(
    ("config", "banks", "per_expert"),
    [
        (mixtral(), EXPERTS | ATTENTION, [False, True]),
        (qwen2_moe(), EXPERTS | {"s": SHARED_EXPERT}, [False, True]),
        (qwen2_moe(), {"s": SHARED_EXPERT}, [False]),
        (deepseek(), EXPERTS | {"b": BESIDE}, [False, True]),
        (llama(), {"f": BankConfig("lora", ("gate_proj", "down_proj"), r=2, alpha=3.0)}, [False]),
    ],
    ids=["mixtral", "qwen2_moe", "a shared expert alone", "deepseek_v3", "llama"],
)
def test_other_families_differ_by_nothing_too(adapted, plain_logits, tmp_path, config, banks, per_expert):
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")

    def fresh():
        return AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)

    tensors = collect_adapter(adapted(fresh(), banks))
    want = plain_logits(fresh(), tensors, banks, TOKENS)
    assert (want - logits(fresh())).norm() / want.norm() > 0.05
    for apart in per_expert:
        write_peft(tensors, banks, tmp_path / f"{apart}", BaseFacts.read(tmp_path / "base"), per_expert=apart)
        got = logits(loaded(tmp_path / f"{apart}", tmp_path / "base"))
        assert float((got - want).abs().max()) == 0.0
        import_adapter(tmp_path / f"{apart}", tmp_path / f"back-{apart}", tmp_path / "base")
        found = load_adapter(tmp_path / f"back-{apart}").tensors
        assert {path: tensor.tolist() for path, tensor in found.items()} == {p: t.tolist() for p, t in tensors.items()}


def test_tensor_names_and_shapes_are_those_of_a_live_peft_model(adapted, tiny_moe):
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    theirs = get_peft_model_state_dict(get_peft_model(tiny_moe(), config))
    banks = EXPERTS | {"a": BankConfig("lora", ("q_proj",), r=4)}
    ours, _ = peft_files(collect_adapter(adapted(tiny_moe(), banks)), banks, BaseFacts())
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


def test_the_configuration_tells_a_reader_what_it_needs(adapted, tiny_moe):
    banks = {"a": BankConfig("lora", ("q_proj",), r=4, alpha=8.0, dropout=0.1)}
    _, config = peft_files(collect_adapter(adapted(tiny_moe(), banks)), banks, BaseFacts("some/model"))
    assert (config["r"], config["lora_alpha"], config["lora_dropout"], config["use_rslora"]) == (4, 8, 0.1, False)
    assert config["base_model_name_or_path"] == "some/model"
    assert config["target_modules"] == [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
    assert tuple(int(part) for part in config["peft_version"].split(".")[:2]) >= (0, 19)


def test_peft_refuses_a_routed_adapter_even_beside_expert_tensors(adapted, tiny_moe, tmp_path):
    folder = tmp_path / "adapter"
    save_adapter(folder, collect_adapter(adapted(tiny_moe(), ROUTED)), ROUTED, "base")
    assert not (folder / "adapter_model.safetensors").exists()
    assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "MOE_BANK"
    with pytest.raises(KeyError, match="MOE_BANK"):
        PeftModel.from_pretrained(tiny_moe(), folder)
    shutil.copy(folder / "bank.safetensors", folder / "adapter_model.safetensors")
    with pytest.raises(KeyError, match="MOE_BANK"):
        PeftModel.from_pretrained(tiny_moe(), folder)


def test_shared_factors_without_the_number_of_experts_stay_closed(adapted, tiny_moe, base_folder, tmp_path):
    banks = CASES["shared"]
    tensors = collect_adapter(adapted(tiny_moe(), banks))
    save_adapter(tmp_path / "a", tensors, banks, "base")
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["peft_type"] == "MOE_BANK"
    with pytest.raises(AdapterError, match="name the base model's folder with --base"):
        write_peft(tensors, banks, tmp_path / "out", BaseFacts())
    write_peft(tensors, banks, tmp_path / "out", BaseFacts.read(base_folder))


def test_what_cannot_be_written_is_refused_before_anything_is(adapted, tiny_moe, base_folder, tmp_path):
    facts = BaseFacts.read(base_folder)
    cases = [
        (ROUTED, facts, False, r"adapter\.a \(mola\) weighs its experts by a router for each token"),
        (CASES["down only"], facts, True, "adapts only down_proj of model.layers.0.mlp.experts"),
        (EXPERTS, BaseFacts(), True, "depends on the model's family"),
        (EXPERTS, BaseFacts("x", "gpt_oss", 8), True, "gpt_oss is not one with such names"),
    ]
    for banks, base, per_expert, message in cases:
        with pytest.raises(AdapterError, match=message):
            write_peft(
                collect_adapter(adapted(tiny_moe(), banks)), banks, tmp_path / "out", base, per_expert=per_expert
            )
        assert list(tmp_path.iterdir()) == []


sizes = st.integers(1, 5)


@settings(max_examples=30, deadline=None)
@given(experts=sizes, rank=sizes, inputs=sizes, outputs=sizes, slowest=st.booleans())
def test_packing_puts_every_element_where_peft_reads_it(experts, rank, inputs, outputs, slowest):
    a_ERM = torch.arange(experts * rank * inputs).view(experts, rank, inputs)
    b_EOR = torch.arange(experts * outputs * rank).view(experts, outputs, rank)
    a_XM, b_OX = pack_a(a_ERM), pack_b(b_EOR)
    for e in range(experts):
        for r in range(rank):
            assert torch.equal(a_XM[e * rank + r], a_ERM[e, r])
            assert torch.equal(b_OX[:, r * experts + e], b_EOR[e, :, r])
    assert torch.equal(unpack_a(a_XM, experts), a_ERM)
    assert torch.equal(unpack_b(b_OX, experts), b_EOR)
    columns = torch.cat(list(b_EOR), 1)  # (O, E*R), the expert slowest
    assert torch.equal(unpack_b(columns, experts, expert_slowest=True), b_EOR)
    if slowest and experts > 1 and rank > 1:
        assert not torch.equal(unpack_b(columns, experts), b_EOR)
