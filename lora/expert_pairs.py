"""The low-rank pairs of one layer's experts, as one value, and the masks of their dropout.

Shapes: L local experts (or 1: one matrix for all of them), R or Q rank, M inputs, O outputs, N sorted pairs, G or
P some of them, I intermediate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora.fold import Way


@dataclass(frozen=True)
class Pair:
    """``scale * B_e A_e`` beside one stacked weight. ``dropout``: of the adapter's input; 0 outside training."""

    a_LRM: Tensor
    b_LOR: Tensor
    scale: float
    dropout: float = 0.0


@dataclass(frozen=True)
class PairFacts:
    """What of :class:`Pairs` is no tensor: (scale, dropout) of each pair that there is, and the rest as there."""

    up: tuple[float, float] | None
    down: tuple[float, float] | None
    way: Way
    seed: int

    def pairs(self, factors: Sequence[Tensor]) -> Pairs:
        """With :attr:`Pairs.factors` put back."""
        rest = iter(factors)
        up, down = (None if facts is None else Pair(next(rest), next(rest), *facts) for facts in (self.up, self.down))
        return Pairs(up, down, self.way, self.seed)


@dataclass(frozen=True)
class Pairs:
    """Of both stacked weights; None where a weight has none. ``seed``: of the dropout's masks."""

    up: Pair | None
    down: Pair | None
    way: Way = "auto"
    seed: int = 0

    @property
    def factors(self) -> list[Tensor]:
        return [factor for pair in (self.up, self.down) if pair for factor in (pair.a_LRM, pair.b_LOR)]

    @property
    def facts(self) -> PairFacts:
        up, down = (pair and (pair.scale, pair.dropout) for pair in (self.up, self.down))
        return PairFacts(up, down, self.way, self.seed)


@dataclass(frozen=True)
class Kept:
    """What a forward leaves for its backward: the pre-activations of the first pairs [P,2I], and ``A x`` of both sides,
    [N,Q] (Q = 0 without a pair; of folded experts undefined). ``table_X``: of the fused pass, where its tiles are."""

    h_P2I: Tensor
    z_up_NQ: Tensor
    z_down_NQ: Tensor
    table_X: Tensor | None = None


@dataclass
class PairGradients:
    """Like a :class:`Pair`'s factors: zero, not missing, for experts without rows."""

    a_LRM: Tensor
    b_LOR: Tensor

    @classmethod
    def zeros(cls, pair: Pair | None) -> PairGradients | None:
        return None if pair is None else cls(torch.zeros_like(pair.a_LRM), torch.zeros_like(pair.b_LOR))


Draw = Callable[[int, int], Tensor | None]


def masks(pair: Pair | None, seed: int, like: Tensor) -> Draw:
    """``draw(rows, width)``: a fresh mask whose ones are 1 / (1 - p), in ``like``'s dtype; None without dropout.

    A second ``masks`` of the same seed draws the same again, if it is asked for the same shapes in the same order: so
    no mask is kept for the backward.
    """
    if pair is None or not pair.dropout:
        return lambda rows, width: None
    keep = 1 - pair.dropout
    generator = torch.Generator(like.device).manual_seed(seed)

    def draw(rows: int, width: int) -> Tensor:
        return like.new_empty(rows, width).bernoulli_(keep, generator=generator).div_(keep)

    return draw


def masked(x_GM: Tensor, mask_GM: Tensor | None) -> Tensor:
    return x_GM if mask_GM is None else x_GM * mask_GM
