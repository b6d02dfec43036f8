"""Live state as flat buffers whose parts have names."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from checkpointing.records import DTYPE_BYTES
from checkpointing.recovery import Need
from checkpointing.units import Range

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class StateSpan:
    """A named range, and where it starts in its buffer (``offset``, in elements)."""

    range: Range
    offset: int


@dataclass(frozen=True)
class StateBuffer:
    """A flat piece of live state: 1-D, contiguous, any device. Elements that no span names are padding.

    Raises ValueError for a tensor of another shape or a dtype that cannot be kept, and for spans that leave the
    tensor or cover an element twice.
    """

    name: str
    tensor: torch.Tensor
    spans: tuple[StateSpan, ...]

    def __post_init__(self) -> None:
        if self.tensor.dim() != 1 or not self.tensor.is_contiguous():
            raise ValueError(f"state buffer {self.name}: shape {tuple(self.tensor.shape)} is not flat and contiguous")
        if self.dtype not in DTYPE_BYTES:
            raise ValueError(f"state buffer {self.name}: dtype {self.dtype} cannot be kept; use {sorted(DTYPE_BYTES)}")
        reached = 0
        for span in sorted(self.spans, key=lambda s: s.offset):
            if span.offset < reached or span.offset + span.range.size > self.tensor.numel():
                raise ValueError(
                    f"state buffer {self.name}: {span.range} at {span.offset} overlaps another or leaves it"
                )
            reached = span.offset + span.range.size

    @property
    def dtype(self) -> str:
        return str(self.tensor.dtype).removeprefix("torch.")

    @property
    def nbytes(self) -> int:
        return self.tensor.numel() * self.tensor.element_size()


def needs_of(buffers: Iterable[StateBuffer]) -> tuple[Need, ...]:
    """What a restore of these buffers must bring."""
    return tuple(
        Need(span.range, buffer.dtype, buffer.name, span.offset * DTYPE_BYTES[buffer.dtype])
        for buffer in buffers
        for span in buffer.spans
    )
