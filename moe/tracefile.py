"""Recorded routing on disk: one file for each rank, appended to, readable with numpy alone.

All integers are little-endian. A file is a header and records:

    header   8 bytes   b"PLNTRACE"
             u32       version, 1
             u32       n, the length of what follows
             n bytes   JSON: model, layers, num_experts, top_k, rank, world, weights (whether records carry them),
                       source (files that lack it are of training)
             u32       CRC-32 of all of the above
    record   4 bytes   b"ROUT"
             u64       optimizer step
             u32 x 4   micro-batch, layer, tokens T, bytes of one index (2 or 4)
             u32       CRC-32 of the 28 bytes above
             T*K*size  indices [T,K], int16 or int32, as the gate chose them: also those that capacity dropped
             T*K*4     weights [T,K], float32, if the header says so
             u32       CRC-32 of indices and weights

A worker that is killed may leave half a record at the end: it is dropped, and cut off before the next is appended.
Anything else that does not check is refused. A step that was run again after a recovery is there twice: the later one
counts.

Shapes: T tokens, K choices per token.
"""

from __future__ import annotations

import dataclasses
import json
import os
import struct
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

VERSION = 1
_MAGIC, _RECORD = b"PLNTRACE", b"ROUT"
_HEAD = struct.Struct("<4sQIIII")
_U32 = struct.Struct("<I")


class TraceError(ValueError):
    """A trace cannot be read, or is not one of this model."""


@dataclass(frozen=True)
class TraceHeader:
    """What was recorded. ``model`` is the family's name, ``world`` the number of ranks, each with its own file.

    ``source`` says what a record's step and micro-batch are. ``training``: those. ``text``: a sequence that a trained
    model read in one pass, and 0. ``serving``: a sequence, and the pass of it, whose tokens were one call.
    """

    model: str
    layers: tuple[int, ...]
    num_experts: int
    top_k: int
    rank: int = 0
    world: int = 1
    weights: bool = False
    source: str = "training"

    def dump(self) -> bytes:
        text = json.dumps(dataclasses.asdict(self), sort_keys=True).encode()
        blob = _MAGIC + _U32.pack(VERSION) + _U32.pack(len(text)) + text
        return blob + _U32.pack(zlib.crc32(blob))


@dataclass(frozen=True)
class TraceRecord:
    """One layer of one forward pass on one rank. ``weights_TK`` is None where they were not recorded."""

    step: int
    micro: int
    layer: int
    index_TK: np.ndarray
    weights_TK: np.ndarray | None = None

    def dump(self, header: TraceHeader) -> bytes:
        """Raises TraceError for a record that does not fit the header."""
        num_tokens, top_k = self.index_TK.shape
        if top_k != header.top_k or self.layer not in header.layers or (self.weights_TK is None) == header.weights:
            raise TraceError(
                f"layer {self.layer} routed [{num_tokens},{top_k}], which does not fit the trace's header {header}; "
                "write it to another file"
            )
        size = 2 if header.num_experts < 2**15 else 4
        head = _HEAD.pack(_RECORD, self.step, self.micro, self.layer, num_tokens, size)
        body = np.ascontiguousarray(self.index_TK, dtype=f"<i{size}").tobytes()
        if self.weights_TK is not None:
            body += np.ascontiguousarray(self.weights_TK, dtype="<f4").tobytes()
        return head + _U32.pack(zlib.crc32(head)) + body + _U32.pack(zlib.crc32(body))


def trace_file(folder: str | os.PathLike[str], rank: int) -> Path:
    """Where ``rank``'s trace lies in a trace folder."""
    return Path(folder) / f"rank-{rank:04d}.trace"


class TraceWriter:
    """Appends to a trace, which is begun if it is not there.

    Raises TraceError if the file is broken or was recorded of another model or layout.
    """

    def __init__(self, path: str | os.PathLike[str], header: TraceHeader) -> None:
        self.path, self.header = Path(path), header
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("ab", buffering=0)
        if self.path.stat().st_size:
            trace = Trace(self.path)
            if trace.header != header:
                raise TraceError(
                    f"{self.path} is a trace of {trace.header}, this run is {header}; remove it or give log.run=NAME"
                )
            self._file.truncate(trace.end)
        else:
            self._append(header.dump())

    def write(self, record: TraceRecord) -> None:
        """Raises OSError if there is no room for all of it; the file then ends with the record before."""
        self._append(record.dump(self.header))

    def _append(self, blob: bytes) -> None:
        # At once to the kernel: what was written survives the death of this process.
        end, left = self._file.seek(0, os.SEEK_END), memoryview(blob)
        try:
            while len(left):
                left = left[self._file.write(left) :]
        except OSError:
            self._file.truncate(end)
            raise

    def close(self) -> None:
        self._file.close()


