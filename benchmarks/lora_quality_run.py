"""Train one arm on the eight tasks and score it.

Shapes: B samples, S tokens of a sample, T = B*S, E experts, G tasks.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from benchmarks.lora_quality_arms import Arm, put_on
from benchmarks.lora_quality_base import answer_loss, by_task, schedule, solved, twin
from benchmarks.lora_quality_tasks import LENGTH, Batch, learnt
from lora.config import BankConfig
from lora.routers import BankRouter, Decision
from moe.context import BatchContext, batch_context

HELD_OUT = 10**12  # seed of the samples that are scored; training's are below


@dataclass(frozen=True)
class TrainSetting:
    """The same for all arms.

    Attributes:
        shown: whether examples are solved as the base knows the task, or as adapters learn it.
        held_out: scored samples of each task.
    """

    shown: Literal["old", "new"] = "old"
    examples: int = 1
    steps: int = 400
    batch: int = 32
    held_out: int = 128


def train_arm(
    base: LlamaForCausalLM, arm: Arm, banks: Mapping[str, BankConfig], setting: TrainSetting, lr: float, seed: int
) -> dict[str, Any]:
    """Train and score. ``seed``: of data and factors.

    Adam without clipping, which would couple the oracle's adapters, and without weight decay.
    """
    started, device = time.monotonic(), base.device
    tasks = learnt(setting.examples, setting.shown)
    model = twin(base)
    put_on(model, arm, banks, len(tasks.tasks), seed)
    optimizer = torch.optim.AdamW(_groups(model, arm, lr), lr=lr, betas=(0.9, 0.98), weight_decay=0.0)
    torch.manual_seed(seed)
    model.train()
    loss = torch.zeros(())
    for step in range(setting.steps):
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * schedule(step, setting.steps, 20)
        batch = tasks.batch(setting.batch, seed=seed * 10**7 + step).to(device)
        with batch_context(context_of(batch, balance=True)):
            loss = answer_loss(model, batch)
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
    model.eval()
    batch = tasks.batch(len(tasks.tasks) * setting.held_out, seed=HELD_OUT).to(device)
    with batch_context(context_of(batch, balance=False)), _decisions(model) as decided:
        exact = by_task(solved(model, batch), batch)
    return {
        "exact": dict(zip((task.name for task in tasks.tasks), exact, strict=True)),
        "mean": statistics.fmean(exact),
        "worst": min(exact),
        "loss": loss.item(),
        "seconds": time.monotonic() - started,
        "routing": _routing(decided, batch),
    }


def context_of(batch: Batch, *, balance: bool) -> BatchContext:
    """What banks may know of a batch whose last token is not read."""
    size, length = batch.tokens_BS.shape[0], batch.tokens_BS.shape[1] - 1
    return BatchContext(
        balance=balance, shape=(size, length), task_T=batch.task_B[:, None].expand(size, length).reshape(-1)
    )


def _groups(model: LlamaForCausalLM, arm: Arm, lr: float) -> list[dict[str, Any]]:
    routers = {id(p) for m in model.modules() if isinstance(m, BankRouter) for p in m.parameters()}
    trainable = [p for p in model.parameters() if p.requires_grad]
    factors = [p for p in trainable if id(p) not in routers]
    found = [{"params": factors, "peak": lr}]
    if routers:
        found.append({"params": [p for p in trainable if id(p) in routers], "peak": lr * arm.router_lr})
    return found


@contextmanager
def _decisions(model: LlamaForCausalLM) -> Iterator[dict[str, Tensor]]:
    """Collects the gates [T, E] of every router that runs, by path."""
    found: dict[str, Tensor] = {}

    def keep(path: str):
        def hook(module: BankRouter, args: Any, decision: Decision) -> None:
            found[path] = decision.gate_TE.detach().double()

        return hook

    handles = [m.register_forward_hook(keep(path)) for path, m in model.named_modules() if isinstance(m, BankRouter)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _routing(gates: Mapping[str, Tensor], batch: Batch) -> dict[str, Any]:
    """What routers do where the query's answer is predicted.

    ``information``: bits between a sample's task and an expert drawn by its gates, the mean over routers and the most
    of one; 3 bits name eight tasks. ``dead``: experts with less than a tenth of an even share of the gates.
    """
    if not gates:
        return {}
    bits, dead, experts = [], 0, 0
    size, length = batch.tokens_BS.shape[0], batch.tokens_BS.shape[1] - 1
    for gate_TE in gates.values():
        answer_BE = gate_TE.view(size, length, -1)[:, -LENGTH:].sum(1)
        joint_GE = answer_BE.view(int(batch.task_B.max()) + 1, -1, answer_BE.shape[1]).sum(1)
        bits.append(mutual_information(joint_GE))
        share_E = gate_TE.sum(0) / gate_TE.sum().clamp(min=1e-30)
        dead += int((share_E < 0.1 / len(share_E)).sum())
        experts += len(share_E)
    return {
        "information": statistics.fmean(bits),
        "most_information": max(bits),
        "dead": dead,
        "experts": experts,
        "by_router": dict(zip(gates, bits, strict=True)),
    }


def mutual_information(joint_GE: Tensor) -> float:
    """Bits between row and column of a table of non-negative weights."""
    p_GE = joint_GE.double() / joint_GE.sum()
    independent_GE = p_GE.sum(1, keepdim=True) * p_GE.sum(0, keepdim=True)
    some = p_GE > 0
    return float((p_GE[some] * (p_GE[some] / independent_GE[some]).log()).sum()) / math.log(2)
