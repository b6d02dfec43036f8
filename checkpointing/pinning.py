"""Pinning an arena's slots for a GPU's copy engines, each as a whole and once.

Registering costs about 0.04 s per GiB of mapped pages (docs/measurements.md), all in the kernel, and more if they are
not mapped. So a recovery pins what it reads first, and the rest later, beside the first step.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from checkpointing.keeper.memory import map_pages
from checkpointing.keeper.protocol import KeeperError
from checkpointing.slots import Arena

_ALLOW = (
    "allow this process to lock that much memory (ulimit -l, or the container's memlock), or set "
    "checkpoint.memory.enabled: false"
)


class Pinning:
    """Which slots of an arena are registered. Thread-safe; without CUDA it does nothing.

    Raises KeeperError if CUDA refuses.
    """

    def __init__(self, arena: Arena, device: torch.device | None) -> None:
        self._arena = arena
        self._device = device
        self._base = torch.frombuffer(arena.memory, dtype=torch.uint8).data_ptr()
        self._pinned: set[int] = set()
        self._turn = threading.Condition()  # who holds it may register
        self._pauses = 0
        self._closed = False
        self._rest: threading.Thread | None = None

    @property
    def needed(self) -> bool:
        """Whether anything is pinned at all: there is a device."""
        return self._device is not None

    def pin(self, slot: int, giving_way: bool = False) -> None:
        """Register a slot unless it is. ``giving_way``: not while others have :meth:`paused` that."""
        if self._device is None:
            return
        with self._turn:
            if giving_way:
                self._turn.wait_for(lambda: not self._pauses or self._closed)
            if slot not in self._pinned and not self._closed:
                self._register(slot)

    def _register(self, slot: int) -> None:
        place = self._arena.places[slot]
        with torch.cuda.device(self._device):
            status = torch.cuda.cudart().cudaHostRegister(self._base + place.offset, place.nbytes, 0)
        _check(status, f"slot {slot} of {place.nbytes:,} bytes: cudaHostRegister", _ALLOW)
        self._pinned.add(slot)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """For whoever calls the driver often: each call would wait until a slot is registered."""
        # At once, or the next slot would be begun before this thread has its turn; only one thread ever pauses.
        self._pauses += 1
        try:
            with self._turn:
                pass
            yield
        finally:
            with self._turn:
                self._pauses -= 1
                self._turn.notify_all()

    def pin_rest(self) -> None:
        """Register all other slots on a thread of their own."""
        if self._device is not None:
            self._rest = threading.Thread(target=self._pin_all, name="pinning", daemon=True)
            self._rest.start()

    def _pin_all(self) -> None:
        for slot, place in enumerate(self._arena.places):
            if self._closed:
                return
            if slot not in self._pinned:
                map_pages(self._base + place.offset, place.nbytes)  # keeps the driver, and others in it, for less long
                try:
                    self.pin(slot)
                except KeeperError:
                    return  # told to the capture that needs the slot

    def close(self) -> None:
        """Unregister everything: before the memory is unmapped."""
        with self._turn:
            self._closed = True
            self._turn.notify_all()
            for slot in sorted(self._pinned):
                status = torch.cuda.cudart().cudaHostUnregister(self._base + self._arena.places[slot].offset)
                _check(status, "cudaHostUnregister", "start again")
            self._pinned.clear()
        if self._rest is not None:
            self._rest.join()


def _check(status: object, what: str, advice: str) -> None:
    code = int(status)  # type: ignore[call-overload]
    if code:
        raise KeeperError(f"{what} failed with CUDA error {code}; {advice}")
