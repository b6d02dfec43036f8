"""The small state that is not weights or moments: random streams, as bytes that restore them exactly."""

from __future__ import annotations

import functools
import hashlib
import json
import random
from typing import Any

import numpy as np
import torch


def capture_rng() -> dict[str, bytes]:
    """The state of every generator a training step may draw from on this rank."""
    name, keys, *rest = np.random.get_state()
    extras = {
        "rng.torch": torch.get_rng_state().numpy().tobytes(),
        "rng.python": _python_stream(random.getstate()),
        "rng.numpy": _numpy_stream(name, keys.tobytes(), *rest),
    }
    if torch.cuda.is_available():
        extras["rng.cuda"] = torch.cuda.get_rng_state().numpy().tobytes()
    return extras


# Hardly any step draws from these two, and writing 625 numbers as text takes longer than all else in a capture's start.
@functools.lru_cache(maxsize=1)
def _python_stream(state: tuple[Any, ...]) -> bytes:
    return json.dumps(state).encode()


@functools.lru_cache(maxsize=1)
def _numpy_stream(name: str, keys: bytes, *rest: float) -> bytes:
    return json.dumps([name, np.frombuffer(keys, np.uint32).tolist(), *rest]).encode()


def restore_rng(extras: dict[str, bytes]) -> None:
    """Inverse of :func:`capture_rng`. A stream that is missing raises KeyError: silence would change the run."""
    torch.set_rng_state(torch.frombuffer(bytearray(extras["rng.torch"]), dtype=torch.uint8))
    version, words, gauss = json.loads(extras["rng.python"])
    random.setstate((version, tuple(words), gauss))
    np.random.set_state(tuple(json.loads(extras["rng.numpy"])))
    if torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.frombuffer(bytearray(extras["rng.cuda"]), dtype=torch.uint8))


def seed_streams(seed: int, purpose: str, coordinate: int) -> None:
    """Start this worker's streams, keyed by purpose and logical coordinate rather than by process."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{coordinate}".encode()).digest()
    mixed = int.from_bytes(digest[:8], "little") >> 1  # torch takes 63 bits
    torch.manual_seed(mixed)
    random.seed(mixed)
    np.random.seed(mixed % 2**32)
