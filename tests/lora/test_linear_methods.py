"""Each method on a linear layer equals its reference over three steps: outputs, losses, and every gradient.

Losses show in the gradients alone, which is where the product adds them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lora.combinations import faults
from lora.config import BankConfig
from lora.linear import RoutedLinear
from lora.presets import bank_at, expand
from moe.context import BatchContext, batch_context
from tests.lora.reference_linear import REFERENCES, Facts, Result

IN, OUT, ROWS, LENGTH = 6, 9, 2, 5
METHODS: dict[str, BankConfig] = {
    "lora": BankConfig("lora", r=3),
    "rslora": BankConfig("rslora", r=3),
    "moslora": BankConfig("moslora", r=3),
    "molora": BankConfig("molora", num_experts=5, r=3),
    "mov": BankConfig("mov", num_experts=5),
    "loramoe": BankConfig("loramoe", num_experts=5, r=3, router_aux_loss_coef=0.7, localized_delta=0.2),
    "hydralora": BankConfig("hydralora", r=3),
    "moelora-task": BankConfig("moelora-task", num_experts=4, r=8, dropout=0.0, num_tasks=3, task_embedding=4),
    "mola": BankConfig("mola", r=3, num_experts=5, router_aux_loss_coef=0.7, z_loss_coef=0.3),
    "mola, one chosen": BankConfig("mola", r=3, num_experts=5, top_k=1, renormalise=False, router_aux_loss_coef=0.7),
    "mola, all chosen": BankConfig("mola", r=3, num_experts=5, top_k=5, renormalise=False, router_aux_loss_coef=0.7),
    "moelora": BankConfig(
        "moelora", r=3, num_experts=4, router_aux_loss_coef=0.7, contrastive_coef=0.5, contrastive_temperature=0.3
    ),
    "adamole": BankConfig("adamole", r=3, router_aux_loss_coef=0.7),
    "summed": BankConfig("lora", r=3, num_experts=4, combine="sum"),
    "chosen vectors": BankConfig("mov", num_experts=5, combine="top_k", renormalise=False),
    "molora, with mixers": BankConfig("molora", num_experts=3, r=3, mixer=True),
    "hydralora, with mixers": BankConfig("hydralora", r=3, mixer=True, scaling="sqrt_r"),
    "top_p": BankConfig(
        "mola", r=3, num_experts=5, combine="top_p", top_p=0.6, renormalise=False, router_aux_loss_coef=0.7
    ),
    "switch": BankConfig("mola", r=3, num_experts=3, combine="switch", capacity=0.8, router_aux_loss_coef=0.7),
}


@dataclass(frozen=True)
class Batch:
    """Rows of tokens and what is known of them; ``samples`` as the reference wants them."""

    shape: tuple[int, int]
    mask_T: Tensor | None
    segment_T: Tensor | None
    task_T: Tensor
    facts: Facts


def batch(bank: BankConfig, kind: str) -> Batch:
    shape = (1, 1) if kind == "one token" else (ROWS, LENGTH)
    tokens = shape[0] * shape[1]
    row_T = torch.arange(tokens) // shape[1]
    segment_T, mask_T = None, None
    sample_T, task_T = row_T, (row_T + 1) % 2
    if kind == "packed":
        segment_T = torch.tensor([0, 0, 1, 1, 2, 0, 1, 1, 1, 2])
        sample_T, task_T = row_T * LENGTH + segment_T, (segment_T + row_T) % 3
    if kind in ("padded", "packed"):  # in packed rows the second row's last sample is all padding
        mask_T = torch.tensor([1, 1, 1, 1, 1 - (kind == "padded"), 1, 1, 1, 1 - (kind == "padded"), 0]).bool()
    real = [t for t in range(tokens) if mask_T is None or mask_T[t]]
    samples = [[t for t in real if sample_T[t] == s] for s in sample_T.unique().tolist()]
    samples = [sample for sample in samples if sample]
    full = bank_at(bank, 0, 1).config
    facts = Facts(
        real,
        samples,
        [int(task_T[sample[0]]) for sample in samples],
        task_T.tolist(),
        {
            "balance": full.router_aux_loss_coef,
            "delta": full.localized_delta,
            "z": full.z_loss_coef,
            "top_k": full.top_k,
            "renormalise": full.renormalise,
            "contrastive": full.contrastive_coef,
            "temperature": full.contrastive_temperature,
            "max_threshold": full.max_threshold,
            "top_p": full.top_p,
            "capacity": full.capacity,
        },
    )
    return Batch(shape, mask_T, segment_T, task_T, facts)


def made(bank: BankConfig, path: str = "layers.0.q_proj", bias: bool = True, dtype=torch.float64) -> RoutedLinear:
    """A linear with the bank, and no parameter at its start value."""
    torch.manual_seed(0)
    linear = RoutedLinear(nn.Linear(IN, OUT, bias=bias, dtype=dtype), bank_at(bank, 0, 1), path)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.normal_(0, 0.5, generator=generator)
    return linear


def tokens_of(shape: tuple[int, int], step: int, skewed: bool = False) -> Tensor:
    x = torch.randn(*shape, IN, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
    if skewed:
        x[..., 0] = 3.0  # one feature decides, so that nearly all tokens go to the same experts
    return x


@contextmanager
def of(here: Batch, aux_scale: float) -> Iterator[None]:
    context = BatchContext(
        aux_scale, shape=here.shape, mask_T=here.mask_T, segment_T=here.segment_T, task_T=here.task_T
    )
    with batch_context(context):
        yield


def run_reference(method: str, linear: RoutedLinear, x: Tensor, here: Batch, **other: Tensor) -> Result:
    """``other``: parameters to take instead of the layer's, with ``_`` for dots."""
    p = {name: other.get(name.replace(".", "_"), value) for name, value in linear.named_parameters()}
    return REFERENCES[method.partition(",")[0]](p, x.view(-1, IN), linear.adapter.here.scale, here.facts)


