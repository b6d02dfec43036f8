"""A second stream of a GPU, for what must not stand in the queue behind large kernels. On a CPU it is nothing.

Streams are torch's own, which are entered and waited for in C, not those of ``torch.cuda``, which do it in Python.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


@functools.cache
def _side_stream(device: torch.device) -> torch.Stream:
    return torch.Stream(device, priority=-1)


class Aside:
    """What is queued inside :meth:`queue` comes after what the current stream has as this is made, and after nothing
    else but what it says itself; :meth:`join` has the current stream wait for it."""

    def __init__(self, device: torch.device) -> None:
        self._stream = _side_stream(device) if device.type == "cuda" else None
        self._index = device.index
        if self._stream is not None:
            self._stream.wait_stream(torch.accelerator.current_stream(self._index))

    def queue(self) -> AbstractContextManager[object]:
        return nullcontext() if self._stream is None else self._stream

    def event(self) -> torch.Event | None:
        """What has happened when all that is queued so far is done; None if it is."""
        return None if self._stream is None else self._stream.record_event()

    def join(self, *made: Tensor) -> None:
        """From here on the current stream comes after all of it, and may use what was made there."""
        if self._stream is None:
            return
        current = torch.accelerator.current_stream(self._index)
        current.wait_stream(self._stream)
        for tensor in made:
            tensor.record_stream(current)
