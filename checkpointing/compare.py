"""What differs between two checkpoints, element by element, whatever layouts wrote them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from checkpointing.recovery import RecoveryError
from checkpointing.store import Checkpoint
from checkpointing.units import Range, overlaps

_PIECE = 4 << 20  # elements compared at once


@dataclass(frozen=True)
class Piece:
    """Elements ``[lo:hi)`` of one kind of state, and the stored range of each side that holds them all, or None."""

    lo: int
    hi: int
    ours: Range | None
    theirs: Range | None


@dataclass(frozen=True)
class Difference:
    """How one kind of state of one unit differs.

    Attributes:
        name: ``UNIT#KIND``, or ``COORDINATE/NAME`` for an extras blob.
        elements: how many could be compared.
        different: how many of them differ in their bits.
        largest: the greatest absolute difference; inf where only one side is a number.
        notes: what could not be compared, in words.
    """

    name: str
    elements: int
    different: int = 0
    largest: float = 0.0
    notes: tuple[str, ...] = ()

    @property
    def equal(self) -> bool:
        return not self.different and not self.notes


def overlay(ours: Sequence[Range], theirs: Sequence[Range]) -> list[Piece]:
    """Cut both sides' ranges of one kind of one unit at each other's bounds: sorted, gaps of both left out.

    The ranges of a side must be disjoint.
    """
    ours, theirs = sorted(r for r in ours if r.size), sorted(r for r in theirs if r.size)
    bounds = sorted({at for r in (*ours, *theirs) for at in (r.lo, r.hi)})
    pieces = [Piece(lo, hi, _holding(ours, lo), _holding(theirs, lo)) for lo, hi in pairwise(bounds)]
    return [piece for piece in pieces if piece.ours or piece.theirs]


def _holding(ranges: Sequence[Range], at: int) -> Range | None:
    index = bisect_right(ranges, at, key=lambda r: r.lo) - 1
    return ranges[index] if index >= 0 and ranges[index].hi > at else None


def compare(ours: Checkpoint, theirs: Checkpoint) -> Iterator[Difference]:
    """Every kind of state of every unit, sorted by name, then the extras if both have the same workers.

    Raises RecoveryError for a checkpoint that is a window of the log, or that holds something twice.
    """
    for checkpoint in (ours, theirs):
        if checkpoint.has_log:
            raise RecoveryError(f"{checkpoint.path} is a window of the log; make it whole first")
        twice = overlaps(checkpoint.entries)
        if twice:
            raise RecoveryError(f"{checkpoint.path} holds {twice[0]} twice; compare another step")
    left, right = _by_key(ours), _by_key(theirs)
    for key in sorted(left.keys() | right.keys()):
        yield _compare_unit(f"{key[0]}#{key[1]}", ours, theirs, overlay(left.get(key, ()), right.get(key, ())))
    if ours.manifest["coordinates"] == theirs.manifest["coordinates"]:
        for coordinate in ours.manifest["coordinates"]:
            yield from _compare_extras(coordinate, ours.extras(coordinate), theirs.extras(coordinate))


def _by_key(checkpoint: Checkpoint) -> dict[tuple[str, str], list[Range]]:
    grouped: dict[tuple[str, str], list[Range]] = {}
    for held in checkpoint.entries:
        grouped.setdefault(held.key, []).append(held)
    return grouped


def _compare_unit(name: str, ours: Checkpoint, theirs: Checkpoint, pieces: Sequence[Piece]) -> Difference:
    elements = different = 0
    largest, notes = 0.0, []
    for side, checkpoint in (("ours", ours), ("theirs", theirs)):
        gaps = [f"[{p.lo}:{p.hi})" for p in pieces if getattr(p, side) is None]
        if len(gaps) == len(pieces):
            notes.append(f"absent from {checkpoint.path}")
        elif gaps:
            notes.append(f"{', '.join(gaps[:3])}{' and more' if len(gaps) > 3 else ''} absent from {checkpoint.path}")
    for piece in pieces:
        if piece.ours is None or piece.theirs is None:
            continue
        dtypes = ours.dtype_of(piece.ours), theirs.dtype_of(piece.theirs)
        if dtypes[0] != dtypes[1] and f"{dtypes[0]} and {dtypes[1]}" not in notes:
            notes.append(f"{dtypes[0]} and {dtypes[1]}")
        elements += piece.hi - piece.lo
        for lo in range(piece.lo, piece.hi, _PIECE):
            hi = min(lo + _PIECE, piece.hi)
            count, most = _distance(
                ours.read_part(piece.ours, lo, hi), dtypes[0], theirs.read_part(piece.theirs, lo, hi), dtypes[1]
            )
            different, largest = different + count, max(largest, most)
    return Difference(name, elements, different, largest, tuple(notes))


def _distance(a: np.ndarray, a_dtype: str, b: np.ndarray, b_dtype: str) -> tuple[int, float]:
    """How many elements differ, and by how much at most."""
    if a_dtype == b_dtype and a.tobytes() == b.tobytes():
        return 0, 0.0
    x, y = _numbers(a, a_dtype), _numbers(b, b_dtype)
    same = x == y
    if a_dtype == b_dtype:
        bits = f"u{a.dtype.itemsize}"
        same = a.view(bits) == b.view(bits)
    with np.errstate(invalid="ignore"):
        apart = np.where(same, 0.0, np.abs(x - y))
    return int(np.count_nonzero(~same)), float(np.nan_to_num(apart, nan=np.inf, posinf=np.inf).max())


def _numbers(stored: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "bfloat16":
        stored = (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float64)


def _compare_extras(coordinate: str, ours: dict[str, bytes], theirs: dict[str, bytes]) -> Iterator[Difference]:
    for name in sorted(ours.keys() | theirs.keys()):
        a, b = ours.get(name), theirs.get(name)
        notes = () if a == b else ("absent from one side",) if a is None or b is None else ("other bytes",)
        yield Difference(f"{coordinate}/{name}", len(a or b or b""), notes=notes)
