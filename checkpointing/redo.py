"""Redo: re-apply logged optimizer steps, and nothing else: no forward, no backward, no data.

The same torch optimizer steps the same whole flat partitions with the gradients it consumed then. Slices of them, or
another device, would give other bits: a fused kernel treats the end of a tensor otherwise than its middle.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from checkpointing.recovery import RecoveryError


@dataclass(frozen=True)
class LoggedStep:
    """A log record: its meta bytes (:meth:`checkpointing.state.gradients.StepLog.meta`), the gradients' dtype, and what
    fills a flat tensor with a group's, given the group's index."""

    meta: bytes
    dtype: str
    read: Callable[[int, Tensor], None]


class Redo:
    """Steps an optimizer's flat partitions from logs.

    Args:
        optimizer: one parameter, the flat partition, in each of its groups; it is not stepped itself, nor are its hooks
            called: a twin shares its parameters and state.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.partitions: list[Tensor] = [group["params"][0] for group in optimizer.param_groups]
        self._twin = type(optimizer)([dict(group) for group in optimizer.param_groups])
        self._twin.state = optimizer.state

    def begin(self, log: LoggedStep) -> None:
        """Set the step counts to what they were before this step, the first that is applied."""
        for partition, group in zip(self.partitions, json.loads(log.meta)["groups"], strict=True):
            # SGD counts none: a gap in its log is found by the records' numbers alone.
            if "step" in self._twin.state[partition]:
                self._twin.state[partition]["step"].fill_(group["step"])

    def apply(self, step: int, log: LoggedStep) -> None:
        """One optimizer step. Raises RecoveryError if the log is of another optimizer."""
        facts = json.loads(log.meta)
        if len(facts["groups"]) != len(self.partitions):
            raise RecoveryError(f"the log of step {step} has {len(facts['groups'])} groups, not {len(self.partitions)}")
        if facts["skipped"]:
            return
        groups = self._twin.param_groups
        for index, (partition, settings, factor) in enumerate(
            zip(self.partitions, facts["groups"], facts["factors"], strict=True)
        ):
            _check_count(step, index, self._twin.state[partition].get("step"), settings["step"])
            # Padding, which no log names, stays zero.
            logged = torch.zeros(partition.numel(), dtype=getattr(torch, log.dtype), device=partition.device)
            log.read(index, logged)
            # The same cast and product as in the run; what was logged in fp32 had been clipped already.
            grad = logged if logged.dtype == torch.float32 else logged.to(torch.float32).mul_(factor)
            groups[index].update(_settings(groups[index], settings))
            self._step_alone(groups[index], partition, grad)

    def _step_alone(self, group: dict[str, Any], partition: Tensor, grad: Tensor) -> None:
        """As DeepSpeed steps: one group at a time."""
        every = self._twin.param_groups
        self._twin.param_groups = [group]
        partition.grad = grad
        try:
            self._twin.step()
        finally:
            partition.grad = None
            self._twin.param_groups = every


def _check_count(step: int, index: int, count: Tensor | None, logged: float) -> None:
    if count is not None and not count.is_cuda and float(count) != logged:
        raise RecoveryError(
            f"the log of step {step} was written after {logged:g} optimizer steps of group {index}, "
            f"{float(count):g} are applied: steps are missing between"
        )


def _settings(group: dict[str, Any], logged: dict[str, Any]) -> dict[str, Any]:
    """The logged scalars, in the types that the optimizer keeps them in (JSON turned tuples into lists)."""
    return {
        name: tuple(value) if isinstance(group.get(name), tuple) else value
        for name, value in logged.items()
        if name != "step"
    }


def redo_steps(redo: Redo, first: int, logs: Iterable[LoggedStep], place: Callable[[int], None]) -> None:
    """Apply logs of steps ``first`` + 1, ... in order, putting each later base in place right after its step.

    ``place(step)`` copies the bases of a step; those of ``first`` are in place already. A log is asked for when those
    before it have been applied.
    """
    for step, log in enumerate(logs, first + 1):
        if step == first + 1:
            redo.begin(log)
        redo.apply(step, log)
        place(step)
