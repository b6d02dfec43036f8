"""Banks use no operation that torch refuses on a GPU in the deterministic mode of training, checked without one."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from lora import parallel, shared_ffn
from lora.config import BankConfig
from lora.ffn import MixedFfn
from lora.parallel import FollowingBank
from lora.presets import bank_at
from moe.context import BatchContext, batch_context
from tests.lora.test_ffn import HIDDEN, PRESETS, adapted
from tests.lora.test_linear_methods import METHODS, batch, made, of, tokens_of

_ATEN = torch.ops.aten
# As the documentation of torch.use_deterministic_algorithms lists them, as far as a bank could come by them.
REFUSED = (_ATEN.put, _ATEN.put_, _ATEN.histc, _ATEN.median, _ATEN.nanmedian, _ATEN.cumprod)


class DeterministicGpu(TorchDispatchMode):
    """Refuses what a GPU would refuse."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        packet = op.overloadpacket
        running = packet in (_ATEN.cumsum, _ATEN.cumsum_) and args[0].is_floating_point()
        weighted = packet is _ATEN.bincount and len(args) > 1 and args[1] is not None
        if running or weighted or packet in REFUSED:
            raise AssertionError(f"{op} is refused on a GPU in deterministic mode")
        return op(*args, **(kwargs or {}))


def test_the_check_sees_backward_passes_too():
    x = torch.randn(3, requires_grad=True)
    with pytest.raises(AssertionError, match="cumsum"), DeterministicGpu():
        x.cumsum(0)
    y = x.cumsum(0).sum()
    with pytest.raises(AssertionError, match="cumsum"), DeterministicGpu():
        y.backward()


@pytest.mark.parametrize("method", METHODS)
def test_linear_banks_on_packed_rows(method):
    bank = METHODS[method]
    linear, here = made(bank), batch(bank, "packed")
    with of(here, aux_scale=0.5), DeterministicGpu():
        linear(tokens_of(here.shape, 0)).sin().sum().backward()


@pytest.mark.parametrize("name", PRESETS)
def test_routers_and_losses_of_feed_forward_banks(name):
    model = adapted(PRESETS[name])
    context = BatchContext(shape=(2, 4), mask_T=torch.tensor([True] * 7 + [False]))
    with batch_context(context), DeterministicGpu():
        model(torch.randn(8, HIDDEN, dtype=torch.float64)).sin().sum().backward()


@pytest.mark.parametrize("name", ["mixlora", "mixlora-switch"])
def test_grouped_products_of_feed_forward_banks(name, grouped_products):
    base = LlamaMLP(LlamaConfig(hidden_size=32, intermediate_size=24)).requires_grad_(False)
    block = MixedFfn(base, bank_at(BankConfig(name, num_experts=4, r=3), 0, 1), "layers.0.mlp")
    with batch_context(BatchContext(shape=(2, 4))), grouped_products(shared_ffn)(True), DeterministicGpu():
        block(torch.randn(8, 32)).sin().sum().backward()


def test_banks_that_follow_the_models_router(grouped_products):
    bank = FollowingBank("layers.0.mlp.adapter", 8, bank_at(BankConfig("perft-e", r=3), 0, 1, routed=3))
    index_TK = torch.tensor([[0, 3], [1, 2]])
    with grouped_products(parallel)(True), DeterministicGpu():
        bank(torch.randn(2, 8), index_TK, torch.full((2, 2), 0.5)).sin().sum().backward()
