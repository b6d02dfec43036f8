"""What stands for CUDA's driver where there is none."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager, nullcontext

import pytest
import torch

from checkpointing.pinning import Pinning
from checkpointing.slots import Arena


class Driver:
    """Stands for CUDA's registering. ``events`` are what happened in order: ("pin", slot), ("copy", step), ..."""

    def __init__(self) -> None:
        self.events: list[tuple[str, object]] = []
        self.registered: set[int] = set()
        self.refuses: set[int] = set()
        self.hold: dict[int, threading.Event | Until] = {}  # registering a slot waits for it
        self.base = 0
        self.begun = threading.Semaphore(0)
        self.slots: dict[int, int] = {}

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        slot = self.slots[address - self.base]
        self.begun.release()
        if slot in self.hold:
            assert self.hold[slot].wait(20)
        if slot in self.refuses:
            return 2
        assert address not in self.registered, "registered twice"
        self.registered.add(address)
        self.events.append(("pin", slot))
        return 0

    def note(self, what: str, of: object) -> None:
        self.events.append((what, of))

    def cudaHostUnregister(self, address: int) -> int:
        self.registered.remove(address)
        return 0


class Until:
    """An event that comes when the condition holds."""

    def __init__(self, condition) -> None:
        self._condition, self._over = condition, threading.Event()

    def set(self) -> None:
        self._over.set()

    def wait(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while not self._condition() and not self._over.wait(0.001) and time.monotonic() < deadline:
            pass
        return time.monotonic() < deadline


@contextmanager
def pinned(monkeypatch: pytest.MonkeyPatch):
    """Makes a Pinning of an arena, with a driver of its own; at the end all must be unregistered."""
    drivers = []

    def make(arena: Arena) -> tuple[Pinning, Driver]:
        driver = Driver()
        monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
        monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
        pinning = Pinning(arena, torch.device("cuda", 0))
        driver.base = pinning._base
        driver.slots = {place.offset: place.index for place in arena.places}
        drivers.append((pinning, driver))
        return pinning, driver

    yield make
    for pinning, driver in drivers:
        for hold in driver.hold.values():
            hold.set()
        pinning.close()
        assert not driver.registered, "a registration was leaked"
