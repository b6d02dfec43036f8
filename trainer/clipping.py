"""Gradients' norm and clipping in DeepSpeed's place: of all groups together, or of each group on its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.readback import Readback


class NormClip:
    """Scales all gradients by their common norm as DeepSpeed does, without the host waiting for the device.

    DeepSpeed asks in every parameter group whether the norm is a number and waits for all that is queued; on a GPU that
    is the optimizer's update of the group before. The answer is known: a norm that is none has become infinity where
    the groups' norms were combined, and the loop ends the run for it. On a GPU it is on its way to the host before the
    first update, and is taken in one pass over all gradients in the dtype they have, instead of three for each.

    DeepSpeed's engine gives :meth:`norm` as its own from here on.
    """

    def __init__(self, engine: Any) -> None:
        self._zero = zero = engine.optimizer
        self._most = float(zero.clip_grad)
        self._combined = zero.scaled_global_norm
        self._norm = Readback(torch.zeros(1))
        zero.scaled_global_norm = self._measure
        zero.unscale_and_clip_grads = self._apply
        engine.get_global_grad_norm = self.norm
        if zero.single_partition_of_fp32_groups[0].is_cuda:
            zero.get_grad_norm_direct = self._norm_of_group

    def norm(self) -> float:
        """Of the last step's gradients, before clipping; infinity or NaN if one of them is no number."""
        return float(self._norm.read())

    def _measure(self) -> Tensor:
        norm: Tensor = self._combined()
        self._norm = Readback(norm.reshape(1))
        return norm

    def _norm_of_group(self, gradients: Sequence[Tensor], _params: object) -> Tensor:
        """Of a group's gradients on all ranks, of which each holds a partition, padded with zeros."""
        square = squared_norm(gradients, self._zero.device)
        dist.all_reduce(square, group=self._zero.dp_process_group)
        return square.sqrt()

    def _apply(self, grads: Sequence[Tensor], total_norm: Tensor) -> None:
        if self._most:
            factor = 1.0 / torch.clamp((total_norm + 1e-6) / self._most, min=1.0)
            for grad in grads:
                grad.mul_(factor)


def squared_norm(tensors: Sequence[Tensor], device: torch.device | str) -> Tensor:
    """The sum of all elements' squares, summed up in fp32: one kernel for many tensors."""
    if not tensors:
        return torch.zeros((), device=device)
    return torch.stack(torch._foreach_norm(list(tensors), 2, dtype=torch.float32)).pow(2).sum()


class GroupClip:
    """Each parameter group's gradient scaled on its own, where DeepSpeed would scale all by their common norm.

    Made before anything else watches the optimizer's steps, so that a log of gradients sees what they are multiplied
    by. DeepSpeed's own clipping must be off.
    """

    def __init__(self, engine: Any) -> None:
        self._zero = engine.optimizer
        self._factors = [1.0] * len(self._zero.single_partition_of_fp32_groups)
        self._zero.unscale_and_clip_grads = self._apply

    def squares(self) -> torch.Tensor:
        """This rank's part of each group's squared gradient norm, [groups], after a step's last backward pass."""
        found = []
        for group in range(len(self._factors)):
            norms = [torch.linalg.vector_norm(grad.float()) for grad in self._parts(group)]
            found.append(torch.stack(norms).pow(2).sum() if norms else torch.zeros((), device=self._zero.device))
        return torch.stack(found)

    def scale(self, group: int, norm: float, most: float) -> None:
        """Scale the group's gradient in this step so that its norm, which is ``norm``, is at most ``most`` (0: any)."""
        clip = torch.clamp((torch.tensor(norm) + 1e-6) / most, min=1.0) if most else torch.ones(())
        self._factors[group] = float(1.0 / clip)

    def silence(self, group: int) -> None:
        """Take the group's gradient away in this step, whatever it is: NaN times zero would be NaN."""
        self._factors[group] = 1.0
        for grad in self._parts(group):
            grad.zero_()

    def _parts(self, group: int) -> list[torch.Tensor]:
        parts = self._zero.averaged_gradients.get(group) or []
        return [grad for grad in parts if not getattr(grad, "_zero_padding", False)]

    def _apply(self, grads: list[torch.Tensor], _total_norm: Any) -> None:
        """In DeepSpeed's place, once for each group, between the cast to fp32 and the optimizer's step."""
        partitions = self._zero.single_partition_of_fp32_groups
        # The log clips a part of it only, and the rest in a pass of its own.
        starts = [None if flat.grad is None else flat.grad.data_ptr() for flat in partitions]
        group = starts.index(grads[0].data_ptr())
        if self._factors[group] != 1.0:
            for grad in grads:
                grad.mul_(self._factors[group])
