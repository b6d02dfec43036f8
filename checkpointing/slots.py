"""The arena: one piece of shared memory per worker, cut into slots that hold records.

Base slots come first, then log slots, then extras. The shape is a value, so that the keeper and the worker agree on it
without a superblock.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass

from checkpointing.records import PAGE, Kind, whole_pages

EXTRAS_BYTES = 256 << 10


@dataclass(frozen=True)
class SlotPlace:
    """Where a slot lies: bytes from the arena's start."""

    index: int
    kind: Kind
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Pool:
    """``count`` slots of one kind, with room for the largest table and payload (bytes) of their records."""

    count: int
    table_bytes: int
    payload_bytes: int

    @property
    def payload_offset(self) -> int:
        """Where the payload starts in a slot: the same page in every record of one layout."""
        return PAGE + whole_pages(self.table_bytes)

    @property
    def slot_bytes(self) -> int:
        return self.payload_offset + whole_pages(self.payload_bytes)


@dataclass(frozen=True)
class ArenaShape:
    """The pools of base and log records, and how many slots there are for extras."""

    base: Pool
    log: Pool
    extras: int

    @property
    def nbytes(self) -> int:
        return sum(count * size for _, count, size in self._pools())

    def _pools(self) -> list[tuple[Kind, int, int]]:
        return [
            (Kind.BASE, self.base.count, self.base.slot_bytes),
            (Kind.LOG, self.log.count, self.log.slot_bytes),
            (Kind.EXTRAS, self.extras, EXTRAS_BYTES),
        ]

    def slots(self) -> tuple[SlotPlace, ...]:
        places: list[SlotPlace] = []
        at = 0
        for kind, count, size in self._pools():
            for _ in range(count):
                places.append(SlotPlace(len(places), kind, at, size))
                at += size
        return tuple(places)

    def as_list(self) -> list[Sequence[int]]:
        """For JSON; :meth:`from_list` is its inverse."""
        pools = [[p.count, p.table_bytes, p.payload_bytes] for p in (self.base, self.log)]
        return [*pools, [self.extras]]

    @classmethod
    def from_list(cls, values: Sequence[Sequence[int]]) -> ArenaShape:
        return cls(Pool(*values[0]), Pool(*values[1]), values[2][0])

    def __str__(self) -> str:
        return (
            f"{self.base.count} x {self.base.slot_bytes:,} bytes of state, {self.log.count} x "
            f"{self.log.slot_bytes:,} of log, {self.extras} of extras"
        )


class Arena:
    """A mapping of an arena's memory. Owns ``fd``."""

    def __init__(self, fd: int, shape: ArenaShape, populate: bool = False) -> None:
        size = os.fstat(fd).st_size
        if size < shape.nbytes:
            raise ValueError(f"the arena has {size:,} bytes, its shape needs {shape.nbytes:,}")
        self.fd = fd
        self.shape = shape
        # Mapping every page here keeps page faults out of the copies.
        flags = mmap.MAP_SHARED | (mmap.MAP_POPULATE if populate else 0)
        self._map = mmap.mmap(fd, shape.nbytes, flags=flags)
        self.memory = memoryview(self._map)
        self.places = shape.slots()
        self.slots = [self.memory[p.offset : p.offset + p.nbytes] for p in self.places]

    def close(self) -> None:
        """Unmap. Views that callers still hold keep the mapping itself alive until they go."""
        for view in [*self.slots, self.memory]:
            with contextlib.suppress(BufferError):
                view.release()
        with contextlib.suppress(BufferError):
            self._map.close()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
