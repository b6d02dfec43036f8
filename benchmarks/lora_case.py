"""What a case of benchmarks.lora consists of: arms that take turns, and claims about them.

A module of cases (``benchmarks.lora_experts`` is one) has one function, ``cases(config, device, dtype)``, which yields
:class:`Case` values, one at a time, so that one case's memory is free before the next is built.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Role = Literal["floor", "peer", "ours"]


@dataclass(frozen=True)
class Arm:
    """One contestant.

    Attributes:
        step: one whole step, forward and backward, from gradients of None. Returns what must equal the other arms'
            values under the same key: outputs, gradients in a common layout. Making that layout costs time of its own
            only where ``check`` is true.
        forward: the forward alone; returns whatever keeps the graph alive. None: what it keeps is not counted.
        known: parameters and inputs, which are there anyway and do not count as kept for the backward.
        role: ``floor``: frozen weights without any adapter, the least that a step can cost; ``peer``; ``ours``.
        exact: whether its values are compared (a floor computes something else).
        tokens: what one step trains on, where arms differ in that; times are then compared per token.
        note: printed beside it.
    """

    name: str
    step: Callable[[bool], Mapping[str, Tensor]]
    forward: Callable[[], object] | None = None
    known: Sequence[Tensor] = ()
    role: Role = "ours"
    exact: bool = True
    tokens: int = 1
    note: str = ""


@dataclass(frozen=True)
class Claim:
    """``ours`` needs at most ``limit`` times what ``against`` needs: of time (per token), saved bytes or peak bytes."""

    what: Literal["time", "saved", "peak"]
    ours: str
    against: str
    limit: float


@dataclass(frozen=True)
class Case:
    """Arms over the same weights and inputs. The first exact one is what the others' values are compared to.

    ``tolerance``: relative error (of norms) that is still equal; the driver stops the case above it. ``skipped``: arms
    that cannot run here, and why.
    """

    title: str
    arms: Sequence[Arm]
    claims: Sequence[Claim] = ()
    tolerance: float = 1e-4
    skipped: Mapping[str, str] | None = None
