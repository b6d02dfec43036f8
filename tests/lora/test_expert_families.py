"""Expert banks on every family's layout: the merged weights' logits, and the composition's gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from lora.attach import attach
from lora.config import BankConfig
from lora.format import collect_adapter, save_adapter
from lora.methods import EXPERT_TENSORS
from moe.convert import convert
from tests.moe.tiny_families import FAMILIES, tiny

TOKENS = torch.arange(24).view(2, 12)
PRESETS = ("expert-lora", "expert-lora-shared", "expert-lora-shared-outer")


def adapted(model: nn.Module, preset: str) -> list[nn.Module]:
    """Gives the model a bank whose every factor is set; returns its experts."""
    blocks = convert(model)
    attach(model, {"e": BankConfig(preset, r=3, alpha=6.0)}, blocks)
    generator = torch.Generator().manual_seed(5)
    for path, parameter in model.named_parameters():
        if ".adapter." in path:
            parameter.data.normal_(0, 0.2, generator=generator)
    return [block.module.experts for block in blocks]


def merged(experts: nn.Module) -> dict[str, Tensor]:
    """``W + s B A`` in the family's layout."""
    found = {}
    for name in EXPERT_TENSORS:
        factors, weight = getattr(experts.adapter, name), getattr(experts, name)
        update = factors.scale * factors.B @ factors.A
        found[name] = weight + (update.transpose(1, 2) if experts.form.transposed else update)
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("preset", PRESETS)
def test_every_family_computes_as_with_merged_weights_and_trains_as_in_pieces(family, preset):
    plain = tiny(family)
    model = copy.deepcopy(plain)
    all_experts = adapted(model, preset)
    assert {experts.backend.name for experts in all_experts} == {"minimal"}
    grads = []
    for backend in ("auto", "grouped_mm"):
        for experts in all_experts:
            experts.wanted_backend = backend
        model.zero_grad()
        out = model(TOKENS, labels=TOKENS)
        out.loss.backward()
        grads.append({path: p.grad.clone() for path, p in model.named_parameters() if p.requires_grad})
    for path, want in grads[1].items():
        assert want.abs().sum() > 0, path
        torch.testing.assert_close(grads[0][path], want, rtol=1e-4, atol=1e-6, msg=lambda m, path=path: f"{path}: {m}")
    base = plain(TOKENS).logits
    with torch.no_grad():
        twins = convert(plain)
        for experts, block in zip(all_experts, twins, strict=True):
            for name, weight in merged(experts).items():
                getattr(block.module.experts, name).copy_(weight)
        want = plain(TOKENS).logits
    assert (want - base).norm() > 0.01 * base.norm()
    torch.testing.assert_close(out.logits, want, rtol=1e-4, atol=1e-4)


def test_peft_computes_the_same_on_transposed_and_interleaved_experts(tmp_path):
    model = tiny("gpt_oss")
    adapted(model, "expert-lora")
    save_adapter(tmp_path / "adapter", collect_adapter(model), {"e": BankConfig("expert-lora", r=3, alpha=6.0)}, "base")
    theirs = PeftModel.from_pretrained(tiny("gpt_oss"), tmp_path / "adapter").eval()
    with torch.no_grad():
        want, got = model.eval()(TOKENS).logits, theirs(TOKENS).logits
    assert (got - want).norm() < 1e-5 * want.norm()
