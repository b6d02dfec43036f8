"""The gradients that ZeRO's optimizer consumes in a step, taken where it takes them.

ZeRO flattens each parameter group's averaged gradients into one partition, in the dtype they were reduced in, casts it
to fp32, clips it and steps. In bf16 the flattened partition is kept (2 bytes per parameter: the cast to fp32 is exact,
so nothing is lost) together with the factor that clipping multiplied it by; in fp32 the clipped partition itself. Both
exist anyway: keeping a reference costs no copy, only that the memory is freed when the log has been copied.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from checkpointing.moments import MOMENTS
from checkpointing.record_sums import GradientSums, same
from checkpointing.state.zero import optimizer_steps


class LogError(ValueError):
    """This run's steps cannot be logged; the message says why and what to choose instead."""


@dataclass
class StepLog:
    """What one optimizer step consumed on this rank.

    Attributes:
        grads: for each parameter group its flat partition [N]; empty if the step was skipped.
        factors: for each group the factor to apply after the cast to fp32, a tensor [1]; empty if it is 1 for all.
        groups: for each group the optimizer's settings (lr, betas, ...), and ``step``, its count before this step.
        ready: on a GPU, for each group the event after which its gradients are there: before its update, so that they
            can be copied beside it.
        sums: for each group the sums of its gradients' blocks, see checkpointing.device_sums; None if nobody took them.
    """

    grads: list[Tensor]
    factors: list[Tensor]
    groups: list[dict[str, Any]]
    ready: list[torch.cuda.Event] = field(default_factory=list)
    sums: list[Tensor | None] = field(default_factory=list)
    _released: bool = False

    @property
    def skipped(self) -> bool:
        return not self.grads and not self._released

    def release(self) -> None:
        """Let go of the gradients, once their copies hold them. What else the log tells stays."""
        self._released = self._released or bool(self.grads)
        self.grads, self.ready, self.sums = [], [], []

    def meta(self, factors: Sequence[float]) -> bytes:
        """JSON of everything but the gradients. ``factors``: the numbers of the attribute."""
        assert len(factors) == len(self.factors), "a factor is missing, and would be taken for 1"
        found = list(factors) or [1.0] * len(self.groups)
        return json.dumps({"skipped": self.skipped, "factors": found, "groups": self.groups}).encode()


def check_elementwise(optimizer: torch.optim.Optimizer) -> None:
    """Raises LogError by name if an optimizer's update of an element depends on other elements."""
    name = type(optimizer).__name__
    if name not in MOMENTS:
        raise LogError(
            f"checkpoint.mode: wal re-applies updates element by element, which {name} does not allow; choose "
            f"AdamW, SGD or Lion, or checkpoint.mode: dense"
        )


