"""What a worker's forward pass gets: the model's arguments, and what the BatchContext tells besides.

Shapes: B rows, S positions, T = B*S tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from trainer.chat_data import ChatDataset, ChatRow
from trainer.data import PackedDataset, batch_ids, sample_order
from trainer.schema import Recipe


@dataclass(frozen=True)
class Batch:
    """One micro-batch on its device.

    Attributes:
        inputs: arguments of the model's forward pass.
        facts: fields of the :class:`~moe.context.BatchContext`.
        consumed: bytes that change if any of it does.
    """

    inputs: dict[str, Any]
    facts: dict[str, Any]
    consumed: bytes


def make_batch(rows: Sequence[Any], device: torch.device, mean_over: float | None) -> Batch:
    """The batch of these rows of a data set, text or chat.

    Args:
        mean_over: chat: what the sum of the tokens' losses is divided by.
    """
    if not isinstance(rows[0], ChatRow):
        ids_BS = torch.stack([torch.from_numpy(row) for row in rows])
        consumed = ids_BS.numpy().tobytes()
        ids_BS = ids_BS.to(device)
        return Batch({"input_ids": ids_BS, "labels": ids_BS}, {"shape": tuple(ids_BS.shape)}, consumed)
    fields = ("ids_S", "labels_S", "position_S", "segment_S", "task_S", "mask_S")
    stacked = [np.stack([getattr(row, name) for row in rows]) for name in fields]
    ids, labels, positions, segments, tasks, mask = (torch.from_numpy(array).to(device) for array in stacked)
    inputs = {"input_ids": ids, "labels": labels, "position_ids": positions, "num_items_in_batch": mean_over}
    facts = {
        "shape": tuple(ids.shape),
        "mask_T": mask.flatten(),
        "segment_T": segments.flatten(),
        "task_T": tasks.flatten(),
    }
    return Batch(inputs, facts, b"".join(array.tobytes() for array in stacked))


def training_rows(
    recipe: Recipe, dataset: PackedDataset | ChatDataset, step: int, micro: int, rank: int, world: int
) -> tuple[list[int], list[Any]]:
    """Global sample indices and rows of one worker's micro-batch; a function of the step, never of what came before."""
    train = recipe.train
    ids = batch_ids(step, micro, rank, world, train.global_batch_size, train.micro_batch_size)
    return ids, [dataset[sample_order(i, len(dataset), train.seed)] for i in ids]


def labels_of_step(recipe: Recipe, dataset: PackedDataset | ChatDataset, step: int) -> int | None:
    """Tokens with loss of the whole global batch, over all workers and micro-batches; None for text: all of them.

    Every worker knows it without asking the others, since the order of samples is a function of the step.
    """
    if isinstance(dataset, PackedDataset):
        return None
    train = recipe.train
    ids = batch_ids(step, 0, 0, 1, train.global_batch_size, train.global_batch_size)
    return sum(int(dataset.weights[sample_order(i, len(dataset), train.seed)]) for i in ids)
