"""What all kinds of sites share: the frame they are attached in, and what is said of each place."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

from torch import nn


@dataclass(frozen=True)
class Match:
    """One place that a bank was put on; ``parameters`` counts trainable ones over all experts."""

    bank: str
    path: str
    target: str
    parameters: int


@dataclass(frozen=True)
class Frame:
    """What holds for the whole model: its number of layers, the seed, and the expert-parallel degree."""

    layers: int
    seed: int = 0
    ep: int = 1


def global_size(parameters: Iterable[nn.Parameter]) -> int:
    """Numbers in the parameters, over all ranks."""
    return sum(prod(p.address.global_shape) if hasattr(p, "address") else p.numel() for p in parameters)
