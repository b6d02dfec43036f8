"""What one call of the model computes: rows of many sequences, and which keys each of them attends to.

Shapes: R rows over all sequences, B sequences of a group, Q rows of each, M blocks of each, S positions of a block,
L keys of each. Everything that a layer needs is made here once per call, so that layers do no bookkeeping.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

ALIKE = 15  # blocks, up to which sequences count as equally long


@dataclass(frozen=True)
class Span:
    """Consecutive rows of one sequence.

    Attributes:
        blocks: the sequence's blocks in order of position; those of its past and those that the rows are written to.
        start: position of the first row; everything before it is in the blocks already.
        rows: how many.
    """

    blocks: tuple[int, ...]
    start: int
    rows: int

    @property
    def length(self) -> int:
        """Positions of the sequence after this call."""
        return self.start + self.rows


@dataclass(frozen=True)
class Rows:
    """The rows of one call, sequence after sequence.

    Sequences with one row (decoding) are computed together, and fastest where they stand next to each other.

    Attributes:
        token_R: int64 token ids, on the CPU or where the model is.
        position_R: int64 positions, likewise.
        spans: which rows belong to which sequence, in order.
        logit_rows: the rows whose scores are wanted, in the order wanted.
        shares: where several adapters share the call, how many rows each has, one after another; None names the base.
    """

    token_R: Tensor
    position_R: Tensor
    spans: tuple[Span, ...]
    logit_rows: tuple[int, ...]
    shares: tuple[tuple[str | None, int], ...] = ()

    @classmethod
    def of(cls, parts: Iterable[tuple[Sequence[int], Span]], *, every: bool = False) -> Rows:
        """From (token ids, span) of each sequence; scores of the last row of each, or of ``every`` row."""
        tokens: list[int] = []
        positions: list[int] = []
        spans, wanted = [], []
        for ids, span in parts:
            assert len(ids) == span.rows, (len(ids), span)
            tokens.extend(ids)
            positions.extend(range(span.start, span.length))
            spans.append(span)
            wanted.append(len(tokens) - 1)
        assert spans, "a call needs at least one row"
        chosen = range(len(tokens)) if every else wanted
        return cls(torch.tensor(tokens), torch.tensor(positions), tuple(spans), tuple(chosen))

    @cached_property
    def ends(self) -> Ends:
        begun, decoded, end = [], [], 0
        for span in self.spans:
            end += span.rows
            (begun if span.rows > 1 else decoded).append(end - 1)
        return Ends(tuple(begun), tuple(decoded))


@dataclass(frozen=True)
class Ends:
    """The last row of each sequence of a call: what comes next follows from it.

    Attributes:
        begun: of sequences with several rows, chunks of prompts.
        decoded: of sequences with one row.
    """

    begun: tuple[int, ...]
    decoded: tuple[int, ...]


_under_way: ContextVar[Rows | None] = ContextVar("rows of the pass under way", default=None)


def under_way() -> Rows | None:
    """The rows that the model computes just now; None outside of its passes."""
    return _under_way.get()


def decoding(rows: int) -> bool:
    """Whether the pass under way has so many rows, each of a sequence that decodes."""
    passed = under_way()
    return passed is not None and len(passed.spans) == rows == len(passed.ends.decoded)


@contextmanager
def computing(rows: Rows) -> Iterator[None]:
    """What a layer's modules are called with does not say whose rows these are: :func:`under_way` does."""
    before = _under_way.set(rows)
    try:
        yield
    finally:
        _under_way.reset(before)


@dataclass(frozen=True)
class Group:
    """B sequences of Q rows each, whose attention is computed in one go; Q is 1 unless B is.

    Attributes:
        rows: the group's rows among all of the call.
        keys: the blocks that hold the keys: a run of the pool's, or a table [B,M].
        length: L, the keys that are left of these M*S.
        mask: True where a key is seen, [B,1,1,L] if Q is 1, else [Q,L]; None if all are seen, or if ``causal``.
        causal: row q sees the keys up to q, and L is Q.
    """

    rows: slice | Tensor
    sequences: int
    queries: int
    keys: slice | Tensor
    length: int
    mask: Tensor | None
    causal: bool = False


