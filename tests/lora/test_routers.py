"""Routers of banks: combine rules at their edges, random draws, refusals, tasks, and precision."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora.config import BankConfig
from lora.errors import AdapterError
from lora.linear import RoutedLinear
from lora.presets import bank_at
from lora.routers import BankRouter, _nucleus
from moe.context import BatchContext, batch_context

PATH = "layers.0.q_proj.adapter.router"
IN = 6


def router(bank: BankConfig, dtype=torch.float32, **place) -> BankRouter:
    return BankRouter(PATH, IN, bank_at(bank, 0, 1), dtype=dtype, **place)


def linear(bank: BankConfig, dtype=torch.float32) -> RoutedLinear:
    return RoutedLinear(nn.Linear(IN, 5, dtype=dtype), bank_at(bank, 0, 1), "layers.0.q_proj")


@given(
    st.lists(st.floats(0.01, 1), min_size=1, max_size=6),
    st.floats(0.01, 1),
)
@settings(max_examples=60, deadline=None)
def test_a_nucleus_is_the_smallest_that_reaches_its_share(parts, share):
    p = torch.tensor(parts, dtype=torch.float64)
    p = p / p.sum()
    kept = _nucleus(p[None], share)[0]
    inside, outside = p[kept], p[~kept]
    assert inside.sum() >= share - 1e-9
    assert len(inside) == 1 or inside.sum() - inside.min() < share + 1e-9
    assert not len(outside) or inside.min() >= outside.max()


@pytest.mark.parametrize("combine", ["top_k", "top_p", "threshold", "switch", "soft"])
def test_one_expert_gets_everything(combine):
    decision = router(BankConfig("mola", num_experts=1, top_k=1, combine=combine))(torch.randn(7, IN))
    torch.testing.assert_close(decision.gate_TE, torch.ones(7, 1))


def test_all_experts_chosen_are_soft():
    x = torch.randn(7, IN)
    chosen, soft = (router(BankConfig("mola", num_experts=4, top_k=4, combine=c))(x) for c in ("top_k", "soft"))
    torch.testing.assert_close(chosen.gate_TE, soft.gate_TE)


def test_a_threshold_that_no_expert_reaches_leaves_the_frozen_layer():
    layer = linear(BankConfig("adamole", num_experts=4, max_threshold=10.0))
    with torch.no_grad():
        layer.adapter.B.normal_()
        layer.adapter.router.threshold_bias.fill_(5.0)
    x = torch.randn(7, IN, requires_grad=True)
    y = layer(x)
    assert torch.equal(y, nn.functional.linear(x, layer.weight, layer.bias))
    y.sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("combine", ["top_k", "top_p", "threshold", "switch", "soft"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_routing_is_fp32_and_the_same_in_any_dtype_of_the_model(combine, dtype):
    narrow = router(BankConfig("mola", num_experts=3, combine=combine, router_init=1.0), torch.bfloat16)
    wide = router(BankConfig("mola", num_experts=3, combine=combine, router_init=1.0), dtype)
    wide.load_state_dict(narrow.state_dict())
    x = torch.randn(64, IN).bfloat16()
    got, want = narrow(x), wide(x.to(dtype))
    assert got.gate_TE.dtype == got.logits_TE.dtype == torch.float32
    assert torch.equal(got.gate_TE, want.gate_TE)


def test_jitter_comes_from_the_default_generator_in_training_alone():
    module = router(BankConfig("mola", num_experts=4, jitter=0.3, combine="soft"))
    x = torch.randn(7, IN)
    torch.manual_seed(1)
    first = module(x).logits_TE
    torch.manual_seed(1)
    assert torch.equal(module(x).logits_TE, first)
    assert not torch.equal(module(x).logits_TE, first)
    torch.testing.assert_close(first, (x @ module.weight.T), atol=0.6, rtol=0.3)
    module.eval()
    assert torch.equal(module(x).logits_TE, x @ module.weight.T)


def test_jitter_is_finer_than_the_models_dtype():
    """bf16 knows three numbers from 0.99 to 1.01, so all experts' logits would be 1 of 3 values of a lone feature."""
    module = router(BankConfig("mola", num_experts=4, jitter=0.01, combine="soft", router_init=1.0), torch.bfloat16)
    one_TM = torch.eye(IN, dtype=torch.bfloat16)[:1].expand(256, -1)
    factor_T = (module(one_TM).logits_TE[:, 0] / module.weight[0, 0]).detach()
    assert len(factor_T.unique()) > 200
    assert float((factor_T - 1).abs().max()) <= 0.0101
    assert float((factor_T - 1).std()) == pytest.approx(0.01 / 3**0.5, rel=0.2)


def test_recomputed_layers_draw_the_same_jitter_and_dropout():
    bank = BankConfig("mola", num_experts=4, r=3, jitter=0.3, dropout=0.3, router_aux_loss_coef=1.0)
    gradients = []
    for again in (False, True):
        layer = linear(bank, torch.float64)
        with torch.no_grad():
            layer.adapter.B.normal_(generator=torch.Generator().manual_seed(0))
            layer.weight.fill_(0.5)
            layer.bias.fill_(0.5)
        x = torch.linspace(-1, 1, 7 * IN, dtype=torch.float64).view(7, IN).requires_grad_()
        torch.manual_seed(5)
        with batch_context(BatchContext()):
            y = checkpoint(layer, x, use_reentrant=False) if again else layer(x)
            y.sin().sum().backward()
        gradients.append([x.grad, *(p.grad for p in layer.parameters())])
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


def test_padding_takes_no_room_of_a_capacity():
    module = router(BankConfig("mola", num_experts=2, combine="switch", capacity=0.5))
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[9.0], [0.0]]).expand(2, IN))
    mask = torch.tensor([False, True, True, True, True, True, True, False])
    with batch_context(BatchContext(mask_T=mask)):
        gate = module(torch.ones(8, IN)).gate_TE
    assert (gate[:, 0] != 0).tolist() == [False, True, True, False, False, False, False, False]


TASKS = BankConfig("moelora-task", num_experts=4, r=8, num_tasks=3)


def test_tokens_of_a_task_are_weighed_alike_and_other_tasks_otherwise():
    module = router(TASKS)
    with batch_context(BatchContext(task_T=torch.tensor([2, 0, 2, 1]))):
        gate = module(torch.randn(4, IN)).gate_TE
    assert torch.equal(gate[0], gate[2])
    assert len({tuple(row) for row in gate.tolist()}) == 3


@pytest.mark.parametrize(
    ("context", "words"),
    [
        (BatchContext(), "routes by task, and the batch names none"),
        (BatchContext(task_T=torch.tensor([0, 3])), "num_tasks=3, and a token is of task 3"),
        (BatchContext(task_T=torch.tensor([0, -1])), "num_tasks=3"),
        (BatchContext(task_T=torch.tensor([0])), "1 tokens have a task, and 2 are routed"),
    ],
)
def test_missing_and_unknown_tasks_stop_the_run(context, words):
    with batch_context(context), pytest.raises(AdapterError, match=words):
        router(TASKS)(torch.randn(2, IN))


def test_padding_needs_no_task():
    with batch_context(BatchContext(task_T=torch.tensor([0, -1]), mask_T=torch.tensor([True, False]))):
        assert router(TASKS)(torch.randn(2, IN)).gate_TE.isfinite().all()