def objective(y: Tensor, here: Batch) -> Tensor:
    """Of real tokens alone, as a loss is."""
    rows = y.reshape(-1, OUT).sin()
    return rows.sum() if here.mask_T is None else rows[here.mask_T].sum()


def same_gradients(fast: nn.Module, slow: nn.Module) -> None:
    for (name, p), q in zip(fast.named_parameters(), slow.parameters(), strict=True):
        assert p.grad is not None, name
        want = torch.zeros_like(q) if q.grad is None else q.grad
        torch.testing.assert_close(p.grad, want, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kind", ["whole", "skewed", "one token", "padded", "packed", "recomputed"])
@pytest.mark.parametrize("method", METHODS)
def test_outputs_and_all_gradients_over_three_steps(method, kind):
    bank = METHODS[method]
    fast, slow, here = made(bank), made(bank), batch(bank, kind)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.003) for m in (fast, slow)]
    for step in range(3):
        for optimizer in optimizers:
            optimizer.zero_grad()
        for micro in range(2):  # two passes are accumulated, each with half the loss
            x = tokens_of(here.shape, 10 * step + micro, kind == "skewed")
            x_fast, x_slow = x.clone().requires_grad_(), x.clone().requires_grad_()
            with of(here, aux_scale=0.5):
                y = checkpoint(fast, x_fast, use_reentrant=False) if kind == "recomputed" else fast(x_fast)
                (0.5 * objective(y, here)).backward()
            want = run_reference(method, slow, x_slow, here)
            torch.testing.assert_close(y.view(-1, OUT), torch.stack(want.rows), rtol=1e-11, atol=1e-12)
            (0.5 * objective(torch.stack(want.rows), here) + 0.5 * want.loss).backward()
            torch.testing.assert_close(x_fast.grad, x_slow.grad, rtol=1e-9, atol=1e-11)
        same_gradients(fast, slow)
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.parametrize("method", [m for m in METHODS if expand(METHODS[m]).router != "none"])
def test_the_models_loss_alone_trains_all_of_the_router(method):
    """Without the losses of the router's own, which would hide that its weights are the same whatever it learns."""
    bank = BankConfig(**{**vars(METHODS[method]), "router_aux_loss_coef": 0.0, "z_loss_coef": 0.0})
    linear, here = made(bank), batch(METHODS[method], "whole")
    assert not list(faults(expand(bank)))
    with of(here, aux_scale=1.0):
        linear(tokens_of(here.shape, 0)).sin().sum().backward()
    for name, parameter in linear.adapter.router.named_parameters():
        assert parameter.grad.norm() > 1e-3 * parameter.norm(), name


