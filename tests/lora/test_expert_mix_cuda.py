"""Adapted experts on a GPU in bf16: near the formula in fp64, the same bits twice, and nothing read back."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from lora import fold
from moe.assignment import assign
from moe.form import PLAIN
from tests.lora.test_expert_mix import GPT_OSS, PRESETS, Case, assert_equal, built, fast, problem, slow

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

CASE = Case(routing="skewed", dtype=torch.bfloat16)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("form", [PLAIN, GPT_OSS], ids=["plain", "gpt_oss"])
@pytest.mark.parametrize("way", ["split", "fold"])
@pytest.mark.parametrize("share", [0.0, 0.15, 1.0])
def test_it_is_near_the_formula_in_fp64_and_the_same_twice(monkeypatch, preset, form, way, share):
    monkeypatch.setattr(fold, "KEPT_SHARE", share)
    case = dataclasses.replace(CASE, preset=preset, form=form, way=way)
    want = slow(built(case), case)
    experts = built(case).cuda()
    got = fast(experts, case)
    assert_equal(got, want, 0.03)
    again = fast(experts, case)
    assert all(torch.equal(got[name], again[name]) for name in got)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("way", ["split", "fold"])
def test_nothing_is_read_back(dropout, way):
    case = dataclasses.replace(CASE, dropout=dropout, way=way)
    experts = built(case).cuda()
    fast(experts, case)
    x, index, weights, _ = (t.cuda() for t in problem(case))
    x, weights = x.to(case.dtype).requires_grad_(), weights.to(case.dtype).requires_grad_()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        experts.mix(x, weights, assign(index, experts.num_local_experts)).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_dropout_masks_are_drawn_again_in_the_backward():
    """The derivative along a direction is the difference quotient only if both passes drop the same."""
    case = dataclasses.replace(CASE, dropout=0.5, dtype=torch.float32)
    experts = built(case).cuda()
    b = experts.adapter.down_proj.B
    x, index, weights, _ = (t.cuda() for t in problem(case))
    x, weights = x.float(), weights.float()

    def loss() -> Tensor:
        torch.manual_seed(5)
        return experts(x, index, weights).double().sum()

    loss().backward()
    with torch.no_grad():
        before = loss()
        b.add_(0.1)  # the output is linear in it
        after = loss()
    assert float(after - before) == pytest.approx(0.1 * float(b.grad.double().sum()), rel=1e-3)
