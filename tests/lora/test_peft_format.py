"""What PEFT itself computes from our folders: the same function, or nothing at all."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict

from lora.attach import attach
from lora.config import BankConfig
from lora.errors import AdapterError
from lora.format import collect_adapter, load_adapter, save_adapter
from lora.peft_format import BaseFacts, peft_files, write_peft
from lora.presets import expand
from moe.convert import convert

TOKENS = torch.arange(48).view(4, 12)
BOTH = {"e": BankConfig("expert-lora", r=4, alpha=8.0)}
MIXED = BOTH | {"a": BankConfig("mola", r=2)}


def with_adapter(tiny_moe, banks):
    model = tiny_moe()
    attach(model, banks, convert(model))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if ".adapter." in path:
                parameter.normal_(0, 0.2, generator=generator)
    return model.eval()


@pytest.mark.parametrize(
    "banks",
    [
        BOTH,
        {"down": BankConfig("expert-lora", ("down_proj",), r=3, alpha=6.0)},
        {"up": BankConfig("expert-lora", ("gate_up_proj",), r=3, alpha=1.5)},
        {
            "up": BankConfig("expert-lora", ("gate_up_proj",), r=3, alpha=6.0),
            "down": BankConfig("expert-lora", ("down_proj",), r=5, alpha=2.5),
        },
    ],
    ids=["both", "down only", "gate_up only", "a rank for each"],
)
@pytest.mark.filterwarnings("ignore:.*rank_pattern", "ignore:.*alpha_pattern")
def test_peft_loads_the_folder_and_gives_the_same_logits(tiny_moe, tmp_path, banks):
    ours = with_adapter(tiny_moe, banks)
    save_adapter(tmp_path / "adapter", collect_adapter(ours), banks, "base")
    theirs = PeftModel.from_pretrained(tiny_moe(), tmp_path / "adapter").eval()
    with torch.no_grad():
        base, want, got = tiny_moe().eval()(TOKENS).logits, ours(TOKENS).logits, theirs(TOKENS).logits
        merged = theirs.merge_and_unload()(TOKENS).logits
    assert (want - base).norm() / base.norm() > 0.1
    for logits in (got, merged):
        assert (logits - want).norm() / want.norm() < 1e-5
    assert load_adapter(tmp_path / "adapter").banks == {name: expand(bank) for name, bank in banks.items()}


def test_tensor_names_and_shapes_are_those_of_a_live_peft_model(tiny_moe):
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=[],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    theirs = get_peft_model_state_dict(get_peft_model(tiny_moe(), config))
    ours, _ = peft_files(collect_adapter(with_adapter(tiny_moe, BOTH)), BOTH, BaseFacts())
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


def test_peft_refuses_a_mixed_adapter_even_beside_expert_tensors(tiny_moe, tmp_path):
    folder = tmp_path / "adapter"
    save_adapter(folder, collect_adapter(with_adapter(tiny_moe, MIXED)), MIXED, "base")
    assert not (folder / "adapter_model.safetensors").exists()
    assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "MOE_BANK"
    with pytest.raises(KeyError, match="MOE_BANK"):
        PeftModel.from_pretrained(tiny_moe(), folder)
    shutil.copy(folder / "bank.safetensors", folder / "adapter_model.safetensors")
    with pytest.raises(KeyError, match="MOE_BANK"):
        PeftModel.from_pretrained(tiny_moe(), folder)


def test_only_expert_lora_exports(tiny_moe, tmp_path):
    with pytest.raises(AdapterError, match=r"adapter.a \(mola\) weighs its experts by a router for each token"):
        write_peft(collect_adapter(with_adapter(tiny_moe, MIXED)), MIXED, tmp_path / "out", BaseFacts())
    assert list(tmp_path.iterdir()) == []
