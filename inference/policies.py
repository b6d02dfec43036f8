"""Which resident expert gives up its place when another one is needed.

No torch here: the same objects can replay a recorded trace.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Hashable
from typing import Protocol


class Policy(Protocol):
    """Decides evictions. Keys are opaque; the cache reports what happens to them."""

    def touch(self, key: Hashable) -> None:
        """``key`` was used, or has just become resident."""

    def victim(self, pinned: Collection[Hashable]) -> Hashable:
        """The key to evict next, never one of ``pinned``. Raises LookupError if every key is pinned."""

    def forget(self, key: Hashable) -> None:
        """``key`` is no longer resident."""


class LRU:
    """Evicts the key that was not touched for the longest time."""

    def __init__(self) -> None:
        self._order: OrderedDict[Hashable, None] = OrderedDict()

    def touch(self, key: Hashable) -> None:
        self._order[key] = None
        self._order.move_to_end(key)

    def victim(self, pinned: Collection[Hashable]) -> Hashable:
        for key in self._order:
            if key not in pinned:
                return key
        raise LookupError(f"all {len(self._order)} resident keys are pinned")

    def forget(self, key: Hashable) -> None:
        del self._order[key]