def written(spans: Sequence[Span], block_size: int) -> list[int]:
    """The position in the pool (block * S + offset) that each row is written to."""
    slots = []
    for span in spans:
        assert len(span.blocks) * block_size >= span.length, f"{span} has too few blocks of {block_size}"
        for position in range(span.start, span.length):
            slots.append(span.blocks[position // block_size] * block_size + position % block_size)
    return slots


def groups(spans: Sequence[Span], block_size: int, window: int | None, device: torch.device) -> tuple[Group, ...]:
    """How the rows attend. ``window`` is how many keys a row sees, its own included; None: all before it.

    Sequences of one row are padded to the longest of their group, so those that are much longer than others are a
    group of their own. Blocks that no row of a sequence sees are left out. A table is made even for one sequence on
    CUDA, where the next call must find the same kind of group.
    """
    found, first_row = [], 0
    single: dict[int, list[tuple[int, Span]]] = {}
    for span in spans:
        if span.rows == 1:
            size = len(_seen(span, block_size, window)[0]).bit_length()
            single.setdefault(max(size, ALIKE.bit_length()), []).append((first_row, span))
        else:
            found.append(_chunk(span, first_row, block_size, window, device))
        first_row += span.rows
    return (*found, *(_decoding(alike, block_size, window, device) for alike in single.values()))


def _seen(span: Span, block_size: int, window: int | None) -> tuple[tuple[int, ...], int]:
    """The blocks with keys that some row of ``span`` sees, and the position of the first of these keys."""
    first = 0 if window is None else max(span.start - window + 1, 0) // block_size
    return span.blocks[first : -(-span.length // block_size)], first * block_size


def _chunk(span: Span, first_row: int, block_size: int, window: int | None, device: torch.device) -> Group:
    blocks, first = _seen(span, block_size, window)
    length = span.length - first
    rows = slice(first_row, first_row + span.rows)
    if span.start == 0 and (window is None or window >= length):
        return Group(rows, 1, span.rows, _located([blocks], device), length, None, causal=True)
    position_Q1 = torch.arange(span.start, span.length, device=device)[:, None]
    key_L = torch.arange(first, span.length, device=device)
    mask_QL = key_L <= position_Q1
    if window is not None:
        mask_QL &= key_L > position_Q1 - window
    return Group(rows, 1, span.rows, _located([blocks], device), length, mask_QL)


def _decoding(single: Sequence[tuple[int, Span]], block_size: int, window: int | None, device: torch.device) -> Group:
    """All sequences that have one row, with as many keys as the longest of them has."""
    tables, ends, begins = [], [], []
    for _, span in single:
        blocks, first = _seen(span, block_size, window)
        tables.append(blocks)
        ends.append(span.length - first)
        begins.append(0 if window is None else max(span.length - window - first, 0))
    rows = [row for row, _ in single]
    wide, length = max(map(len, tables)), max(ends)
    keys = _located([table + (0,) * (wide - len(table)) for table in tables], device)
    mask = None
    if device.type == "cuda":
        length = wide * block_size
    if min(ends) < length or any(begins):
        key_L = torch.arange(length, device=device)
        ends_B1, begins_B1 = torch.tensor([ends, begins], device=device)[..., None]
        mask = ((key_L < ends_B1) & (key_L >= begins_B1))[:, None, None]
    return Group(_rows(rows, device), len(rows), 1, keys, length, mask)


def _rows(rows: list[int], device: torch.device) -> slice | Tensor:
    if rows[-1] - rows[0] == len(rows) - 1:
        return slice(rows[0], rows[-1] + 1)
    return torch.tensor(rows, device=device)


def _located(tables: Sequence[tuple[int, ...]], device: torch.device) -> slice | Tensor:
    """A view where one sequence's blocks follow each other on the CPU, which saves the copy; else a table."""
    first = tables[0]
    if len(tables) == 1 and device.type == "cpu" and first == tuple(range(first[0], first[0] + len(first))):
        return slice(first[0], first[0] + len(first))
    return torch.tensor(tables, device=device)


def padded_blocks(spans: Sequence[Span], size: int) -> int:
    """Room for the longest, in blocks: a power of two, so that decode steps come in few shapes."""
    needed = max(-(-span.length // size) for span in spans)
    return max(_LEAST_BLOCKS, 1 << (needed - 1).bit_length())


_LEAST_BLOCKS = 16
