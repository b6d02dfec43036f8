"""A worker's flat partitions as text, so that another process can build the same ones and redo its log."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from checkpointing.state.buffers import StateBuffer, StateSpan
from checkpointing.state.gradients import settings_of
from checkpointing.state.optimizers import counts_steps, optimizer_class
from checkpointing.units import Range


def describe_partitions(buffers: Sequence[StateBuffer], optimizer: torch.optim.Optimizer) -> str:
    """JSON: the optimizer's class, each group's settings and, for each buffer, its name, dtype, elements and spans."""
    rows = [[b.name, b.dtype, b.tensor.numel(), [[str(span.range), span.offset] for span in b.spans]] for b in buffers]
    groups = [settings_of(group) for group in optimizer.param_groups]
    described = {"optimizer": type(optimizer).__name__, "groups": groups, "buffers": rows}
    return json.dumps(described, separators=(",", ":"))


def build_partitions(
    text: str, settings: Sequence[dict[str, Any]], device: str
) -> tuple[list[StateBuffer], torch.optim.Optimizer]:
    """Empty partitions of the described layout, and the optimizer over their masters.

    Args:
        settings: of each parameter group, as a log has them.
    """
    described = json.loads(text)
    buffers = [
        StateBuffer(
            name,
            torch.zeros(elements, dtype=getattr(torch, dtype), device=device),
            tuple(StateSpan(Range.parse(named), offset) for named, offset in spans),
        )
        for name, dtype, elements, spans in described["buffers"]
    ]
    kinds: dict[str, dict[str, Tensor]] = {}
    for buffer in buffers:
        group, _, kind = buffer.name.partition(".")
        kinds.setdefault(group, {})[kind] = buffer.tensor
    groups, states = [], []
    for (_, tensors), setting in zip(kinds.items(), settings, strict=True):
        master = torch.nn.Parameter(tensors.pop("master"))
        groups.append({name: value for name, value in setting.items() if name != "step"} | {"params": [master]})
        states.append((master, tensors))
    optimizer = optimizer_class(described["optimizer"])(groups)
    for (_, tensors), setting in zip(states, settings, strict=True):
        if counts_steps(optimizer):
            count_device = device if setting.get("fused") or setting.get("capturable") else "cpu"
            tensors["step"] = torch.zeros((), device=count_device)
    optimizer.state.update(states)
    return buffers, optimizer
