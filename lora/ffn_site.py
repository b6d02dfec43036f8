"""Banks on dense feed-forward blocks."""

from __future__ import annotations

from torch import nn

from lora.config import BankAt
from lora.ffn import MixedFfn
from lora.sites import Frame, global_size
from lora.targets import Placed


def attach_ffn(model: nn.Module, placed: Placed, here: BankAt, frame: Frame) -> int:
    """Replace the block, which may be a shared expert.

    With expert parallelism every rank holds the whole bank: the blocks and their tokens are on every rank.
    """
    mixed = MixedFfn(model.get_submodule(placed.path), here, placed.path, seed=frame.seed)
    model.set_submodule(placed.path, mixed)
    return global_size(mixed.adapter.parameters())
