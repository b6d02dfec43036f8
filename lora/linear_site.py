"""Banks on linear layers."""

from __future__ import annotations

from torch import nn

from lora.config import BankAt
from lora.linear import RoutedLinear
from lora.sites import Frame, global_size
from lora.targets import Placed


def attach_linear(model: nn.Module, placed: Placed, here: BankAt, frame: Frame) -> int:
    """Replace the linear layer; returns how many numbers train there, as every attacher does."""
    base = model.get_submodule(placed.path)
    routed = RoutedLinear(base, here, placed.path, hidden=frame.hidden, seed=frame.seed)
    model.set_submodule(placed.path, routed)
    return global_size(p for p in routed.adapter.parameters() if p.requires_grad)