@pytest.mark.parametrize("method", METHODS)
def test_no_tokens_give_gradients_of_zero(method):
    linear = made(METHODS[method])
    nobody = torch.zeros(0, dtype=torch.int64)
    with batch_context(BatchContext(shape=(0, LENGTH), task_T=nobody, mask_T=nobody.bool())):
        linear(torch.zeros(0, LENGTH, IN, dtype=torch.float64)).sum().backward()
    for name, parameter in linear.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.eq(0).all(), name


@pytest.mark.parametrize("method", METHODS)
def test_starts_as_the_frozen_layer(method):
    base, bank = nn.Linear(IN, OUT), METHODS[method]
    here = batch(bank, "whole")
    linear = RoutedLinear(base, bank_at(bank, 0, 1), "layers.0.q_proj")
    x = tokens_of(here.shape, 0).float()
    with of(here, aux_scale=1.0):
        assert torch.equal(linear(x), base(x))


@pytest.mark.parametrize("method", [m for m in METHODS if METHODS[m].preset != "mov"])
def test_dropout_drops_the_adapters_input_alone_and_its_gradient_with_it(method):
    """The mask is read off a bank that shows it: with A and B the identity, its delta is its dropped input."""
    bank = BankConfig(**{**vars(METHODS[method]), "dropout": 0.4, "contrastive_coef": 0.0})
    probe = made(BankConfig("lora", r=IN, alpha=float(IN), dropout=0.4))
    with torch.no_grad():
        for p, value in zip(probe.parameters(), (0, 0, torch.eye(IN)[None], torch.eye(OUT, IN)[None]), strict=True):
            p.copy_(torch.as_tensor(value))
    here = batch(bank, "whole")
    torch.manual_seed(7)
    mask_TM = probe(torch.ones(ROWS * LENGTH, IN, dtype=torch.float64))[:, :IN].detach()
    assert set(mask_TM.unique().tolist()) == {0.0, 1 / 0.6}

    fast, slow = made(bank), made(bank)
    x_fast, x_slow = (tokens_of(here.shape, 3).requires_grad_() for _ in range(2))
    torch.manual_seed(7)
    with of(here, aux_scale=1.0):
        y = checkpoint(fast, x_fast, use_reentrant=False)
        y.sin().sum().backward()
    want = delta_of_dropped(method, slow, x_slow, mask_TM, here)
    torch.testing.assert_close(y.view(-1, OUT), torch.stack(want.rows), rtol=1e-11, atol=1e-12)
    (torch.stack(want.rows).sin().sum() + want.loss).backward()
    torch.testing.assert_close(x_fast.grad, x_slow.grad, rtol=1e-9, atol=1e-11)
    same_gradients(fast, slow)
    fast.eval()
    with of(here, aux_scale=1.0):
        rows = torch.stack(run_reference(method, slow, x_slow, here).rows)
        torch.testing.assert_close(fast(x_slow).view(-1, OUT), rows, rtol=1e-11, atol=1e-12)


def delta_of_dropped(method: str, linear: RoutedLinear, x: Tensor, mask_TM: Tensor, here: Batch) -> Result:
    """The reference with A applied to dropped tokens: that is, for each token, an A with the same columns dropped."""
    rows = [
        run_reference(method, linear, x, here, adapter_A=linear.adapter.A * mask_M).rows[t]
        for t, mask_M in enumerate(mask_TM)
    ]
    return Result(rows, run_reference(method, linear, x, here).loss)
