"""Where the pieces of live state go in records: the parts of a rotation, and the log of one step.

Every kind of state of one element (master weight, moments) is in the same part, so that a part is the state of its
elements at one instant.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from checkpointing.records import DTYPE_BYTES, Entry, encode_table
from checkpointing.recovery import GRADIENT
from checkpointing.schedule import cuts
from checkpointing.state.buffers import StateBuffer, StateSpan
from checkpointing.units import Range

_ALIGNMENT = 256  # a multiple of every vector width and of a DMA burst
META_BYTES = 16 << 10
META = Range("step", "meta", 0, META_BYTES)  # what a log says of its step besides gradients


@dataclass(frozen=True)
class Piece:
    """Elements ``[lo:hi)`` of a buffer (by its index), and where they go in a payload: ``offset`` in bytes."""

    buffer: int
    lo: int
    hi: int
    offset: int


@dataclass(frozen=True)
class Fragment:
    """One record's worth of state: what to copy, and the table that names it."""

    parts: tuple[int, ...]
    pieces: tuple[Piece, ...]
    entries: tuple[Entry, ...]
    nbytes: int

    @cached_property
    def table(self) -> bytes:
        return encode_table(self.entries, self.parts)


def fragment_of(
    buffers: Sequence[StateBuffer], pieces: Sequence[tuple[int, int, int]], parts: tuple[int, ...]
) -> Fragment:
    """The fragment that holds elements ``[lo:hi)`` of buffers, given as (buffer's index, lo, hi)."""
    placed, entries, at = [], [], 0
    for index, lo, hi in pieces:
        buffer = buffers[index]
        size = DTYPE_BYTES[buffer.dtype]
        placed.append(Piece(index, lo, hi, at))
        entries += [_entry(buffer.dtype, size, span, lo, hi, at) for span in buffer.spans if _meets(span, lo, hi)]
        at += _padded((hi - lo) * size)
    return Fragment(parts, tuple(placed), tuple(entries), at)


def _meets(span: StateSpan, lo: int, hi: int) -> bool:
    return span.offset < hi and span.offset + span.range.size > lo


def _entry(dtype: str, size: int, span: StateSpan, lo: int, hi: int, at: int) -> Entry:
    first, last = max(span.offset, lo), min(span.offset + span.range.size, hi)
    unit = span.range
    named = Range(unit.unit, unit.kind, unit.lo + first - span.offset, unit.lo + last - span.offset)
    return Entry(named, dtype, at + (first - lo) * size, (last - first) * size)


def _padded(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def rotation(buffers: Sequence[StateBuffer], parts: int) -> list[Fragment]:
    """The state cut into ``parts`` fragments of nearly equal bytes; with one part it is whole.

    Raises ValueError if two buffers share a name.
    """
    names = [b.name for b in buffers]
    if len(set(names)) != len(names):
        raise ValueError(f"state buffers share a name: {sorted(n for n in names if names.count(n) > 1)[0]}")
    bounds = [cuts(buffer.tensor.numel(), parts) for buffer in buffers]
    return [
        fragment_of(
            buffers, [(i, b[part], b[part + 1]) for i, b in enumerate(bounds) if b[part] < b[part + 1]], (part,)
        )
        for part in range(parts)
    ]


@dataclass(frozen=True)
class LogLayout:
    """The record of one step's gradients: each group's whole flat partition, padding included, then the meta bytes.

    Attributes:
        entries: of the gradients and, last, of the meta bytes, which are padded with spaces.
        offsets: of each group in the payload, in bytes.
        elements: of each group.
        meta_offset: where the meta bytes start; they end with the payload.
    """

    dtype: str
    entries: tuple[Entry, ...]
    offsets: tuple[int, ...]
    elements: tuple[int, ...]
    meta_offset: int

    @property
    def nbytes(self) -> int:
        return self.meta_offset + META_BYTES

    @cached_property
    def table(self) -> bytes:
        return encode_table(self.entries)

    @cached_property
    def skipped_table(self) -> bytes:
        """Of a step that was not taken: it has no gradients."""
        return encode_table(self.entries[-1:])


def log_layout(buffers: Sequence[StateBuffer], dtype: str) -> LogLayout:
    """The log's layout for groups whose master weights are the buffers of kind ``master``, in their order."""
    size = DTYPE_BYTES[dtype]
    entries, offsets, elements, at = [], [], [], 0
    for buffer in buffers:
        if not buffer.name.endswith(".master"):
            continue
        offsets.append(at)
        elements.append(buffer.tensor.numel())
        for span in buffer.spans:
            named = Range(span.range.unit, GRADIENT, span.range.lo, span.range.hi)
            entries.append(Entry(named, dtype, at + span.offset * size, span.range.size * size))
        at += _padded(buffer.tensor.numel() * size)
    entries.append(Entry(META, "uint8", at, META_BYTES))
    return LogLayout(dtype, tuple(entries), tuple(offsets), tuple(elements), at)