class Trace:
    """A trace opened for reading: checked from end to end, its records found by step, micro-batch and layer.

    Attributes:
        end: where the last whole record ends.
        keys: (step, micro-batch, layer) of every record, in the order of the file.

    Raises TraceError, saying where, if it is not a whole trace up to its last record.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            size = self.path.stat().st_size
            self._bytes = np.memmap(self.path, np.uint8, "r") if size else np.zeros(0, np.uint8)
        except OSError as error:
            raise TraceError(f"{self.path}: {error.strerror}; give the path of a recorded trace") from None
        self.header, start = self._read_header()
        self._at: dict[tuple[int, int, int], int] = {}
        self.end = start
        while self.end < size:
            after = self._check(self.end)
            if after is None:
                print(
                    f"{self.path}: the last {size - self.end} bytes, from byte {self.end}, are a record that was "
                    "cut short and is left out",
                    file=sys.stderr,
                )
                break
            self.end = after

    @property
    def keys(self) -> tuple[tuple[int, int, int], ...]:
        return tuple(self._at)

    def record(self, step: int, micro: int, layer: int) -> TraceRecord | None:
        """The record of one layer's forward pass, None if there is none."""
        offset = self._at.get((step, micro, layer))
        if offset is None:
            return None
        *_, num_tokens, size = _HEAD.unpack(self._slice(offset, _HEAD.size))
        start, pairs = offset + _HEAD.size + _U32.size, num_tokens * self.header.top_k
        shape = (num_tokens, self.header.top_k)
        index_TK = np.frombuffer(self._slice(start, pairs * size), f"<i{size}").reshape(shape)
        weights_TK = None
        if self.header.weights:
            weights_TK = np.frombuffer(self._slice(start + pairs * size, pairs * 4), "<f4").reshape(shape)
        return TraceRecord(step, micro, layer, index_TK, weights_TK)

    def _slice(self, start: int, length: int) -> bytes:
        return self._bytes[start : start + length].tobytes()

    def _read_header(self) -> tuple[TraceHeader, int]:
        if self._slice(0, 8) != _MAGIC:
            raise TraceError(f"{self.path} is not a routing trace: it does not begin with {_MAGIC.decode()}")
        fixed = self._slice(8, 8)
        if len(fixed) < 8:
            raise TraceError(f"{self.path}: its header was cut short; remove it and record again")
        version, length = struct.unpack("<II", fixed)
        if version != VERSION:
            raise TraceError(f"{self.path} is a trace of version {version}, this program reads {VERSION}; record again")
        blob, check = self._slice(0, 16 + length), self._slice(16 + length, 4)
        if len(check) < 4 or _U32.unpack(check)[0] != zlib.crc32(blob):
            raise TraceError(f"{self.path}: its header is damaged; remove it and record again")
        fields = json.loads(blob[16:])
        return TraceHeader(**{**fields, "layers": tuple(fields["layers"])}), 16 + length + 4

    def _check(self, offset: int) -> int | None:
        """Note the record at ``offset``; where it ends, or None if the file ends before."""
        head = self._slice(offset, _HEAD.size + _U32.size)
        if len(head) < _HEAD.size + _U32.size:
            if not _RECORD.startswith(head[:4]):
                raise self._broken(offset, "does not begin as records do")
            return None
        magic, step, micro, layer, num_tokens, size = _HEAD.unpack(head[: _HEAD.size])
        if magic != _RECORD or _U32.unpack(head[_HEAD.size :])[0] != zlib.crc32(head[: _HEAD.size]):
            raise self._broken(offset, "has a damaged head")
        length = num_tokens * self.header.top_k * (size + 4 * self.header.weights)
        body = self._slice(offset + len(head), length)
        check = self._slice(offset + len(head) + length, _U32.size)
        if len(check) < _U32.size:
            return None
        if _U32.unpack(check)[0] != zlib.crc32(body):
            raise self._broken(offset, f"(step {step}, micro-batch {micro}, layer {layer}) does not match its checksum")
        self._at[step, micro, layer] = offset
        return offset + len(head) + int(length) + _U32.size

    def _broken(self, offset: int, what: str) -> TraceError:
        return TraceError(f"{self.path}: the record at byte {offset} {what}; the trace is damaged, record again")


def read_trace(path: str | os.PathLike[str]) -> Iterator[TraceRecord]:
    """The records of one rank's trace file, in the order they were routed. Raises TraceError."""
    trace = Trace(path)
    for key in trace.keys:
        record = trace.record(*key)
        assert record is not None
        yield record
