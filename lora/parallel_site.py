"""Banks beside MoE blocks."""

from __future__ import annotations

from itertools import chain

from torch import nn

from lora.config import BankAt
from lora.parallel import put_beside
from lora.sites import Frame, global_size
from lora.targets import Placed


def attach_beside(model: nn.Module, placed: Placed, here: BankAt, frame: Frame) -> int:
    """Put the bank beside the MoE block; dense blocks have no place for it."""
    block = frame.blocks[placed.layer]
    # The experts' own place and type; where they hold no weights, the gate's.
    home = next(chain(block.module.experts.parameters(), block.module.parameters()))
    adapter = put_beside(
        block.module, block.module.experts, placed.path, int(model.config.hidden_size), here,
        seed=frame.seed, device=home.device, dtype=home.dtype,
    )  # fmt: skip
    return global_size(adapter.parameters())
