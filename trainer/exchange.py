"""The step's one small collective: what the ranks tell each other before the optimizer changes the state."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.readback import Readback


class Exchange:
    """Every rank's loss and newest sealed step, on their way to all ranks.

    A rank begins it when its last capture is copied, or its device when it is, and nobody's goes on to the optimizer's
    update before all have begun. After :meth:`read` all know which step all have sealed. Nothing waits for the device
    before, so that the update can be queued behind the last gradients.

    Args:
        loss: a number on the device.
        sealed: this rank's newest sealed step.
        world: ranks, R.

    Attributes:
        ended: when this rank's gradients were there (unix seconds), on a device known once it is read.
    """

    def __init__(self, loss: Tensor, sealed: int, world: int) -> None:
        mine_2 = torch.stack([loss.detach().double(), loss.new_full((), sealed, dtype=torch.float64)])
        everyone_R2 = mine_2.new_empty(world, 2)
        dist.all_gather(list(everyone_R2), mine_2)
        self._everyone_R2 = Readback(everyone_R2)
        self.ended, self._waits = time.time(), loss.is_cuda

    def read(self) -> tuple[float, int]:
        """The mean loss and the oldest of the newest sealed steps; waits for the device."""
        losses_R, sealed_R = self._everyone_R2.read().unbind(1)
        if self._waits:
            self.ended = time.time()
        return float(losses_R.mean()), int(sealed_R.min())
