"""What a backward pass needs to know of rows that came in two parts: a rank's own tokens, and those of others.

Forward computes the parts one after the other, so that one travels while the other is computed. Backward takes both
together: each weight's gradient is one product over all pairs, sorted by expert and within an expert by part.

Shapes: T own tokens, G of other ranks, R = T + G rows, K choices per row, N pairs, M of them of one part, I
intermediate, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from moe.assignment import Assignment

# Gradients of the output: of the own tokens [T,H], and what waits for the others' [G,H].
Douts = tuple[Tensor, Callable[[], Tensor]]
# Is called once, with the gradients of the others' x [G,H] and scores [G,K], None for what is not wanted.
GiveBack = Callable[[Tensor | None, Tensor | None], None]


@dataclass(frozen=True)
class Parts:
    """Own tokens and others', in that order.

    Attributes:
        x, weights, h: of each part, x [T,H], scores [T,K], and pre-activations [M,2I] in the order of the part's pairs.
        pairs: which of the part's (row, choice) pairs stands at each place of that order, [M].
        assignment: of all R rows.
    """

    x: tuple[Tensor, Tensor]
    weights: tuple[Tensor, Tensor]
    h: tuple[Tensor, Tensor]
    pairs: tuple[Tensor, Tensor]
    assignment: Assignment

    @property
    def places(self) -> tuple[Tensor, Tensor]:
        """Where each part's pairs stand among all, [M]."""
        own, others = self.slots
        return own.flatten()[self.pairs[0]], others.flatten()[self.pairs[1]]

    @property
    def slots(self) -> tuple[Tensor, Tensor]:
        """Of :attr:`assignment`, [T,K] and [G,K]."""
        tokens = self.x[0].shape[0]
        return self.assignment.slot_RK[:tokens], self.assignment.slot_RK[tokens:]
