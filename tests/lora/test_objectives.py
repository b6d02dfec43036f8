"""Losses of banks that span layers, samples or pairs of tokens; those of one layer are in test_linear_methods.py."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lora.config import BankConfig
from lora.errors import AdapterError
from lora.linear import RoutedLinear
from lora.objectives import _run_sums, contrastive_loss
from lora.presets import bank_at
from moe.context import BatchContext, batch_context
from tests.lora.reference_linear import info_nce

IN, OUT = 6, 6
MASK = torch.tensor([1, 1, 1, 1, 0, 1, 1, 0]).bool()


def stack(bank: BankConfig, layers: int = 3) -> nn.ModuleList:
    torch.manual_seed(0)
    made = nn.ModuleList(
        RoutedLinear(nn.Linear(IN, OUT, dtype=torch.float64), bank_at(bank, i, layers), f"layers.{i}.q_proj")
        for i in range(layers)
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(0, 0.5, generator=generator)
    return made


def run(layers: nn.ModuleList, x: Tensor, recompute: bool) -> Tensor:
    for layer in layers:
        x = checkpoint(layer, x, use_reentrant=False) if recompute else layer(x)
    return x


def pooled_loss(layers: nn.ModuleList, x: Tensor, mask: Tensor | None, top_k: int) -> Tensor:
    """MixLoRA's: the routers' decisions of all layers, one below the other, as if they were one layer's."""
    probabilities, chosen = [], []
    for layer in layers:
        for t, token in enumerate(x):
            if mask is None or mask[t]:
                p = (layer.adapter.router.weight @ token).softmax(0)
                probabilities.append(p)
                chosen += sorted(range(len(p)), key=lambda e: -p[e].item())[:top_k]
        x = layer(x)
    mean = torch.stack(probabilities).mean(0)
    return len(mean) * sum(chosen.count(e) / len(probabilities) * mean[e] for e in range(len(mean)))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "padded"])
def test_balance_over_all_layers_counts_each_once(recompute, mask):
    bank = BankConfig("mola", r=2, num_experts=4, balance_pooled=True, router_aux_loss_coef=0.7)
    fast, slow = stack(bank), stack(bank)
    for micro in range(2):
        x = torch.randn(8, IN, dtype=torch.float64, generator=torch.Generator().manual_seed(micro))
        with batch_context(BatchContext(aux_scale=0.5, mask_T=mask)):
            run(fast, x, recompute).sin().sum().backward()
        slow_y = run(slow, x, False)
        (slow_y.sin().sum() + 0.5 * 0.7 * pooled_loss(slow, x, mask, 2)).backward()
    for (name, p), q in zip(fast.named_parameters(), slow.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


def test_losses_are_off_outside_training_batches():
    bank = BankConfig("moelora", r=2, router_aux_loss_coef=0.7, z_loss_coef=0.7, contrastive_coef=0.7)
    x = torch.randn(8, IN, dtype=torch.float64)
    gradients = []
    for context in (BatchContext(balance=False), BatchContext(aux_scale=0.0), BatchContext()):
        [layer] = stack(bank, 1)
        with batch_context(context):
            layer(x).sum().backward()
        gradients.append([p.grad for p in layer.parameters()])
    assert all(map(torch.equal, gradients[0], gradients[1]))
    assert not any(torch.equal(p, q) for p, q in zip(gradients[0][2:], gradients[2][2:], strict=True))


@pytest.mark.parametrize(
    ("context", "words"),
    [
        (BatchContext(shape=(2, 4)), "needs the task of every sample"),
        (BatchContext(task_T=torch.zeros(8, dtype=torch.int64)), r"needs the batch's \(B, S\)"),
        (BatchContext(shape=(2, 4), mask_T=MASK[:4]), "mask is of 4 tokens, and a bank was given 8"),
    ],
)
def test_localized_balance_without_what_it_needs_stops_the_run(context, words):
    [layer] = stack(BankConfig("loramoe", router_aux_loss_coef=0.1), 1)
    with batch_context(context), pytest.raises(AdapterError, match=words):
        layer(torch.randn(8, IN, dtype=torch.float64))


@given(st.lists(st.integers(0, 3), min_size=12, max_size=12))
@settings(max_examples=40, deadline=None)
def test_sums_of_runs(steps):
    segments = torch.tensor([min(s, 1) for s in steps]).view(2, 6).cumsum(1)
    values = torch.arange(24, dtype=torch.float64).view(2, 6, 2) ** 1.5
    sums, ends = _run_sums(values, segments)
    got = sums[ends[:, 0]]
    want = [values[b][segments[b] == s].sum(0) for b in range(2) for s in segments[b].unique().tolist()]
    torch.testing.assert_close(got, torch.stack(want))


def test_many_tokens_are_contrasted_at_even_distances():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(3, *shape, generator=generator, dtype=torch.float64) for shape in ((2, IN), (OUT, 2)))
    x = torch.randn(1100, IN, generator=generator, dtype=torch.float64)
    index = torch.randint(3, (1100, 1), generator=generator)
    few = contrastive_loss(x[::2], index[::2], a, None, b, 0.5)
    torch.testing.assert_close(contrastive_loss(x, index, a, None, b, 0.5), few)
    pairs = [(int(index[t]), b[index[t, 0]] @ a[index[t, 0]] @ x[t]) for t in range(0, 1100, 50)]
    torch.testing.assert_close(contrastive_loss(x[::50], index[::50], a, None, b, 0.5), info_nce(pairs, 0.5))


def test_outputs_that_are_nothing_are_not_contrasted():
    bank = BankConfig("moelora", r=2, contrastive_coef=1.0)
    [layer] = stack(bank, 1)
    with torch.no_grad():
        layer.adapter.B.zero_()
    with batch_context(BatchContext()):
        layer(torch.zeros(8, IN, dtype=torch.float64)).sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())
