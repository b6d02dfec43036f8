"""What a rank does: trains a tiny model for 20 steps at a given EP degree and writes what a test compares."""

import json
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from deepspeed.runtime.zero import stage_1_and_2

from checkpointing.state.hash import state_hash
from checkpointing.state.zero import after_restore, optimizer_steps, zero_buffers
from moe.build import new_model
from moe.convert import convert
from moe.deepspeed_ep import bind_expert_parallel
from moe.layout import Layout
from trainer.clipping import NormClip
from trainer.engine import create_engine, prepare_deepspeed
from trainer.exchange import Exchange
from trainer.recipe import load_recipe
from trainer.rendezvous import Process

FIELDS = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
    "moe_intermediate_size": 24, "num_experts": 6, "num_experts_per_tok": 2, "norm_topk_prob": True,
}  # fmt: skip
GLOBAL_BATCH, SEQUENCE, VOCAB, STEPS = 8, 24, 61, 20


def train(engine, process, batches_SBT, first, last):
    losses = []
    per_rank = GLOBAL_BATCH // process.world
    for step in range(first, last):
        mean = torch.zeros(())
        mine = batches_SBT[step, process.rank * per_rank : (process.rank + 1) * per_rank]
        micros = mine.chunk(engine.gradient_accumulation_steps())
        for micro in micros:
            loss = engine(input_ids=micro, labels=micro, use_cache=False).loss
            engine.backward(loss)
            engine.step()
            mean += loss.detach() / len(micros)
        dist.all_reduce(mean)
        losses.append(float(mean) / process.world)
    return losses


def report(rank, world, out, ep, zero, accumulation):
    process = Process(rank, world, rank, torch.device("cpu"))
    recipe = load_recipe(
        Path(__file__).parent / "ep_recipe.yaml",
        [f"parallel.workers={process.world}", f"parallel.ep={ep}", f"parallel.zero={zero}",
         f"train.micro_batch_size={GLOBAL_BATCH // process.world // accumulation}"],
    )  # fmt: skip
    prepare_deepspeed()
    model = new_model("qwen3_moe", FIELDS, vocab_size=VOCAB, seed=5, dtype=torch.float32)
    blocks = convert(model, Layout(process.world, ep), process.rank)
    for block in blocks:
        bind_expert_parallel(block.experts)
    engine = create_engine(model, recipe, torch.float32, accumulation)
    buffers = zero_buffers(engine.optimizer)
    generator = torch.Generator().manual_seed(9)
    # Squared, so that some tokens are frequent and there is something to learn.
    batches = torch.randint(0, VOCAB, (STEPS, GLOBAL_BATCH, SEQUENCE), generator=generator) ** 2 // VOCAB

    losses = train(engine, process, batches, 0, 10)
    saved = [buffer.tensor.clone() for buffer in buffers]
    steps = optimizer_steps(engine.optimizer)
    losses += train(engine, process, batches, 10, STEPS)
    final = state_hash(buffers, {}, process.coordinate)
    # DeepSpeed has asked us, in every backward pass.
    asked = len(stage_1_and_2.count_used_parameters_in_backward._nodes)
    exchange = Exchange(torch.tensor(float(rank)), 10 - rank, world).read()
    norm = engine.get_global_grad_norm()
    parts = [torch.randn(n, generator=generator).bfloat16() for n in (1, 70_000, 3)]
    theirs = engine.optimizer.get_grad_norm_direct(parts, list(model.parameters()))
    norms = [float(theirs), float(NormClip._norm_of_group(SimpleNamespace(_zero=engine.optimizer), parts, None))]

    # Going back ten steps and forward again must give the very same bits, and so must what is DeepSpeed's own.
    for name in ("scaled_global_norm", "unscale_and_clip_grads", "reduce_ready_partitions_and_remove_grads"):
        vars(engine.optimizer).pop(name, None)
    for buffer, tensor in zip(buffers, saved, strict=True):
        buffer.tensor.copy_(tensor)
    after_restore(engine.optimizer, steps)
    again = train(engine, process, batches, 10, STEPS)
    replayed = state_hash(buffers, {}, process.coordinate)

    ranges = [str(span.range) for buffer in buffers for span in buffer.spans]
    gathered = [None] * process.world
    dist.all_gather_object(gathered, ranges)
    before_flip = replayed
    if process.rank == process.world - 1:
        last = buffers[-1]
        last.tensor[last.spans[-1].offset].view(torch.int32).bitwise_xor_(1)
    flipped = state_hash(buffers, {}, process.coordinate)
    if process.rank == 0:
        units = {span.unit: span.stop - span.start for p in model.parameters() for span in p.address.units()}
        report = {
            "losses": losses, "again": again, "norm": norm, "norms": norms, "final": final, "replayed": before_flip,
            "asked": [asked, len(list(model.parameters()))], "exchange": exchange,
            "clipped": norm > recipe.train.max_grad_norm, "flipped": flipped, "ranges": gathered, "local_units": units,
        }  # fmt: skip
        out.write_text(json.dumps(report))
