"""Which samples share a row of S tokens. Pure.

Best fit decreasing: the longest sample first, each into the fullest row that has room for it. That takes at most 11/9
of the rows of the best packing, and a few (Johnson et al. 1974, "Worst-case performance bounds for simple
one-dimensional packing algorithms").
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence


def pack(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Rows of sample numbers, whose lengths add up to at most ``room``; each sample is in exactly one row.

    The same lengths give the same rows, in the order of their first samples. Samples of a row are in order.
    Raises ValueError for a sample that is empty or longer than a row.
    """
    if any(not 0 < length <= room for length in lengths):
        raise ValueError(f"samples must have 1 to {room} tokens")
    rows: list[list[int]] = []
    open_rows: dict[int, list[int]] = {}  # rows by what is left in them
    spaces: list[int] = []  # what is left in some row, sorted
    for sample in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[sample]
        at = bisect_left(spaces, length)
        if at == len(spaces):
            rows.append([sample])
            row, space = len(rows) - 1, room
        else:
            space = spaces[at]
            row = open_rows[space].pop()
            rows[row].append(sample)
            if not open_rows[space]:
                del open_rows[space]
                spaces.pop(at)
        left = space - length
        if left:
            if left not in open_rows:
                open_rows[left] = []
                insort(spaces, left)
            open_rows[left].append(row)
    return sorted(sorted(row) for row in rows)


def alone(lengths: Sequence[int]) -> list[list[int]]:
    """One row for each sample."""
    return [[sample] for sample in range(len(lengths))]
