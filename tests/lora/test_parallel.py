"""PERFT's adapters beside the MoE blocks of every family, against the paper's formula in fp64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from lora import parallel
from lora.attach import attach
from lora.config import BankConfig
from lora.errors import AdapterError
from lora.parallel import FollowingBank
from lora.presets import bank_at
from moe.build import new_model
from moe.context import BatchContext, batch_context
from moe.convert import convert
from moe.families import MoEBlock
from tests.lora.reference_perft import delta, everyone, followed, own_top_k
from tests.moe.conftest import TINY_FAMILIES, with_values

BANKS = {
    "perft-r": BankConfig("perft-r", r=3, num_experts=4, top_k=2, balance="switch", router_aux_loss_coef=0.1),
    "perft-e": BankConfig("perft-e", r=3),
    "perft-d": BankConfig("perft-d", r=3, num_experts=2),
    "perft-s": BankConfig("perft-s", r=3),
}
HIDDEN = 32


def converted(family: str) -> tuple[nn.Module, list[MoEBlock]]:
    model = with_values(new_model(family, TINY_FAMILIES[family], vocab_size=64, seed=0, dtype=torch.float64))
    return model, convert(model.requires_grad_(False))


def adapted(family: str, bank: BankConfig) -> tuple[nn.Module, list[MoEBlock]]:
    model, blocks = converted(family)
    attach(model, {"p": bank}, blocks)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.2, generator=generator)
    return model, blocks


def first(output: Tensor | tuple) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def reference(block: MoEBlock, bank: BankConfig, x: Tensor, adapter: nn.Module) -> tuple[Tensor, Tensor]:
    """The plain block's output plus the adapters', and the loss."""
    seen = {}

    def see(_m, args, kwargs):
        seen.update(zip(("hidden_states", "top_k_index", "top_k_weights"), args, strict=False))
        seen.update(kwargs)

    handle = block.module.experts.register_forward_pre_hook(see, with_kwargs=True)
    y, x_TH, loss = first(block.module(x)), x.reshape(-1, HIDDEN), torch.zeros(())
    handle.remove()
    if bank.preset == "perft-r":
        weights, loss = own_top_k(x_TH, adapter.router.weight, 2)
    elif bank.preset == "perft-e":
        weights = followed(seen["top_k_index"], seen["top_k_weights"])
    else:
        weights = everyone(len(x_TH), len(adapter.A))
    more = delta(x_TH, weights, adapter.A, adapter.B, adapter.here.scale)
    return y + more.view_as(y), 0.1 * loss


@pytest.mark.parametrize("family", TINY_FAMILIES)
@pytest.mark.parametrize("preset", BANKS)
def test_outputs_losses_and_all_gradients_match_over_three_steps(preset, family):
    bank = BANKS[preset]
    fast, slow, (_, plain) = adapted(family, bank), adapted(family, bank), converted(family)
    block, twin, base = fast[1][-1], slow[1][-1], plain[-1]
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.003) for m, _ in (fast, slow)]
    tight = {"rtol": 1e-9, "atol": 1e-10}
    for step in range(3):
        x = torch.randn(2, 4, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        x_fast, x_slow = x.clone().requires_grad_(), x.clone().requires_grad_()
        for optimizer in optimizers:
            optimizer.zero_grad()
        with batch_context(BatchContext(aux_scale=0.5, shape=(2, 4))):
            output = block.module(x_fast)
            first(output).sin().sum().backward()
        y_slow, loss = reference(base, bank, x_slow, twin.module.adapter)
        (y_slow.sin().sum() + 0.5 * loss).backward()
        torch.testing.assert_close(first(output), y_slow, **tight)
        assert isinstance(output, tuple) == (family == "gpt_oss")
        torch.testing.assert_close(x_fast.grad, x_slow.grad, **tight)
        for (name, p), q in zip(block.module.adapter.named_parameters(), twin.module.adapter.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, **tight, msg=lambda m, n=name: f"{n}: {m}")
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.parametrize("preset", BANKS)
def test_a_whole_model_starts_as_it_was_and_trains_every_adapter(preset):
    plain, _ = converted("qwen2_moe")
    model, blocks = converted("qwen2_moe")
    frozen = {path: id(p) for path, p in model.named_parameters()}
    report = attach(model, {"p": BANKS[preset]}, blocks)
    ids = torch.randint(64, (2, 8), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(ids).logits, plain(ids).logits)
    after = dict(model.named_parameters())
    assert frozen == {path: id(after[path]) for path in frozen}
    assert [m.path for m in report.matches] == [b.path for b in blocks]
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with batch_context(BatchContext(shape=(2, 8))):
        model.train()(ids, labels=ids).loss.backward()
    for path, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.address.param == path
            assert parameter.grad is not None, path
            assert parameter.grad.abs().max() > 0 or not path.endswith(".B"), path


def test_any_rank_takes_the_grouped_products(grouped_products):
    products = grouped_products(parallel)
    x, index_TK = torch.randn(5, 8), torch.tensor([[0, 2]] * 5)
    for rank in (3, 8):
        found = []
        for grouped in (False, True):
            bank = FollowingBank("layers.0.mlp.adapter", 8, bank_at(BankConfig("perft-e", r=rank), 0, 1, routed=3))
            nn.init.normal_(bank.B, generator=torch.Generator().manual_seed(1))
            with products(grouped):
                y = bank(x, index_TK, torch.full((5, 2), 0.5))
                y.sin().sum().backward()
            found.append((y.detach(), bank.A.grad, bank.B.grad))
        for loop, pairs in zip(*found, strict=True):
            torch.testing.assert_close(pairs, loop)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("rank", [4, 8])
def test_on_a_gpu_nothing_is_read_back_and_the_values_are_those_of_the_cpu(rank):
    here = FollowingBank("x.adapter", 64, bank_at(BankConfig("perft-e", r=rank), 0, 1, routed=8), dtype=torch.bfloat16)
    nn.init.normal_(here.B, generator=torch.Generator().manual_seed(1))
    there = copy.deepcopy(here).cuda()
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(48, 64, generator=generator).bfloat16()
    index_TK = torch.rand(48, 8, generator=generator).topk(2).indices
    weights_TK = torch.rand(48, 2, generator=generator)
    given = x.cuda(), index_TK.cuda(), weights_TK.cuda()
    there(*given).float().sin().sum().backward()  # probes what can run
    there.zero_grad()
    torch.cuda.set_sync_debug_mode("error")
    try:
        y = there(*given)
        y.float().sin().sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    want = here(x, index_TK, weights_TK)
    want.float().sin().sum().backward()
    torch.testing.assert_close(y.cpu(), want, rtol=0.05, atol=0.05)
    for p, q in zip(there.parameters(), here.parameters(), strict=True):
        assert (p.grad.cpu() - q.grad).norm() <= 0.05 * q.grad.norm()


def test_an_expert_nobody_chose_and_a_choice_of_nothing_get_zero_gradients():
    bank = FollowingBank("layers.0.mlp.adapter", 4, bank_at(BankConfig("perft-e", r=2), 0, 1, routed=3), seed=0)
    nn.init.normal_(bank.B)
    x = torch.randn(5, 4)
    index_TK = torch.tensor([[0, 3]] * 5)  # 3 stands for a choice that was dropped
    y = bank(x, index_TK, torch.full((5, 2), 0.5))
    torch.testing.assert_close(y, 0.5 * bank.here.scale * x @ bank.A[0].T @ bank.B[0].T)
    y.sum().backward()
    assert bank.B.grad[1:].eq(0).all()
    assert bank.B.grad[0].abs().min() > 0
    bank.zero_grad()
    bank(x[:0], index_TK[:0], torch.zeros(0, 2)).sum().backward()
    assert bank.A.grad.eq(0).all()
    assert bank.B.grad.eq(0).all()


def test_what_cannot_stand_beside_a_block_is_refused():
    model, blocks = converted("mixtral")
    with pytest.raises(AdapterError, match="matches no MoE block; the model has: mlp"):
        attach(model, {"p": BankConfig("perft-s", targets=("attn",))}, blocks)
    attach(model, {"p": BankConfig("perft-s")}, blocks)
    with pytest.raises(AdapterError, match="mlp already has an adapter; attach all banks at once"):
        attach(model, {"p": BankConfig("perft-e")}, blocks)
    with pytest.raises(AdapterError, match="matches no MoE block; the model has: no MoE block at all"):
        attach(converted("mixtral")[0], {"p": BankConfig("perft-e")}, [])
