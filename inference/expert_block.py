"""One expert as one contiguous block: what the parts of it are, and where each begins.

A block is what travels: a slot holds one, a host bank holds one for each expert, and a transfer is one copy. Parts
begin on 64-byte boundaries, since products of operands aligned otherwise may round differently (MKL) or be slower.

Shapes: C blocks, B elements of one block, I intermediate, H hidden.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from moe.form import PLAIN, ExpertForm

_ALIGNMENT = 64


@dataclass(frozen=True)
class Part:
    """One tensor of a block: its name in fused files, its shape, and its first element in the block."""

    name: str
    shape: tuple[int, ...]
    start: int = 0

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class ExpertShape:
    """Sizes and layout of the routed experts; the same in every layer.

    Attributes:
        form: how the matrices lie, and the activation between them.
        biased: both projections have a bias (gpt_oss).
    """

    num_experts: int
    hidden: int
    intermediate: int
    form: ExpertForm = PLAIN
    biased: bool = False

    @property
    def plain(self) -> bool:
        """Gate rows, then up rows; no biases; an activation of the gate times up."""
        form = self.form
        return not (form.transposed or form.interleaved or form.limit is not None or self.biased)

    @property
    def elements(self) -> int:
        """Weights of one expert, without the gaps between parts."""
        return sum(part.elements for part in self.unplaced)

    @property
    def unplaced(self) -> tuple[Part, ...]:
        """The parts in the order of a block, their places not yet known."""
        gate_up, down = (2 * self.intermediate, self.hidden), (self.hidden, self.intermediate)
        if self.form.transposed:
            gate_up, down = gate_up[::-1], down[::-1]
        parts = [Part("gate_up_proj", gate_up), Part("down_proj", down)]
        if self.biased:
            parts += [Part("gate_up_proj_bias", (2 * self.intermediate,)), Part("down_proj_bias", (self.hidden,))]
        return tuple(parts)


@dataclass(frozen=True)
class BlockViews:
    """One block seen as tensors.

    Attributes:
        parts: in the order of the block.
        up, down: what rows are multiplied by, ``x @ up`` [H,2I] and ``a @ down`` [I,H], whatever the layout.
    """

    parts: tuple[Tensor, ...]
    up: Tensor
    down: Tensor


@dataclass(frozen=True)
class ExpertBlock:
    """The layout of a block of ``shape`` in ``dtype``."""

    shape: ExpertShape
    dtype: torch.dtype

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        placed, start = [], 0
        for part in self.shape.unplaced:
            placed.append(replace(part, start=start))
            start += self._aligned(part.elements)
        return tuple(placed)

    @cached_property
    def elements(self) -> int:
        """B, a multiple of the alignment, so that blocks may lie end to end."""
        last = self.parts[-1]
        return last.start + self._aligned(last.elements)

    @property
    def nbytes(self) -> int:
        return self.elements * self.dtype.itemsize

    def _aligned(self, elements: int) -> int:
        per_line = _ALIGNMENT // self.dtype.itemsize
        return -(-elements // per_line) * per_line

    def stacked(self, blocks_CB: Tensor) -> tuple[Tensor, ...]:
        """Each part of all blocks, as views [C, *shape] at the blocks' stride."""
        return tuple(
            blocks_CB[:, part.start : part.start + part.elements].unflatten(1, part.shape) for part in self.parts
        )

    def split(self, block_B: Tensor) -> tuple[Tensor, ...]:
        """The parts of one block, as views."""
        return tuple(block_B[part.start : part.start + part.elements].view(part.shape) for part in self.parts)

    def views(self, block_B: Tensor) -> BlockViews:
        parts = self.split(block_B)
        up, down = parts[:2] if self.shape.form.transposed else (parts[0].t(), parts[1].t())
        return BlockViews(parts, up, down)
