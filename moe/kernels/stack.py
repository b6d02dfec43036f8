"""What an expert layer computes with, as one value, and what its backward returns.

Shapes: R rows, K choices per row, L local experts, N sorted pairs, H hidden, I intermediate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from moe.assignment import Assignment
from moe.form import ExpertForm
from moe.kernels.parts import Douts, GiveBack, Parts


@dataclass(frozen=True)
class Stack:
    """The local experts' weights as they are stored (see :class:`~moe.form.ExpertForm`), biases [L,2I] and [L,H]."""

    up_L: Tensor
    down_L: Tensor
    up_bias_L2I: Tensor | None
    down_bias_LH: Tensor | None
    form: ExpertForm

    @property
    def up_L2IH(self) -> Tensor:
        return self.up_L.transpose(1, 2) if self.form.transposed else self.up_L

    @property
    def down_LHI(self) -> Tensor:
        return self.down_L.transpose(1, 2) if self.form.transposed else self.down_L


@dataclass(frozen=True)
class Needs:
    """Which gradients are wanted: nothing is computed for frozen weights."""

    x: bool
    weights: bool
    up: bool
    down: bool
    up_bias: bool
    down_bias: bool

    def zeros(self, x_RH: Tensor, weights_RK: Tensor, stacked: Sequence[Tensor | None]) -> Gradients:
        """Of no pairs. Zero, not missing: ranks without pairs take part in the reduction of gradients."""
        tensors = (x_RH, weights_RK, *stacked)
        wanted = (self.x, self.weights, self.up, self.down, self.up_bias, self.down_bias)
        return Gradients(
            *(torch.zeros_like(t) if t is not None and w else None for t, w in zip(tensors, wanted, strict=True))
        )


@dataclass
class Gradients:
    """Each like its tensor in the forward; None where it is not wanted."""

    x: Tensor | None = None
    weights: Tensor | None = None
    up: Tensor | None = None
    down: Tensor | None = None
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None


class Pass(Protocol):
    """How the products of a layer run: a module with these two functions. Both are called with N > 0 only."""

    def forward(
        self, x_RH: Tensor, weights_RK: Tensor, stack: Stack, assignment: Assignment, keep: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Returns (out [R,H], pre-activations [N,2I]; None if ``keep`` is false)."""

    def backward(
        self,
        dout_RH: Tensor,
        x_RH: Tensor,
        weights_RK: Tensor,
        h_N2I: Tensor,
        stack: Stack,
        assignment: Assignment,
        needs: Needs,
        overwrite: bool,
    ) -> Gradients:
        """``overwrite``: h is not needed again, its memory may be used."""


class PassInParts(Pass, Protocol):
    """One that can also run own tokens and others' apart (:mod:`moe.guests`). Forward twice, each with N > 0 only."""

    def queues_early(self, x_RH: Tensor) -> bool:
        """Whether anything is won by what can be queued before the host knows N; the same on all ranks."""

    def up(self, x_RH: Tensor, stack: Stack, assignment: Assignment, rows_NH: Tensor | None = None) -> Tensor:
        """Pre-activations [N,2I]. From given rows without a bias also before N is known: of their places, undefined
        behind N."""

    def down(self, h_N2I: Tensor, weights_RK: Tensor, stack: Stack, assignment: Assignment) -> Tensor:
        """The layer's output, [R,H]."""

    def backward_parts(self, parts: Parts, douts: Douts, stack: Stack, needs: Needs, give_back: GiveBack) -> Gradients:
        """Of both parts together; x and weights in what is returned are those of own tokens."""


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which scores and elementwise pieces are computed: fp32, or the model's own if that is wider."""
    return torch.promote_types(dtype, torch.float32)


def spread_scores(weights_RK: Tensor, assignment: Assignment, dtype: torch.dtype) -> Tensor:
    """Scores in sorted order, [N]."""
    return assignment.spread(weights_RK.to(accumulate_dtype(dtype)))


def gather_scores(ds_N: Tensor, weights_RK: Tensor, assignment: Assignment) -> Tensor:
    """Gradient of the scores back at its row and choice, [R,K]; zero where a choice has no local expert."""
    if not assignment.complete:
        ds_N = torch.cat([ds_N, ds_N.new_zeros(1)])
    return ds_N[assignment.slot_RK].to(weights_RK.dtype)
