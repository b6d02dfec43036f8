"""One of two gloo ranks that share the experts of a tiny model of every family; started by test_families_parallel.

Arguments: folder to meet and report in, rank. Shapes: S steps, B sequences, T tokens.
"""

import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from conftest import TINY_FAMILIES, with_values

from moe.build import new_model
from moe.convert import convert
from moe.layout import Layout

WORLD = 2


def train(family, rank, batches_SBT, lr):
    model = with_values(new_model(family, TINY_FAMILIES[family], vocab_size=64, seed=0, dtype=torch.float32))
    blocks, chosen = convert(model, Layout(WORLD, WORLD), rank), []
    for block in blocks:
        block.experts.ep_group = dist.group.WORLD
        block.gate.register_forward_hook(lambda _m, _a, out: chosen.append(out[-1]))
    losses, first = [], {}
    for step, ids_BT in enumerate(batches_SBT):
        mine_BT = ids_BT.chunk(WORLD)[rank]
        model.zero_grad()
        loss = model(input_ids=mine_BT, labels=mine_BT).loss
        loss.backward()
        for name, parameter in model.named_parameters():
            # An expert's gradient has both ranks' tokens in it already; of the rest each rank has its own.
            if not parameter.address.is_expert:
                dist.all_reduce(parameter.grad)
            parameter.grad /= WORLD
            if step == 0:
                first[name] = parameter.grad.clone()
            with torch.no_grad():
                parameter -= lr * parameter.grad
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(float(mean) / WORLD)
    experts = {name for name, parameter in model.named_parameters() if parameter.address.is_expert}
    return {"losses": losses, "gradients": first, "chosen": chosen[: len(blocks)], "experts": experts}


def main(folder, rank):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD, timeout=timedelta(seconds=60)
    )
    task = torch.load(folder / "task.pt")
    torch.save({family: train(family, rank, **task) for family in TINY_FAMILIES}, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
