"""Numbers of the device on their way to the host, while the device goes on.

A copy in the training stream waits until the copy engine is free, which moves a capture's bytes to the same host, and
everything queued behind it waits, too: 10 ms for a large piece. A stream of their own keeps that from the step.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor


class Readback:
    """Begins to copy ``source`` as the current stream leaves it; nobody need keep it. On a CPU it is there already."""

    def __init__(self, source: Tensor) -> None:
        self._known: torch.cuda.Event | None = None
        self._numbers = source
        if source.is_cuda:
            stream = _stream(source.device)
            stream.wait_stream(torch.cuda.current_stream(source.device))
            self._numbers = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
            self._known = torch.cuda.Event(blocking=True)
            with torch.cuda.stream(stream):
                self._numbers.copy_(source, non_blocking=True)
                self._known.record(stream)
            source.record_stream(stream)

    def read(self) -> Tensor:
        """The numbers in host memory; waits for them."""
        if self._known is not None:
            self._known.synchronize()
        return self._numbers


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
