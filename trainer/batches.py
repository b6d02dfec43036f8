"""What a worker's forward pass gets: the model's arguments, and what the BatchContext tells besides.

Shapes: B rows, S positions, T = B*S tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from trainer.chat_data import IGNORED, ChatDataset, ChatRow
from trainer.data import PackedDataset, batch_ids, sample_order
from trainer.schema import Recipe

_CHAT_FIELDS = ("ids_S", "labels_S", "position_S", "segment_S", "task_S", "mask_S")


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
        ids_BS = sent(ids_BS, device)
        return Batch({"input_ids": ids_BS, "labels": ids_BS}, {"shape": tuple(ids_BS.shape)}, consumed)
    named = [name for name in _CHAT_FIELDS if getattr(rows[0], name) is not None]
    stacked = {name: np.stack([getattr(row, name) for row in rows]) for name in named}
    stacked["prompt_S"] = _prompts(stacked["labels_S"], stacked["segment_S"], stacked["mask_S"])
    # One copy for all, to be split there.
    there_FBS = sent(
        torch.from_numpy(np.stack([array.astype(np.int64, copy=False) for array in stacked.values()])), device
    )
    there = dict(zip(stacked, there_FBS.unbind(0), strict=True))
    for name in ("mask_S", "prompt_S"):
        there[name] = there[name] != 0
    inputs = {
        "input_ids": there["ids_S"],
        "labels": there["labels_S"],
        "position_ids": there["position_S"],
        "num_items_in_batch": mean_over,
    }
    told = [name for name in ("mask", "segment", "task", "prompt") if f"{name}_S" in there]
    facts: dict[str, Any] = {f"{name}_T": there[f"{name}_S"].flatten() for name in told}
    facts["samples"] = int(stacked["segment_S"].max()) + 1
    consumed = b"".join(stacked[name].tobytes() for name in named)
    return Batch(inputs, {"shape": tuple(there["ids_S"].shape), **facts}, consumed)


def _prompts(labels_BS: np.ndarray, segment_BS: np.ndarray, mask_BS: np.ndarray) -> np.ndarray:
    """Bool [B,S]: the real tokens of each sample before its first one with loss; samples stand one after another."""
    has_BS = labels_BS != IGNORED
    count_BS = np.cumsum(has_BS, axis=1)  # up to here, this one too
    before_BS = count_BS - has_BS
    starts_BS = np.zeros_like(has_BS)
    starts_BS[:, :1] = True
    starts_BS[:, 1:] = segment_BS[:, 1:] != segment_BS[:, :-1]
    base_BS = np.maximum.accumulate(np.where(starts_BS, before_BS, 0), axis=1)
    return (mask_BS != 0) & (count_BS == base_BS)


def sent(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """``host`` on the device, which nobody waits for: memory that is not pinned would be copied before going on."""
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


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
