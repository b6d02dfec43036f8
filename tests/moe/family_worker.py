"""What one of two ranks does that share the experts of a tiny model of every family; test_families_parallel compares.

Shapes: S steps, B sequences, T tokens.
"""

import torch
import torch.distributed as dist

from moe.build import new_model
from moe.convert import convert
from moe.layout import Layout
from tests.moe.conftest import TINY_FAMILIES, with_values

WORLD, STEPS, BATCH, LR = 2, 20, 4, 0.3


def batches():
    """Token numbers [S,B,T]."""
    return torch.randint(0, 64, (STEPS, BATCH, 16), generator=torch.Generator().manual_seed(7)) ** 2 // 64


def train(family, rank):
    model = with_values(new_model(family, TINY_FAMILIES[family], vocab_size=64, seed=0, dtype=torch.float32))
    blocks, chosen = convert(model, Layout(WORLD, WORLD), rank), []
    for block in blocks:
        block.experts.ep_group = dist.group.WORLD
        block.gate.register_forward_hook(lambda _m, _a, out: chosen.append(out[-1]))
    losses, first = [], {}
    for step, ids_BT in enumerate(batches()):
        mine_BT = ids_BT.chunk(WORLD)[rank]
        model.zero_grad()
        loss = model(input_ids=mine_BT, labels=mine_BT).loss
        loss.backward()
        # An expert's gradient has both ranks' tokens in it already; of the rest each rank has its own.
        own = [parameter.grad for parameter in model.parameters() if not parameter.address.is_expert]
        dist.all_reduce(total := torch.cat([gradient.flatten() for gradient in own]))
        for gradient, part in zip(own, total.split([gradient.numel() for gradient in own]), strict=True):
            gradient.copy_(part.view_as(gradient))
        for name, parameter in model.named_parameters():
            parameter.grad /= WORLD
            if step == 0:
                first[name] = parameter.grad.clone()
            with torch.no_grad():
                parameter -= LR * parameter.grad
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(float(mean) / WORLD)
    experts = {name for name, parameter in model.named_parameters() if parameter.address.is_expert}
    return {"losses": losses, "gradients": first, "chosen": chosen[: len(blocks)], "experts": experts}


def report(rank, folder):
    torch.save({family: train(family, rank) for family in TINY_FAMILIES}, folder / f"families-{rank}.pt")
