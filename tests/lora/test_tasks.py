"""A task-routed bank as one plain LoRA for each task."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from transformers import AutoModelForCausalLM

from lora.base_facts import BaseFacts
from lora.config import BankConfig
from lora.deltas import Delta, summed
from lora.errors import AdapterError
from lora.format import collect_adapter
from lora.peft_import import import_adapter
from lora.tasks import write_tasks
from moe.context import BatchContext, batch_context

TOKENS = torch.arange(48).view(4, 12)
BANKS = {
    "t": BankConfig("moelora-task", ("q_proj", "v_proj"), r=8, alpha=6.0, num_experts=4, num_tasks=3),
    "e": BankConfig("expert-lora", r=2, alpha=3.0),
}


@pytest.mark.filterwarnings("ignore:.*rank_pattern", "ignore:.*alpha_pattern")
def test_each_task_s_lora_gives_its_logits(adapted, tiny_moe, base_folder, tmp_path):
    ours = adapted(tiny_moe(), BANKS)
    tensors = collect_adapter(ours)
    assert write_tasks(tensors, BANKS, tmp_path / "out", BaseFacts.read(base_folder)) == 3
    seen = []
    for task in range(3):
        with torch.no_grad(), batch_context(BatchContext(balance=False, task_T=torch.full((48,), task))):
            want = ours(TOKENS).logits
        model = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
        with torch.no_grad():
            got = PeftModel.from_pretrained(model, tmp_path / "out" / f"task-{task}").eval()(TOKENS).logits
        assert (got - want).norm() / want.norm() < 1e-5
        seen.append(got)
    assert (seen[0] - seen[1]).norm() / seen[0].norm() > 1e-2
    banks = import_adapter(tmp_path / "out" / "task-1", tmp_path / "native", base_folder)
    assert {bank.r for bank in banks.values()} == {2, 8}  # E experts of rank r / E each


sizes = st.integers(1, 4)


@settings(max_examples=30, deadline=None)
@given(experts=sizes, rank=sizes, inputs=sizes, outputs=sizes, by_root=st.booleans(), gated=st.booleans())
def test_one_update_of_all_experts_is_their_sum(experts, rank, inputs, outputs, by_root, gated):
    generator = torch.Generator().manual_seed(experts + 7 * rank)
    a, b = (
        torch.randn(experts, rank, inputs, generator=generator),
        torch.randn(experts, outputs, rank, generator=generator),
    )
    gates = torch.rand(experts, generator=generator) if gated else torch.ones(experts)
    scale = 3.0 / (rank**0.5 if by_root else rank)
    one = summed(Delta("a", "linear", "x", "weight", a, b, scale, 3.0, by_root), gates if gated else None)
    assert (one.experts, one.r) == (1, experts * rank)
    assert one.alpha / (one.r**0.5 if by_root else one.r) == pytest.approx(scale)
    want = scale * torch.einsum("e,eor,eri->oi", gates, b, a)
    torch.testing.assert_close(one.of(0), want, rtol=1e-4, atol=1e-5)


def test_other_adapters_are_refused(adapted, tiny_moe, tmp_path):
    cases = [
        ({"e": BANKS["e"]}, "no bank is routed by task; peft, peft-per-expert, merged can be had"),
        (BANKS | {"m": BankConfig("mola", ("o_proj",))}, r"adapter\.m \(mola\) weighs its experts by a router"),
    ]
    for banks, message in cases:
        with pytest.raises(AdapterError, match=message):
            write_tasks({}, banks, tmp_path / "out", BaseFacts())
    tensors = collect_adapter(adapted(tiny_moe(), {"t": BANKS["t"]}))
    del tensors["model.layers.1.self_attn.v_proj.adapter.router.task_embedding"]
    with pytest.raises(AdapterError, match=r"lacks the tensor .*v_proj\.adapter\.router\.task_embedding"):
        write_tasks(tensors, {"t": BANKS["t"]}, tmp_path / "out", BaseFacts())
    assert os.listdir(tmp_path) == []
