"""What heads said while a trace was recorded, beside the trace: enough to replay policies and predictors that use them.

``TRACE.heads.npz`` holds each token's codes, R numbers a layer, and the maps that make log odds of them; so it stays
small and needs no model. Readable with numpy alone.

Shapes: T tokens, L MoE layers (by row), R rank, E experts; O = 2 * L * E.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from inference.foresight import HORIZONS
from moe.tracefile import TraceError

MAX_ROWS = 32  # up to so many rows of a call are taken for sequences that are decoded together


@dataclass(frozen=True)
class RecordedHeads:
    """Attributes:
    codes_TLR: fp16.
    outward_LRO, bias_LO: the heads' second maps.
    gate_TLE: fp16; scores that the next layer's gate gives this layer's input; the last layer's row is NaN.
    """

    codes_TLR: np.ndarray
    outward_LRO: np.ndarray
    bias_LO: np.ndarray
    gate_TLE: np.ndarray

    def ahead(self, tokens: slice, row: int) -> np.ndarray:
        """Log odds [2,L,E] of the call of layer ``row`` with these tokens, as `inference.heads.Heads.ahead` has it.

        But a trace does not say of many tokens whether they were decoded, so they are taken for a prompt.
        """
        codes_TR = self.codes_TLR[tokens, row].astype(np.float32)
        if len(codes_TR) > MAX_ROWS:
            codes_TR = codes_TR[-1:]
        z_TO = codes_TR @ self.outward_LRO[row] + self.bias_LO[row]
        z_O = z_TO[0]
        if len(z_TO) > 1:
            none_O = np.logaddexp(0, z_TO).sum(0)
            z_O = np.where(none_O > 30, none_O, np.log(np.expm1(np.clip(none_O, 1e-12, 30))))
        return np.asarray(z_O.reshape(len(HORIZONS), self.codes_TLR.shape[1], -1), dtype=np.float64)

    def tail(self, tokens: int) -> RecordedHeads:
        """Of the last ``tokens`` tokens alone."""
        cut = len(self.codes_TLR) - tokens
        return RecordedHeads(self.codes_TLR[cut:], self.outward_LRO, self.bias_LO, self.gate_TLE[cut:])

    def save(self, trace: str | Path) -> Path:
        """Beside ``trace``, which must be whole."""
        path = heads_file(trace)
        digest = np.frombuffer(hashlib.sha256(Path(trace).read_bytes()).digest(), np.uint8)
        np.savez(
            path,
            codes=self.codes_TLR,
            outward=self.outward_LRO,
            bias=self.bias_LO,
            gate=self.gate_TLE,
            trace=digest,
        )
        return path


class SpilledRows:
    """Rows [T,L,C] in fp16 that come layer by layer, in nameless files in ``folder`` until all are there.

    A recording may last as long as a server does: in memory it would grow for ever.
    """

    def __init__(self, folder: Path, layers: int) -> None:
        self._folder = folder
        self._files = [self._file() for _ in range(layers)]
        self._columns = 0

    def _file(self) -> Any:
        return tempfile.TemporaryFile(dir=self._folder)

    def add(self, row: int, rows_TC: np.ndarray) -> None:
        """Of the next tokens, in one layer."""
        self._columns = rows_TC.shape[1]
        self._files[row].write(rows_TC.astype(np.float16, copy=False).tobytes())

    def cut(self) -> None:
        """To what the last layer has: of a pass that failed halfway the first layers have more, and would run ahead."""
        end = self._files[-1].tell()
        for file in self._files:
            if file.tell() > end:
                file.seek(end)
                file.truncate()

    def whole(self) -> np.ndarray:
        """Of all tokens that every layer has, mapped into memory."""
        tokens = min(file.tell() for file in self._files) // max(2 * self._columns, 1)
        shape = (tokens, len(self._files), self._columns)
        if not tokens:
            return np.empty(shape, np.float16)
        with self._file() as file:
            os.posix_fallocate(file.fileno(), 0, 2 * math.prod(shape))  # a mapped page without room ends the process
            rows_TLC = np.memmap(file, np.float16, "w+", shape=shape)
        for row, file in enumerate(self._files):
            file.flush()
            rows_TLC[:, row] = np.memmap(file, np.float16, "r", shape=shape[::2])
        return rows_TLC

    def close(self) -> None:
        for file in self._files:
            with contextlib.suppress(OSError):  # of a full disk, for rows that nobody will read
                file.close()


def heads_file(trace: str | Path) -> Path:
    return Path(f"{trace}.heads.npz")


def read_heads(trace: str | Path) -> RecordedHeads | None:
    """What was recorded beside ``trace``; None if nothing was.

    Raises TraceError for a file that is damaged or belongs to another trace.
    """
    path = heads_file(trace)
    if not path.is_file():
        return None
    try:
        with np.load(path) as found:
            digest = found["trace"].tobytes()
            heads = RecordedHeads(found["codes"], found["outward"], found["bias"], found["gate"])
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise TraceError(f"{path}: not what heads said of a trace ({error}); remove it or record again") from error
    if digest != hashlib.sha256(Path(trace).read_bytes()).digest():
        raise TraceError(f"{path} was not recorded with {trace}: remove it, or record both again")
    return heads
