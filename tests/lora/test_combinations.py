"""What the rules allow can be attached and trains; what they refuse would fail or mean something else."""

from __future__ import annotations

from itertools import product
from typing import get_args

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lora.attach import attach
from lora.combinations import faults, idle
from lora.config import Balance, BankConfig, Combine, Kind, Scope, Share, Site
from lora.presets import expand
from lora.watch import AdapterWatch
from moe.context import BatchContext, batch_context
from moe.convert import convert

PARTS = ("kind", "router", "combine", "share", "mixer", "balance")
VALUES = (*map(get_args, (Kind, Scope, Combine, Share)), (False, True), get_args(Balance))
TARGETS = {"linear": ("q_proj", "o_proj"), "experts": ("gate_up_proj", "down_proj"), "ffn": ("mlp",)}
IDS = torch.arange(128).view(4, 32) * 11 % 64


def allowed(site: str) -> list[BankConfig]:
    found = []
    for values in product(*VALUES):
        given = dict(zip(PARTS, values, strict=True))
        more = {"router_aux_loss_coef": 0.01} if given["balance"] != "none" else {}
        more |= {"num_tasks": 2} if given["router"] == "task" else {}
        own = given["router"] in ("token", "task") or given["combine"] == "sum"
        more |= {"num_experts": 4} if own else {}
        bank = BankConfig("lora", TARGETS.get(site, ("mlp",)), site=site, **given, **more)
        full = expand(bank)
        if not list(faults(full)) and not list(idle(full, more)):
            found.append(bank)
    return found


def base(site: str, tiny_moe):
    if site != "ffn":
        model = tiny_moe()
        return model, convert(model)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2, vocab_size=64)).train(), []


@pytest.mark.parametrize("site", get_args(Site))
def test_every_allowed_combination_attaches_and_every_adapter_trains(site, tiny_moe):
    banks = allowed(site)
    assert len(banks) >= 3
    tasks = torch.arange(4).repeat_interleave(32) % 2
    for bank in banks:
        model, blocks = base(site, tiny_moe)
        attach(model, {"one": bank}, blocks)
        watch = AdapterWatch(model)
        with batch_context(BatchContext(shape=(4, 32), task_T=tasks)):
            loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
            loss.backward()
        assert torch.isfinite(loss), bank
        watch.check()
        missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert not missing, (bank, missing)