def settings_of(group: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter group's scalars: all that a step depends on besides tensors."""
    return {name: value for name, value in group.items() if name != "params" and _is_plain(value)}


def _event(tensor: Tensor) -> torch.cuda.Event | None:
    """After what is queued so far on the tensor's GPU, if it lies on one."""
    return torch.cuda.current_stream(tensor.device.index).record_event() if tensor.is_cuda else None


def _is_plain(value: Any) -> bool:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return all(_is_plain(part) for part in value)
    return value is None or isinstance(value, bool | int | float | str)


class GradientTap:
    """Watches a ZeRO optimizer's steps; :meth:`take` gives what the last one consumed.

    Raises LogError for an optimizer whose steps cannot be re-applied.
    """

    def __init__(self, zero_optimizer: Any) -> None:
        check_elementwise(zero_optimizer.optimizer)
        self._zero = zero_optimizer
        self._clip = zero_optimizer.unscale_and_clip_grads
        self._flatten = zero_optimizer.flatten
        self._preflattened = zero_optimizer._get_preflattened_grad_partition
        self._flat: Tensor | None = None
        self._there: torch.cuda.Event | None = None
        self._checked: set[int] = set()
        self._summing = GradientSums()
        self._counts: list[float] = []
        self.recount()
        self._reset()
        zero_optimizer.unscale_and_clip_grads = self._on_clip
        zero_optimizer.flatten = self._on_flatten
        zero_optimizer._get_preflattened_grad_partition = self._on_preflattened

    @property
    def dtype(self) -> str:
        """Of the partitions that :meth:`take` gives: the dtype in which gradients are reduced and accumulated."""
        return str(self._zero.gradient_accumulation_dtype).removeprefix("torch.")

    def recount(self) -> None:
        """Read the optimizer's step counts anew, after a restore. Between restores they are counted here: on a GPU they
        lie on the device, and reading them in every step would wait for it."""
        self._counts = optimizer_steps(self._zero)

    @property
    def counts(self) -> list[float]:
        """Optimizer steps so far, per parameter group."""
        return list(self._counts)

    def _reset(self) -> None:
        self._grads: list[Tensor] = []
        self._factors: list[Tensor] = []
        self._groups: list[dict[str, Any]] = []
        self._ready: list[torch.cuda.Event] = []
        self._sums: list[Tensor | None] = []

    def _on_flatten(self, tensors: Any) -> Tensor:
        flat = self._flatten(tensors)
        # Buckets are flattened, too, when they are reduced: a reference to one would keep its memory.
        if len(self._grads) < len(self._counts) and flat.numel() == self._zero.partition_size[len(self._grads)]:
            self._note(flat)
        return flat

    def _on_preflattened(self, group: int) -> Tensor | None:
        flat = self._preflattened(group)
        if flat is not None:
            self._note(flat)
        return flat

    def _note(self, flat: Tensor) -> None:
        self._flat, self._there = flat, _event(flat)

    def _on_clip(self, grads: list[Tensor], total_norm: Any) -> None:
        """Called once per group, between the cast to fp32 and the optimizer's step."""
        flat, self._flat = self._flat, None
        (grad,) = grads
        inner = self._zero.optimizer
        index = len(self._grads)
        partition = self._zero.single_partition_of_fp32_groups[index]
        assert partition.numel() == grad.numel(), "groups are stepped in their order"
        there = self._there
        if self.dtype == "float32":
            self._clip(grads, total_norm)
            self._grads.append(grad)
            there = _event(grad)
        else:
            new = index not in self._checked
            self._check_lossless(index, flat, grad)
            assert flat is not None
            factor = torch.ones(1, dtype=torch.float32, device=grad.device)
            if self._summing.can(flat, grad):
                self._clip([grad[:1], factor], total_norm)  # all is overwritten
                self._sums.append(self._summing.scale(flat, factor, grad, check=new))
            else:
                self._clip([grad, factor], total_norm)
                self._sums.append(None)
            self._grads.append(flat)
            self._factors.append(factor)
        if there is not None:
            self._ready.append(there)
        self._groups.append(settings_of(inner.param_groups[index]) | {"step": self._counts[index]})
        self._counts[index] += "step" in inner.state[partition]

    def _check_lossless(self, index: int, flat: Tensor | None, grad: Tensor) -> None:
        """Structurally a bf16 partition cast to fp32 loses nothing; that it is the one consumed is compared once."""
        name = "nothing" if flat is None else str(flat.dtype)
        if flat is None or flat.dtype != self._zero.gradient_accumulation_dtype or flat.numel() != grad.numel():
            raise LogError(
                f"gradients of group {index} were reduced in {name}, not in {self.dtype}: they cannot be logged "
                "without loss; choose checkpoint.mode: dense"
            )
        if index not in self._checked:
            if not same(flat.to(grad.dtype), grad):
                raise LogError(f"group {index}: the optimizer consumes other gradients than were reduced")
            self._checked.add(index)

    def take(self) -> StepLog:
        """What the step since the last call consumed; a step that DeepSpeed skipped has no gradients."""
        groups = self._groups
        if not self._grads:
            found = self._zero.optimizer.param_groups
            groups = [settings_of(g) | {"step": count} for g, count in zip(found, self._counts, strict=True)]
        assert len(groups) == len(self._counts), "a step was logged half"
        log = StepLog(self._grads, self._factors, groups, self._ready, self._sums)
        self._reset()
        return log
