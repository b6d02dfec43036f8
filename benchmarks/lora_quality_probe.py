"""Where the frozen base knows the task: what a router that is linear in a layer's input could tell at best.

Shapes: B samples, S tokens of a sample, M inputs of a layer, G tasks.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from benchmarks.lora_quality_tasks import LENGTH, Batch, TaskSet

RIDGE = 3.0


def task_known(base: LlamaForCausalLM, tasks: TaskSet, samples: int = 128) -> dict[str, float]:
    """Of each linear layer's input, how often least squares name the task of a sample they were not fitted to.

    At each of the positions where the answer is predicted on its own, the mean over them; 1 / G is chance.

    Args:
        samples: of each task, to fit and to score.
    """
    size = samples * len(tasks.tasks)
    fit, score = (tasks.batch(size, seed=10**11 + i).to(base.device) for i in range(2))
    inputs, held_out = _inputs(base, fit), _inputs(base, score)
    found = {}
    for path, x_BLM in inputs.items():
        right = [
            _named(x_BLM[:, i], held_out[path][:, i], fit.task_B, score.task_B, len(tasks.tasks)) for i in range(LENGTH)
        ]
        found[path] = sum(right) / LENGTH
    return found


def _named(x_BM: Tensor, held_out_BM: Tensor, task_B: Tensor, held_out_task_B: Tensor, tasks: int) -> float:
    mean_M, scale_M = x_BM.mean(0), x_BM.std(0) + 1e-4
    x_BM, held_out_BM = (F.pad((x - mean_M) / scale_M, (0, 1), value=1.0) for x in (x_BM, held_out_BM))
    wanted_BG = F.one_hot(task_B, tasks).to(x_BM.dtype)
    ridge_MM = RIDGE * torch.eye(x_BM.shape[1], dtype=x_BM.dtype, device=x_BM.device)
    w_MG = torch.linalg.solve(x_BM.T @ x_BM + ridge_MM, x_BM.T @ wanted_BG)
    return float(((held_out_BM @ w_MG).argmax(1) == held_out_task_B).double().mean())


@torch.no_grad()
def _inputs(base: LlamaForCausalLM, batch: Batch) -> dict[str, Tensor]:
    """Each linear layer's input where the answer is predicted, [B, LENGTH, M]; layers with the same input once."""
    found: dict[str, Tensor] = {}

    def keep(path: str):
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            found[path] = args[0][:, -LENGTH:].double()

        return hook

    shown = ("q_proj", "o_proj", "gate_proj", "down_proj")
    handles = [m.register_forward_pre_hook(keep(p)) for p, m in base.named_modules() if p.endswith(shown)]
    try:
        base(input_ids=batch.tokens_BS[:, :-1], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found
