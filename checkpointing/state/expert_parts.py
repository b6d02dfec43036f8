"""The parts of one worker's state in mode ``pec``: chunks of what is no expert's, then one part for each expert.

An expert's part is all its tensors and kinds, wherever they lie in the flat partitions; if ZeRO has cut it over several
workers, the piece that lies here.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property

from checkpointing.records import DTYPE_BYTES
from checkpointing.state.buffers import StateBuffer
from checkpointing.state.fragments import Fragment, fragment_of
from checkpointing.units import expert_of
from moe.refs import ExpertRef

_ALIGN = 64  # elements
Stretch = tuple[int, int, int]  # a buffer's index, and elements [lo:hi) of it


@dataclass(frozen=True)
class ExpertParts:
    """Fragments by part number.

    Attributes:
        fragments: the first ``fresh`` hold what is no expert's, those behind them ``experts``, in their order.
    """

    fragments: tuple[Fragment, ...]
    fresh: int
    experts: tuple[ExpertRef, ...]

    @cached_property
    def _number(self) -> dict[ExpertRef, int]:
        return {ref: self.fresh + i for i, ref in enumerate(self.experts)}

    def numbers(self, chosen: Collection[ExpertRef]) -> list[int]:
        """The parts of what is no expert's and of the chosen experts, as far as they lie on this rank."""
        return [*range(self.fresh), *sorted(self._number[ref] for ref in chosen if ref in self._number)]

    def of(self, chosen: Collection[ExpertRef]) -> list[Fragment]:
        return [self.fragments[part] for part in self.numbers(chosen)]

    def nbytes(self, chosen: Collection[ExpertRef]) -> int:
        """Payload bytes of a capture of the chosen experts."""
        return sum(fragment.nbytes for fragment in self.of(chosen))


def expert_parts(buffers: Sequence[StateBuffer]) -> ExpertParts:
    """Cut a worker's state. All slots being equal, what is no expert's is cut into chunks of about the size of the
    largest expert's part; with no expert here it is one chunk."""
    others: list[Stretch] = []
    experts: dict[ExpertRef, list[Stretch]] = {}
    for index, buffer in enumerate(buffers):
        for span in sorted(buffer.spans, key=lambda s: s.offset):
            ref = expert_of(span.range.unit)
            _append(others if ref is None else experts.setdefault(ref, []), index, span.offset, span.range.size)
    refs = sorted(experts)
    largest = max((_nbytes(buffers, experts[ref]) for ref in refs), default=0)
    chunks = _chunks(buffers, others, largest)
    pieces = [*chunks, *(experts[ref] for ref in refs)]
    fragments = tuple(fragment_of(buffers, piece, (part,)) for part, piece in enumerate(pieces))
    return ExpertParts(fragments, len(chunks), tuple(refs))


def _append(stretches: list[Stretch], index: int, lo: int, size: int) -> None:
    """Neighbours become one stretch."""
    if stretches and stretches[-1][0] == index and stretches[-1][2] == lo:
        index, lo, size = index, stretches[-1][1], lo + size - stretches[-1][1]
        stretches.pop()
    stretches.append((index, lo, lo + size))


def _nbytes(buffers: Sequence[StateBuffer], stretches: Sequence[Stretch]) -> int:
    return sum((hi - lo) * DTYPE_BYTES[buffers[index].dtype] for index, lo, hi in stretches)


def _chunks(buffers: Sequence[StateBuffer], stretches: Sequence[Stretch], largest: int) -> list[list[Stretch]]:
    """At least one chunk, so that a part exists that says of which step the rest is."""
    total = _nbytes(buffers, stretches)
    count = max(1, -(-total // largest)) if largest else 1
    limit = max(-(-total // count), 8 * _ALIGN)
    chunks: list[list[Stretch]] = [[]]
    room = limit
    for index, first, last in stretches:
        size, lo = DTYPE_BYTES[buffers[index].dtype], first
        while lo < last:
            fits = max(room // size, 0)
            hi = last if last - lo <= fits else min(last, lo + -(-fits // _ALIGN) * _ALIGN)
            if hi > lo:
                chunks[-1].append((index, lo, hi))
                room -= (hi - lo) * size
            lo = hi
            if lo < last or room <= 0:
                chunks.append([])
                room = limit
    return chunks if chunks[-1] or len(chunks) == 1 else chunks[:-1]
