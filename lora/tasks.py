"""A bank that is routed by task (MOELoRA, arXiv 2310.18339), as one plain LoRA for each task: exact.

The gates depend on the task alone, ``g = softmax(W Emb(task))``, so that the experts of a task are one update of rank
E * R: A = [A_e] below each other, B = [g_e B_e] side by side.

Shapes: N tasks, E experts, D the embedding's width.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from lora.base_facts import BaseFacts
from lora.config import BankConfig
from lora.deltas import Delta, deltas_of, summed
from lora.errors import AdapterError
from lora.exactness import require
from lora.peft_format import pack, write_files
from lora.presets import expand
from moe.folder import new_folder


def task_gates(weight_ED: Tensor, task_embedding_ND: Tensor) -> Tensor:
    """[N, E] fp32: how much each task uses of each expert."""
    return (task_embedding_ND.float() @ weight_ED.float().T).softmax(-1)


def task_deltas(
    tensors: Mapping[str, Tensor],
    banks: Mapping[str, BankConfig],
    routed_experts: int | None = None,
    owners: Mapping[str, str] | None = None,
) -> list[list[Delta]]:
    """The updates of each task, in the tasks' order; those of banks without a router are in all of them.

    Raises AdapterError for an adapter that is not of this kind, naming the bank.
    """
    require("tasks", banks)
    by_task = {name for name, bank in banks.items() if expand(bank).router == "task"}
    counts = {expand(banks[name]).num_tasks or 1 for name in by_task}
    if len(counts) > 1:
        raise AdapterError(f"the banks {', '.join(sorted(by_task))} have different numbers of tasks; export them apart")
    found = deltas_of(tensors, banks, routed_experts, owners)
    gates = {delta.place: _gates(delta.place, tensors) for delta in found if delta.bank in by_task}
    return [
        [summed(delta, gates[delta.place][task]) if delta.bank in by_task else delta for delta in found]
        for task in range(counts.pop())
    ]


def write_tasks(
    tensors: Mapping[str, Tensor],
    banks: Mapping[str, BankConfig],
    out: Path,
    base: BaseFacts,
    *,
    owners: Mapping[str, str] | None = None,
) -> int:
    """Write ``out/task-0``, ``out/task-1``, ..., which PEFT loads; whole or not at all. Returns how many.

    Raises AdapterError as :func:`task_deltas`, FolderError if ``out`` exists.
    """
    tasks = task_deltas(tensors, banks, base.routed_experts, owners)
    with new_folder(out) as temporary:
        for task, deltas in enumerate(tasks):
            folder = temporary / f"task-{task}"
            folder.mkdir()
            write_files(folder, *pack(deltas, base))
    return len(tasks)


def _gates(place: str, tensors: Mapping[str, Tensor]) -> Tensor:
    try:
        weight, embedding = (tensors[f"{place}.adapter.router.{name}"] for name in ("weight", "task_embedding"))
    except KeyError as missing:
        raise AdapterError(f"the adapter lacks the tensor {missing}; export it again") from None
    return task_gates(weight, embedding.to(torch.float32))
