"""Routed linear banks against one token and one expert at a time in fp64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from lora.config import BankConfig
from lora.linear import RoutedLinear
from lora.presets import bank_at, expand
from moe.context import BatchContext, batch_context

BANK = BankConfig("mola", r=3, alpha=6.0, num_experts=5, top_k=2)


def make(bank: BankConfig = BANK, dtype=torch.float64, bias: bool = True) -> RoutedLinear:
    torch.manual_seed(0)
    return RoutedLinear(nn.Linear(6, 9, bias=bias, dtype=dtype), bank_at(bank, 0, 1), "layers.0.q_proj")


def randomize(module: nn.Module) -> None:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.5, generator=generator)


def naive(x: Tensor, linear: RoutedLinear, bank: BankConfig) -> tuple[Tensor, Tensor]:
    """Outputs, and the balance loss, of MoLA: softmax over all experts, the best K renormalised."""
    adapter, rows, chosen, probabilities, bank = linear.adapter, [], [], [], expand(bank)
    for token in x:
        p = (adapter.router.weight @ token).exp()
        p = p / p.sum()
        best = sorted(range(bank.num_experts), key=lambda e: -p[e].item())[: bank.top_k]
        y = linear.weight @ token + (0 if linear.bias is None else linear.bias)
        for e in best:
            g = p[e] / sum(p[i] for i in best)
            y = y + bank.alpha / bank.r * g * (adapter.B[e] @ (adapter.A[e] @ token))
        rows.append(y)
        chosen += best
        probabilities.append(p)
    mean = torch.stack(probabilities).mean(0)
    loss = bank.num_experts * sum(chosen.count(e) / len(chosen) * mean[e] for e in range(bank.num_experts))
    return torch.stack(rows), loss


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("coefficient", [0.0, 0.3])
@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_outputs_and_all_gradients_match_over_three_steps(bias, coefficient, top_k):
    bank = BankConfig("mola", r=3, alpha=6.0, num_experts=5, top_k=top_k, router_aux_loss_coef=coefficient)
    fast, slow = make(bank, bias=bias), make(bank, bias=bias)
    randomize(fast)
    slow.load_state_dict(fast.state_dict())
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05) for m in (fast, slow)]
    for step in range(3):
        x = torch.randn(2, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        x_fast, x_slow = x.clone().requires_grad_(), x.clone().requires_grad_()
        with batch_context(BatchContext(aux_scale=0.5)):
            y_fast = fast(x_fast)
        y_slow, loss = naive(x_slow.view(-1, 6), slow, bank)
        torch.testing.assert_close(y_fast.view(-1, 9), y_slow, rtol=1e-12, atol=1e-13)
        for optimizer in optimizers:
            optimizer.zero_grad()
        y_fast.sin().sum().backward()
        (y_slow.sin().sum() + 0.5 * coefficient * loss).backward()
        torch.testing.assert_close(x_fast.grad, x_slow.grad, rtol=1e-10, atol=1e-12)
        for (name, p), q in zip(fast.named_parameters(), slow.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
        for optimizer in optimizers:
            optimizer.step()


def test_the_balance_loss_is_off_outside_training_batches():
    bank = BankConfig("mola", r=3, num_experts=5, router_aux_loss_coef=0.5)
    linear = make(bank)
    linear(torch.randn(4, 6, dtype=torch.float64)).sum().backward()
    assert linear.adapter.router.weight.grad.eq(0).all()  # B is zero: nothing else could move the router
    linear.zero_grad()
    with batch_context(BatchContext()):
        linear(torch.randn(4, 6, dtype=torch.float64)).sum().backward()
    assert linear.adapter.router.weight.grad.abs().max() > 0


def test_keeps_the_parameters_and_the_outputs_of_the_linear_it_takes_over():
    base = nn.Linear(6, 9)
    routed = RoutedLinear(base, bank_at(BANK, 0, 1), "layers.0.q_proj")
    assert routed.weight is base.weight
    assert routed.bias is base.bias
    x = torch.randn(3, 6)
    assert torch.equal(routed(x), base(x))
    assert set(routed.state_dict()) == {"weight", "bias", "adapter.A", "adapter.B", "adapter.router.weight"}
    assert routed.adapter.A.address.units()[0].unit == "layers.0.q_proj.adapter.A"


def test_start_values_depend_on_seed_and_path_only():
    first = make().adapter
    torch.manual_seed(99)
    again = make().adapter
    other = RoutedLinear(nn.Linear(6, 9, dtype=torch.float64), bank_at(BANK, 0, 1), "layers.1.q_proj").adapter
    reseeded = RoutedLinear(
        nn.Linear(6, 9, dtype=torch.float64), bank_at(BANK, 0, 1), "layers.0.q_proj", seed=1
    ).adapter
    for name in ("A", "router.weight"):
        values = [bank.get_parameter(name) for bank in (first, again, other, reseeded)]
        assert torch.equal(values[0], values[1])
        assert not torch.equal(values[0], values[2])
        assert not torch.equal(values[0], values[3])
        assert values[0].abs().max() <= 1 / math.sqrt(6)


def test_bf16_routes_in_fp32():
    linear = make(dtype=torch.bfloat16)
    randomize(linear)
    x = torch.randn(64, 6, dtype=torch.bfloat16)
    decision = linear.adapter.router(x)
    gate, logits = decision.gate_TE, decision.logits_TE
    assert gate.dtype == logits.dtype == torch.float32
    torch.testing.assert_close(logits, x.float() @ linear.adapter.router.weight.float().T)
    torch.testing.assert_close(gate.sum(-1), torch.ones(64))
    assert linear(x).dtype == torch.bfloat16
    assert linear(x[:0]).shape == (0, 9)
