"""Ranges of training state, and interval arithmetic on them.

A *unit* is one tensor of one expert, or one whole parameter; a *kind* is what is kept of it (``master``, ``exp_avg``).
A :class:`Range` is some of its elements, half open. Nothing here knows about ranks or about torch.

>>> str(Range("L03.E017.down_proj", "exp_avg", 0, 4096))
'L03.E017.down_proj#exp_avg[0:4096)'
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from moe.refs import ExpertRef

_RANGE = re.compile(r"([^#]+)#([A-Za-z_]\w*)\[(\d+):(\d+)\)")

Key = tuple[str, str]


@dataclass(frozen=True, order=True, slots=True)
class Range:
    """Elements ``[lo:hi)`` of one kind of state of one unit."""

    unit: str
    kind: str
    lo: int
    hi: int

    def __post_init__(self) -> None:
        if not 0 <= self.lo <= self.hi:
            raise ValueError(f"range {self}: bounds must satisfy 0 <= lo <= hi")

    def __str__(self) -> str:
        return f"{self.unit}#{self.kind}[{self.lo}:{self.hi})"

    @property
    def key(self) -> Key:
        return self.unit, self.kind

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.hi - self.lo

    @classmethod
    def parse(cls, text: str) -> Range:
        """Inverse of ``str``. Raises ValueError for anything else."""
        match = _RANGE.fullmatch(text)
        if match is None:
            raise ValueError(f"not a state range: {text!r} (expected the form unit#kind[lo:hi))")
        return cls(match[1], match[2], int(match[3]), int(match[4]))


@lru_cache(maxsize=1 << 16)
def expert_of(unit: str) -> ExpertRef | None:
    """The expert that a unit is a tensor of, e.g. of ``L03.E017.down_proj``; None for what is no expert's."""
    try:
        return ExpertRef.parse(".".join(unit.split(".")[:2]))
    except ValueError:
        return None


def by_key(ranges: Iterable[Range]) -> dict[Key, list[tuple[int, int]]]:
    """The non-empty intervals of each (unit, kind), sorted."""
    grouped: dict[Key, list[tuple[int, int]]] = {}
    for r in ranges:
        if r.lo < r.hi:
            grouped.setdefault(r.key, []).append((r.lo, r.hi))
    for intervals in grouped.values():
        intervals.sort()
    return grouped


def uncovered(needed: Iterable[Range], have: Iterable[Range]) -> list[Range]:
    """The parts of ``needed`` that no range of ``have`` covers: sorted, disjoint, as long as possible."""
    held = by_key(have)
    missing: list[Range] = []
    for (unit, kind), intervals in sorted(by_key(needed).items()):
        for lo, hi in _merged(intervals):
            at = lo
            for held_lo, held_hi in held.get((unit, kind), ()):
                if held_hi <= at:
                    continue
                if held_lo >= hi:
                    break
                if held_lo > at:
                    missing.append(Range(unit, kind, at, held_lo))
                at = held_hi
            if at < hi:
                missing.append(Range(unit, kind, at, hi))
    return missing


def overlaps(ranges: Iterable[Range]) -> list[Range]:
    """The elements named more than once: sorted, disjoint, as long as possible."""
    twice: list[Range] = []
    for (unit, kind), intervals in sorted(by_key(ranges).items()):
        shared: list[tuple[int, int]] = []
        reached = -1
        for lo, hi in intervals:
            if lo < reached:
                shared.append((lo, min(hi, reached)))
            reached = max(reached, hi)
        twice += [Range(unit, kind, lo, hi) for lo, hi in _merged(shared)]
    return twice


def _merged(intervals: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for lo, hi in sorted(intervals):
        if merged and lo <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(hi, merged[-1][1]))
        else:
            merged.append((lo, hi))
    return merged
