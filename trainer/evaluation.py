"""Held-out loss: measured, reported, and kept beside the run's checkpoints, so that the best of them is known."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from checkpointing.heldout import record
from moe.context import BatchContext, batch_context
from trainer.batches import make_batch
from trainer.chat_data import ChatDataset
from trainer.schema import TrainSection

if TYPE_CHECKING:
    from trainer.loop import Run


def is_evaluated(train: TrainSection, step: int) -> bool:
    """Whether held-out loss is measured after ``step``."""
    return step in (0, train.steps) or (train.eval_every > 0 and step % train.eval_every == 0)


def report_heldout(run: Run, step: int) -> None:
    """Evaluate, print, and write the loss to the events and to the run's folder. A collective."""
    run.phases.enter("evaluate", step)
    loss, tokens = heldout_loss(run)
    if run.process.rank != 0:
        return
    entropy = run.data.unigram_entropy_nats
    sequences = min(run.recipe.train.eval_sequences, len(run.data.heldout))
    counted = {"label_tokens": tokens} if run.data.chat else {}
    run.events.write("heldout", step=step, loss=loss, unigram_entropy=entropy, **counted)
    over = f", over {tokens:,} answer tokens" if run.data.chat else ""
    print(f"held-out loss at step {step}: {loss:.4f} nats (unigram entropy {entropy:.4f}{over})", flush=True)
    record(run.run_dir, step, loss, f"{sequences} sequences")


def heldout_loss(run: Run) -> tuple[float, int]:
    """Mean next-token loss in nats over ``train.eval_sequences`` held-out rows, spread over all ranks.

    Of chat the mean over all tokens with loss, whose number comes with it; of text that over rows, all equally long.
    """
    dataset, rank, world = run.data.heldout, run.process.rank, run.process.world
    chat = isinstance(dataset, ChatDataset)
    wanted = min(run.recipe.train.eval_sequences, len(dataset))
    # Every rank makes the same number of forward passes: experts exchange tokens in each. Surplus passes count nothing.
    rounds = -(-wanted // world)
    module = run.engine.module
    module.eval()
    total = torch.zeros(2, dtype=torch.float64, device=run.process.device)
    with torch.no_grad():
        for i in range(rounds):
            index = i * world + rank
            batch = make_batch([dataset[index % wanted]], run.process.device, 1.0)  # the sum over a row's tokens
            weight = int(dataset.weights[index % wanted]) if isinstance(dataset, ChatDataset) else 1
            with batch_context(BatchContext(balance=False, **batch.facts)):
                loss = module(**batch.inputs, use_cache=False).loss.double()
            total += torch.stack([loss, torch.ones_like(loss) * weight]) * (index < wanted)
    module.train()
    dist.all_reduce(total)
    return float(total[0] / total[1]), int(total[1]) if chat else 0
