"""The experts on a GPU in bf16: as exact as transformers, the same bits twice, nothing read back, a smaller peak."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from moe.assignment import assign
from moe.kernels.probe import has_triton
from tests.moe.layers import Case, reference, run

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

CASE = Case(tokens=96, top_k=3, hidden=64, inner=48, num_experts=6, dtype=torch.bfloat16, device="cuda")
CASES = {
    "plain": CASE,
    "empty experts": dataclasses.replace(CASE, choices=[1, 2, 4]),
    "choices elsewhere": dataclasses.replace(CASE, choices=[0, 1, 3, 5, -1, -1, -1]),
}
needs_triton = pytest.mark.skipif(not has_triton(), reason="triton is not installed")
BACKENDS = ["grouped_mm", "minimal", pytest.param("triton", marks=needs_triton)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_it_is_near_the_reference_in_fp64_and_the_same_twice(name, backend):
    experts, x, weights, index = CASES[name].build(backend)
    inputs = (x, weights, *experts.parameters())
    out = run(experts, x, weights, index)
    got = out, *torch.autograd.grad(out.sum(), inputs)
    out = run(experts, x, weights, index)
    again = out, *torch.autograd.grad(out.sum(), inputs)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
    wide = experts.double(), x.detach().double().requires_grad_(), weights.detach().double().requires_grad_(), index
    exact = reference(*wide)
    want = exact, *torch.autograd.grad(exact.sum(), (*wide[1:3], *wide[0].parameters()), materialize_grads=True,
                                       allow_unused=True)  # fmt: skip
    for g, w in zip(got, want, strict=True):
        assert float((g.double() - w).detach().norm() / w.detach().norm()) < 2e-2


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_is_read_back(backend):
    experts, x, weights, index = CASE.build(backend)
    run(experts, x, weights, index).sum().backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        experts.mix(x, weights, assign(index, experts.num_local_experts)).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_biased_interleaved_experts_take_the_grouped_product():
    from tests.moe.layers import GPT_OSS

    case = dataclasses.replace(CASE, form=GPT_OSS, biased=True)
    experts, x, weights, index = case.build("minimal")
    assert "grouped_mm" in experts.backend.reason
    out = run(experts, x, weights, index)
    torch.autograd.grad(out.sum(), (x, weights, *experts.parameters()))
    exact = reference(experts.double(), x.double(), weights.double(), index)
    assert float((out.double() - exact).detach().norm() / exact.detach().norm()) < 2e-2
