"""Where things lie in a packed block (:mod:`inference.packed` has the format), in numbers. No torch here."""

from __future__ import annotations

from dataclasses import dataclass

GROUP = 32  # elements whose codes lie together
TILE = 4096  # elements with one entry in `first`
HEADER = 64  # bytes
_LINE = 64
_ELEMENTS_PER_EXCEPTION = 128  # at least, else a block is not packed


def whole_groups(*sizes: int) -> bool:
    """Whether rows of these sizes are groups, as they must be to be packed."""
    return all(size % GROUP == 0 for size in sizes)


@dataclass(frozen=True)
class PackedBlock:
    """Where things lie in a packed block of so many ``elements``; in bytes from its begin."""

    elements: int

    @property
    def small(self) -> int:
        return HEADER

    @property
    def codes(self) -> int:
        return self.small + self.elements

    @property
    def first(self) -> int:
        return self.codes + self.elements // 2

    @property
    def exceptions(self) -> int:
        return _whole_lines(self.first + 4 * (self.tiles + 1))

    @property
    def tiles(self) -> int:
        return -(-self.elements // TILE)

    @property
    def max_exceptions(self) -> int:
        return self.elements // _ELEMENTS_PER_EXCEPTION

    @property
    def stride(self) -> int:
        """From one block to the next in a bank."""
        return _whole_lines(self.used(self.max_exceptions))

    def used(self, exceptions: int) -> int:
        """Bytes of a block with so many exceptions; what is behind them need not travel."""
        return self.exceptions + 8 * exceptions


def _whole_lines(nbytes: int) -> int:
    return -(-nbytes // _LINE) * _LINE
