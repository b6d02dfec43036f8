"""Linear banks apart from their values: what they take over, start from, keep for backward, and do in bf16."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from lora.config import BankConfig
from lora.linear import RoutedLinear
from lora.presets import bank_at
from moe.context import BatchContext, batch_context
from tests.lora.test_linear_methods import METHODS

MOLA = BankConfig("mola", r=3, alpha=6.0, num_experts=5, top_k=2)


def made(bank: BankConfig, inputs: int = 6, outputs: int = 9, path: str = "layers.0.q_proj", **more) -> RoutedLinear:
    seed = more.pop("seed", 0)
    torch.manual_seed(0)
    return RoutedLinear(nn.Linear(inputs, outputs, **more).requires_grad_(False), bank_at(bank, 0, 1), path, seed=seed)


def randomized(linear: RoutedLinear) -> RoutedLinear:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in linear.adapter.parameters():
            parameter.copy_(torch.empty(parameter.shape).normal_(0, 0.3, generator=generator))
    return linear


def context(tokens: int, device: str = "cpu", packed: bool = False) -> BatchContext:
    """One row, or two of three samples and padding each."""
    if not packed:
        return BatchContext(shape=(1, tokens), task_T=torch.zeros(tokens, dtype=torch.int64, device=device))
    place_T = torch.arange(tokens, device=device) % (tokens // 2)
    segment_T = sum((place_T >= tokens * share // 16).long() for share in (1, 3, 7))
    return BatchContext(shape=(2, tokens // 2), task_T=segment_T % 3, segment_T=segment_T, mask_T=segment_T < 3)


def test_keeps_the_parameters_and_the_outputs_of_the_linear_it_takes_over():
    base = nn.Linear(6, 9)
    routed = RoutedLinear(base, bank_at(MOLA, 0, 1), "layers.0.q_proj")
    assert routed.weight is base.weight
    assert routed.bias is base.bias
    x = torch.randn(3, 6)
    assert torch.equal(routed(x), base(x))
    assert set(routed.state_dict()) == {"weight", "bias", "adapter.A", "adapter.B", "adapter.router.weight"}


PARAMETERS = {
    "lora": {"A": (1, 3, 6), "B": (1, 9, 3)},
    "moslora": {"A": (1, 3, 6), "C": (1, 3, 3), "B": (1, 9, 3)},
    "mov": {"B": (5, 9, 1), "router.weight": (5, 6)},
    "hydralora": {"A": (1, 3, 6), "B": (3, 9, 3), "router.weight": (3, 6)},
    "mola": {"A": (5, 3, 6), "B": (5, 9, 3), "router.weight": (5, 6)},
    "moelora-task": {"A": (4, 2, 6), "B": (4, 9, 2), "router.weight": (4, 4), "router.task_embedding": (3, 4)},
    "adamole": {
        "A": (4, 3, 6),
        "B": (4, 9, 3),
        "router.weight": (4, 6),
        "router.threshold_weight": (1, 6),
        "router.threshold_bias": (1,),
    },
}


@pytest.mark.parametrize("method", PARAMETERS)
def test_parameters_are_named_addressed_and_probed(method):
    bank = made(METHODS[method]).adapter
    assert {name: tuple(p.shape) for name, p in bank.named_parameters()} == PARAMETERS[method]
    for name, parameter in bank.named_parameters():
        assert parameter.address.param == f"layers.0.q_proj.adapter.{name}"
        assert parameter.address.global_shape == tuple(parameter.shape)
    [(name, probe)] = bank.probes()
    assert name == "B"
    assert probe is bank.B
    assert probe.eq(0).all()


def test_start_values_depend_on_seed_and_path_only():
    first = made(METHODS["adamole"]).adapter
    torch.manual_seed(99)
    again = made(METHODS["adamole"]).adapter
    other = made(METHODS["adamole"], path="layers.1.q_proj").adapter
    reseeded = made(METHODS["adamole"], seed=1).adapter
    for name in ("A", "router.weight", "router.threshold_weight", "router.threshold_bias"):
        values = [bank.get_parameter(name) for bank in (first, again, other, reseeded)]
        assert torch.equal(values[0], values[1])
        assert not torch.equal(values[0], values[2])
        assert not torch.equal(values[0], values[3])
        assert values[0].abs().max() <= 1 / math.sqrt(6)


def test_normal_starts_have_the_deviation_that_was_asked_for():
    bank = made(BankConfig("molora", a_init=0.02, router_init=0.3), inputs=400).adapter
    assert bank.A.std().item() == pytest.approx(0.02, rel=0.05)
    assert bank.router.weight.std().item() == pytest.approx(0.3, rel=0.05)


@pytest.mark.parametrize("method", METHODS)
def test_bf16_stays_near_fp32_at_odd_sizes(method):
    narrow = randomized(made(METHODS[method], 37, 53, dtype=torch.bfloat16))
    wide = randomized(made(METHODS[method], 37, 53))
    wide.load_state_dict(narrow.state_dict())
    upstream, found = torch.randn(61, 53, generator=torch.Generator().manual_seed(3)).bfloat16(), []
    for linear in (narrow, wide):
        x = torch.randn(61, 37, generator=torch.Generator().manual_seed(1)).bfloat16().to(linear.weight.dtype)
        x.requires_grad_()
        with batch_context(context(61)):
            y = linear(x)
            y.backward(upstream.to(y.dtype))
        assert y.dtype == x.dtype
        found.append([y, x.grad, *(p.grad for p in linear.adapter.parameters())])
    for got, want in zip(*found, strict=True):
        assert (got.float() - want).norm() <= 0.03 * want.norm()


def kept_bytes(linear: RoutedLinear, x: Tensor) -> int:
    """Distinct storages that the forward keeps for the backward, parameters excepted."""
    parameters = {p.untyped_storage().data_ptr() for p in linear.parameters()}
    kept = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = linear(x)
    assert y.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("method", [m for m in METHODS if m != "moelora" and METHODS[m].preset != "mov"])
def test_keeps_the_input_and_what_is_as_wide_as_the_ranks(method, dropout, dtype):
    """Of T x 512 inputs and T x 1024 outputs: x once, [T, E*R], and some [T, E] in fp32."""
    bank = BankConfig(**{**vars(METHODS[method]), "dropout": dropout})
    linear = made(bank, 512, 1024, dtype=dtype)
    tokens, size = 64, linear.weight.element_size()
    x = torch.randn(tokens, 512, dtype=dtype, requires_grad=True)
    with batch_context(context(tokens)):
        kept = kept_bytes(linear, x)
    here = linear.adapter.here
    assert kept <= tokens * (512 * size + here.num_experts * (here.r * size + 13 * 4) + 100)


def test_scaled_outputs_keep_the_input_and_the_output():
    linear = made(METHODS["mov"], 512, 1024)
    kept = kept_bytes(linear, torch.randn(64, 512, requires_grad=True))
    assert kept <= 64 * 4 * (512 + 1024 + 5 * 5)


def test_a_frozen_factor_and_an_input_without_gradient_are_left_alone():
    linear = randomized(made(MOLA))
    linear.adapter.A.requires_grad_(False)
    linear(torch.randn(7, 6)).sum().backward()
    assert linear.weight.grad is None
    assert linear.adapter.A.grad is None
    assert linear.adapter.B.grad.abs().sum() > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_on_cuda_nothing_waits_for_the_device_and_values_are_the_cpus(method, packed):
    bank = BankConfig(**{**vars(METHODS[method]), "router_init": 1.0})
    found = []
    for device in ("cpu", "cuda"):
        linear = randomized(made(bank, 64, 96)).to(device)
        x = torch.randn(128, 64, generator=torch.Generator().manual_seed(1)).to(device).requires_grad_()
        with batch_context(context(128, device, packed)):
            linear(x).sin().sum().backward()  # the first call may load libraries
            linear.zero_grad()
            x.grad = None
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("error")
            try:
                y = linear(x)
                y.sin().sum().backward()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        found.append([y, x.grad, *(p.grad for p in linear.adapter.parameters())])
    for want, got in zip(*found, strict=True):
        assert (got.cpu() - want).norm() <= 1e-4 * want.norm()
