"""Each tensor of an adapter belongs to the bank that made it, whatever the order and the wildcards of the banks."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, DeepseekV3Config

from lora.attach import attach, places_of
from lora.base_facts import BaseFacts
from lora.config import BankConfig
from lora.errors import AdapterError
from lora.format import apply_adapter, collect_adapter, load_adapter, save_adapter
from lora.owners import owners_of
from lora.peft_format import write_peft
from moe.convert import convert
from moe.fingerprint import fingerprint

TOKENS = torch.arange(24).view(2, 12)
# Two ranks and alphas: a factor that is taken for another bank's gets a wrong scale.
ALL, EXPERTS = BankConfig("lora", ("layers.*",), r=2, alpha=3.0), BankConfig("expert-lora", r=4, alpha=10.0)
BESIDE = BankConfig("perft-r", num_experts=4, top_k=2, r=3)
ORDERS = [{"all": ALL, "e": EXPERTS}, {"e": EXPERTS, "all": ALL}]


def deepseek():
    """One dense layer, two of experts."""
    config = DeepseekV3Config(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, first_k_dense_replace=1, num_attention_heads=4,
        num_key_value_heads=4, kv_lora_rank=16, q_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8,
        moe_intermediate_size=24, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, vocab_size=64,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


def with_places(model, banks):
    """The model with its banks, trained, as seen from outside, and where banks could have gone."""
    blocks = convert(model)
    places = places_of(model, blocks)
    report = attach(model, banks, blocks)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if ".adapter." in path:
                parameter.normal_(0, 0.2, generator=generator)
    return model.eval(), places, report


def logits(model):
    with torch.no_grad():
        return model.eval()(TOKENS).logits


@pytest.mark.parametrize("banks", ORDERS, ids=["wildcard first", "experts first"])
def test_experts_beside_a_wildcard_keep_their_bank_on_the_way_to_peft(
    tiny_moe, base_folder, plain_logits, tmp_path, banks
):
    ours, places, _ = with_places(tiny_moe(), banks)
    tensors, mark = collect_adapter(ours), fingerprint(base_folder)
    save_adapter(tmp_path / "a", tensors, banks, mark, base_model=str(base_folder), places=places)
    adapter = load_adapter(tmp_path / "a")
    assert {path: owner for path, owner in adapter.owners.items() if ".experts." in path} == {
        path: "e" for path in tensors if ".experts." in path
    }
    facts = BaseFacts.read(base_folder)
    write_peft(adapter.tensors, adapter.banks, tmp_path / "peft", facts, owners=adapter.owners)
    want = plain_logits(tiny_moe(), tensors, banks, TOKENS)
    for folder in ("a", "peft"):
        model = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
        assert float((logits(PeftModel.from_pretrained(model, tmp_path / folder)) - want).abs().max()) == 0.0
    again = tiny_moe()
    apply_adapter(again, adapter)
    assert torch.equal(logits(again), logits(ours))
    assert (logits(ours) - want).norm() / want.norm() < 1e-5


@pytest.mark.parametrize(
    "banks",
    [
        *ORDERS,
        {"all": ALL, "p": BESIDE},
        {"p": BESIDE, "all": ALL},
        {"m": BankConfig("mixlora", ("mlp",), num_experts=3, r=2), "p": BESIDE, "e": EXPERTS},
        {"p": BESIDE, "m": BankConfig("mixlora", ("mlp",), num_experts=3, r=2)},
    ],
    ids=lambda banks: "-".join(banks),
)
def test_owners_are_those_that_were_attached(tmp_path, banks):
    model, places, report = with_places(deepseek(), banks)
    tensors = collect_adapter(model)
    matched = {match.path: match.bank for match in report.matches}
    experts = {match.bank for match in report.matches if match.site == "experts"}
    want = {}
    for path in tensors:
        place = path.rpartition(".adapter.")[0]
        want[path] = next(iter(experts)) if place.endswith(".experts") else matched[place]
    assert owners_of(tensors, banks, places) == want
    save_adapter(tmp_path / "a", tensors, banks, "", places=places)
    assert load_adapter(tmp_path / "a").owners == want


def test_without_the_places_a_mixlora_and_a_bank_beside_are_told_apart():
    banks = {"p": BESIDE, "m": BankConfig("mixlora", ("mlp",), num_experts=3, r=2)}
    model, places, _ = with_places(deepseek(), banks)
    tensors = collect_adapter(model)
    assert owners_of(tensors, banks) == owners_of(tensors, banks, places)


def test_what_only_the_places_tell_is_not_guessed():
    banks = {"all": ALL, "p": BESIDE}
    path = "model.layers.1.mlp.adapter.A"
    with pytest.raises(AdapterError, match=r"layers\.1\.mlp\.adapter\.A could belong to adapter\.all or adapter\.p"):
        owners_of([path], banks)


def test_patterns_choose_layers_for_all_sites():
    banks = {
        "low": BankConfig("expert-lora", ("layers.[01].*.down_proj",)),
        "up": BankConfig("expert-lora", ("gate_up_proj",)),
        "q": BankConfig("lora", ("layers.3.*.q_proj", "down_proj")),
    }
    place = "model.layers.{}.mlp.experts.adapter.{}.A"
    linear = "model.layers.{}.{}.adapter.A"
    want = {
        place.format(1, "down_proj"): "low",
        place.format(2, "gate_up_proj"): "up",
        linear.format(3, "self_attn.q_proj"): "q",
        linear.format(0, "mlp.shared_expert.down_proj"): "q",
    }
    assert owners_of(want, banks) == want
    for path in (place.format(2, "down_proj"), linear.format(2, "self_attn.q_proj"), "model.norm.weight"):
        with pytest.raises(AdapterError, match="belongs to none of the banks low, up, q"):
            owners_of([path], banks)
