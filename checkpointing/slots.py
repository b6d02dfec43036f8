"""The arena: one piece of shared memory per worker, cut into slots that hold records.

Base slots come first, then as many slots for extras. The shape is a pure function of three numbers, so that the keeper
and the worker agree on it without a superblock.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from dataclasses import asdict, dataclass

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
class ArenaShape:
    """Bytes of the largest base table and payload, and how many base slots there are."""

    table_bytes: int
    payload_bytes: int
    generations: int

    @property
    def payload_offset(self) -> int:
        """Where the payload starts in a base slot: the same page in every record of one layout."""
        return PAGE + whole_pages(self.table_bytes)

    @property
    def base_bytes(self) -> int:
        return self.payload_offset + whole_pages(self.payload_bytes)

    @property
    def nbytes(self) -> int:
        return self.generations * (self.base_bytes + EXTRAS_BYTES)

    def slots(self) -> tuple[SlotPlace, ...]:
        bases = [SlotPlace(i, Kind.BASE, i * self.base_bytes, self.base_bytes) for i in range(self.generations)]
        first = self.generations * self.base_bytes
        extras = [
            SlotPlace(self.generations + i, Kind.EXTRAS, first + i * EXTRAS_BYTES, EXTRAS_BYTES)
            for i in range(self.generations)
        ]
        return (*bases, *extras)

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


class Arena:
    """A mapping of an arena's memory. Owns ``fd``."""

    def __init__(self, fd: int, shape: ArenaShape, populate: bool = False) -> None:
        size = os.fstat(fd).st_size
        if size < shape.nbytes:
            raise ValueError(f"the arena has {size:,} bytes, its shape needs {shape.nbytes:,}")
        self.fd = fd
        self.shape = shape
        # Touching every page here keeps page faults out of the copies.
        flags = mmap.MAP_SHARED | (mmap.MAP_POPULATE if populate else 0)
        self._map = mmap.mmap(fd, shape.nbytes, flags=flags)
        self.memory = memoryview(self._map)
        self.slots = [self.memory[p.offset : p.offset + p.nbytes] for p in shape.slots()]

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
