"""What one of two ranks does whose gates balance over both of them; test_bias.py compares."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from moe.balance import BalanceLosses, BalanceSpec
from moe.bias import BiasBalance
from moe.context import BatchContext, batch_context
from moe.convert import convert
from moe.experts import Experts
from moe.gates import RoutingPolicy, observe_gates, replace_gate
from moe.layout import Layout
from moe.routing import spec_of
from moe.stats import RoutingMeter
from tests.moe.tiny_families import tiny


def passes(rank: int, accumulation: int = 2) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """This rank's tokens and masks, with unequal padding on the ranks."""
    generator = torch.Generator().manual_seed(17)
    ids_RABS = torch.randint(0, 64, (2, accumulation, 2, 8), generator=generator)
    mask_RABS = torch.rand(2, accumulation, 2, 8, generator=generator) > 0.2
    return list(zip(ids_RABS[rank], mask_RABS[rank], strict=True))


def auxiliary_only(model, rank: int, aux_scale: float) -> None:
    """Backward of nothing but the injected losses: the main loss times zero."""
    for micro, (ids_BS, mask_BS) in enumerate(passes(rank)):
        context = BatchContext(aux_scale=aux_scale, shape=(2, 8), mask_T=mask_BS.flatten(), micro_step=micro)
        with batch_context(context):
            (model(ids_BS, attention_mask=mask_BS.long()).logits.sum() * 0.0).backward()


def global_batch(rank: int, ep: int, checkpointed: bool) -> dict[str, torch.Tensor]:
    """Gradients of the global-batch loss, averaged over ranks as data parallelism does."""
    model = tiny("qwen3_moe").train()
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    blocks = convert(model, Layout(2, ep), rank)
    for module in model.modules():
        if isinstance(module, Experts) and ep > 1:
            module.ep_group = dist.group.WORLD
    losses = BalanceLosses(BalanceSpec(aux="global_batch", aux_coef=1.0), dist.all_reduce, 2)
    observe_gates(blocks, model.config, RoutingMeter(), losses)
    auxiliary_only(model, rank, 0.5)
    gradients = {}
    for name, parameter in model.named_parameters():
        if "experts" not in name and parameter.grad is not None:
            dist.all_reduce(parameter.grad)
            gradients[name] = parameter.grad / 2
    return gradients


def bias(rank: int) -> dict[str, torch.Tensor]:
    model = tiny("qwen3_moe").train()
    blocks = convert(model)
    calls = []
    balance = BiasBalance(
        {b.layer: torch.zeros(8) for b in blocks}, 0.01, total=lambda t: (calls.append(1), dist.all_reduce(t))
    )
    blocks = [replace_gate(b, RoutingPolicy(spec_of(b.gate, model.config))) for b in blocks]
    chosen = {b.layer: torch.zeros(8, dtype=torch.int64) for b in blocks}

    def record(layer, index_TK, _weights_TK):
        kept_TK = index_TK[mask_T]
        chosen[layer] += torch.bincount(kept_TK.flatten(), minlength=8)

    observe_gates(blocks, model.config, RoutingMeter(), BalanceLosses(BalanceSpec()), balance)
    for micro, (ids_BS, mask_BS) in enumerate(passes(rank)):
        mask_T = mask_BS.flatten()
        with batch_context(BatchContext(shape=(2, 8), mask_T=mask_T, micro_step=micro, record=record)):
            model(ids_BS, attention_mask=mask_BS.long()).logits.sum().backward()
    balance.commit()
    return {"bias": balance.bias_ME, "chosen": torch.stack(list(chosen.values())), "calls": torch.tensor(len(calls))}


def report(rank: int, folder: Path) -> None:
    """Writes what each part left to ``PART-RANK.pt``."""
    parts = {
        "plain": global_batch(rank, 1, False),
        "checkpointed": global_batch(rank, 1, True),
        "ep": global_batch(rank, 2, False),
        "bias": bias(rank),
    }
    for name, part in parts.items():
        torch.save(part, folder / f"{name}-{rank}.pt")
