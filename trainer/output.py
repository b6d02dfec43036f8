"""What a run says may have no reader any more, as behind ``| head``; that is no reason to end it (no torch here)."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO


class LastingStream:
    """A stream that nothing can be written to any more is led to nowhere. The other one says so, once."""

    def __init__(self, stream: TextIO, name: str, other: TextIO) -> None:
        self._stream, self._name, self._other = stream, name, other

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._give_up(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)
        with contextlib.suppress(OSError):
            text = f"{self._name}: {error.strerror}; the run goes on without it, its events.jsonl has all figures"
            print(text, file=self._other, flush=True)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def lasting_output() -> Iterator[None]:
    """While entered, neither standard output nor standard error raises OSError."""
    out, err = sys.stdout, sys.stderr
    streams: Any = LastingStream(out, "standard output", err), LastingStream(err, "standard error", out)
    sys.stdout, sys.stderr = streams
    try:
        yield
    finally:
        for stream in streams:
            stream.flush()  # what is held back would fail in the hands of others
        sys.stdout, sys.stderr = out, err
