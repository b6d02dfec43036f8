"""Adapted experts that are spread over ranks, recomputed, or beside ones of other ranks' choices: the same numbers."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from lora import expert_grouped, expert_mix
from lora.experts import ExpertSlice
from moe.assignment import assign
from moe.kernels.stack import Stack
from tests.lora.test_expert_mix import EXPERTS, GPT_OSS, PRESETS, Case, assert_equal, built, fast, problem


@pytest.mark.parametrize("grouped", [False, True], ids=["loops", "grouped"])
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("routing", ["even", "skewed"])
def test_slices_add_up_to_the_whole_where_choices_are_of_other_ranks(monkeypatch, grouped, preset, routing):
    """Three ranks' experts over the same rows: outputs and gradients of x, scores and shared factors add up, those of
    an expert's own factors are the rank's alone. In the skewed routing one rank has no pair at all."""
    dtype = torch.float32 if grouped else torch.float64
    if grouped:
        monkeypatch.setattr(expert_mix, "_how", lambda stack: expert_grouped)
    case = Case(preset=preset, form=GPT_OSS, routing=routing, dtype=dtype)
    whole = fast(built(case), case)
    total = {name: torch.zeros_like(value) for name, value in whole.items()}
    local = EXPERTS // 3
    for first in range(0, EXPERTS, local):
        for name, value in _slice(case, first, local).items():
            shared = value.shape == whole[name].shape
            (total[name] if shared else total[name][first : first + local]).add_(value)
    assert_equal(total, {name: value.double() for name, value in whole.items()}, 2e-5 if grouped else 1e-12)


def _slice(case: Case, first: int, local: int) -> dict[str, torch.Tensor]:
    experts, mine = built(case), slice(first, first + local)
    adapter = experts.adapter
    adapter.slice = ExpertSlice(0, EXPERTS, first, local, EXPERTS // local)
    for parameter in adapter.parameters():
        if parameter.shape[0] > 1:
            parameter.data = parameter.data[mine].clone()
    stack = Stack(
        experts.gate_up_proj[mine], experts.down_proj[mine], *(bias[mine] for bias in experts.biases), case.form
    )
    x, index, weights, upstream = problem(case)
    x, weights, upstream = (t.to(case.dtype) for t in (x, weights, upstream))
    x.requires_grad_()
    weights.requires_grad_()
    here = (index >= first) & (index < first + local)
    assignment = assign(torch.where(here, index - first, local), local, int(here.sum()))
    out = adapter.mix(x, weights, stack, assignment)
    out.backward(upstream)
    found = {"out": out.detach(), "x": x.grad, "weights": weights.grad}
    return found | {name: parameter.grad for name, parameter in adapter.named_parameters()}


def test_a_recomputed_layer_drops_the_same():
    case = Case(dropout=0.4, routing="skewed")
    experts = built(case)
    torch.manual_seed(3)
    want = fast(experts, case)
    x, index, weights, upstream = problem(case)
    x.requires_grad_()
    experts.zero_grad()
    torch.manual_seed(3)
    out = checkpoint(experts, x, index, weights, use_reentrant=False)
    torch.manual_seed(4)  # the recompute must not read the stream as it is by then
    out.backward(upstream)
    assert torch.equal(out, want["out"])
    assert torch.equal(x.grad, want["x"])
    for name, parameter in experts.adapter.named_parameters():
        assert torch.equal(parameter.grad, want[name]), name


def test_no_gradient_of_x_is_made_where_none_is_wanted():
    case = Case()
    experts = built(case)
    want = fast(experts, case)
    x, index, weights, upstream = problem(case)
    experts.zero_grad()
    experts(x, index, weights).backward(upstream)
    assert x.grad is None
    for name, parameter in experts.adapter.named_parameters():
        torch.testing.assert_close(parameter.grad, want[name])
