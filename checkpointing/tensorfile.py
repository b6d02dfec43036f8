"""One coordinate's state as a safetensors file: header first, then the payload streamed from memory, without padding.

Written and read here byte by byte, because NumPy has no bfloat16 and because the payload must not be copied on the way.
"""

from __future__ import annotations

import errno
import io
import json
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from xxhash import xxh3_64, xxh3_64_hexdigest, xxh3_128

from checkpointing.records import DTYPE_BYTES, Entry
from checkpointing.remote import UnreachableError
from checkpointing.storage import Place, make_durable
from checkpointing.units import Range

_NAMES = {
    "float64": "F64",
    "int64": "I64",
    "float32": "F32",
    "int32": "I32",
    "bfloat16": "BF16",
    "float16": "F16",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
_EXTRAS = "extras/"
_LARGEST = 8 << 20
_SMALLEST = 4 << 10


@dataclass(frozen=True)
class Written:
    """Size in bytes and XXH3-128 (hex) of a whole file; XXH3-64 of each tensor, 16 hex digits in the header's order."""

    nbytes: int
    xxh3_128: str
    tensors: str = ""


@dataclass(frozen=True)
class Section:
    """One record's worth of tensors: its table, the payload that the table's offsets point into, and the step it is of
    if that is not the file's own."""

    entries: Sequence[Entry]
    payload: memoryview
    step: int | None = None


@dataclass(frozen=True)
class Stored:
    """A tensor of a file: ``entry.offset`` counts from the file's start; ``step`` as in :class:`Section`."""

    entry: Entry
    step: int | None


def key_of(entry: Entry, step: int | None = None) -> str:
    if entry.range.kind == "extras":
        return _EXTRAS + entry.range.unit
    return str(entry.range) if step is None else f"{entry.range}@{step}"


def parse_key(key: str, nbytes: int) -> tuple[Range, int | None]:
    """Inverse of :func:`key_of`. Raises ValueError."""
    if key.startswith(_EXTRAS):
        return Range(key.removeprefix(_EXTRAS), "extras", 0, nbytes), None
    text, at, step = key.rpartition("@")
    return (Range.parse(text), int(step)) if at else (Range.parse(key), None)


def write_tensors(
    path: Place,
    sections: Sequence[Section],
    metadata: dict[str, str],
    advanced: Callable[[int], None],
) -> Written:
    """Write all sections' tensors and fsync. ``advanced(nbytes)`` is called after each piece."""
    pieces = [(entry, section) for section in sections for entry in section.entries]
    # The widest types first, so that every tensor is aligned; the sort is stable, so neighbours stay neighbours.
    pieces.sort(key=lambda piece: -DTYPE_BYTES[piece[0].dtype])
    header = _header(pieces, metadata)
    total = sum(entry.nbytes for entry, _ in pieces)
    step = min(max(total // 16, _SMALLEST), _LARGEST)
    digest = xxh3_128()
    with path.open("wb", buffering=0) as file:
        _write(file, memoryview(header), digest)
        for run in _runs(pieces):
            for at in range(0, len(run), step):
                chunk = run[at : at + step]
                _write(file, chunk, digest)
                advanced(len(chunk))
        make_durable(file)
    each = "".join(xxh3_64_hexdigest(s.payload[e.offset : e.offset + e.nbytes]) for e, s in pieces)
    return Written(len(header) + total, digest.hexdigest(), each)


def _header(pieces: Sequence[tuple[Entry, Section]], metadata: dict[str, str]) -> bytes:
    table: dict[str, object] = {"__metadata__": metadata}
    at = 0
    for entry, section in pieces:
        size = DTYPE_BYTES[entry.dtype]
        assert entry.nbytes == entry.range.size * size
        table[key_of(entry, section.step)] = {
            "dtype": _NAMES[entry.dtype],
            "shape": [entry.range.size],
            "data_offsets": [at, at + entry.nbytes],
        }
        at += entry.nbytes
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _runs(pieces: Sequence[tuple[Entry, Section]]) -> Iterator[memoryview]:
    """Neighbours in memory joined, so that thousands of small experts become a few writes."""
    start = stop = 0
    source: memoryview | None = None
    for entry, section in pieces:
        payload = section.payload
        if source is payload and entry.offset == stop:
            stop += entry.nbytes
            continue
        if source is not None and stop > start:
            yield source[start:stop]
        source, start, stop = payload, entry.offset, entry.offset + entry.nbytes
    if source is not None and stop > start:
        yield source[start:stop]


def _write(file: io.RawIOBase, data: memoryview, digest: xxh3_128) -> None:
    digest.update(data)
    while data:
        data = data[file.write(data) or 0 :]


def read_entries(path: Place) -> tuple[Stored, ...]:
    """All tensors of a file. Raises OSError or ValueError if it is damaged."""
    table, length = _read_header(path)
    found = []
    for key, tensor in table.items():
        if key != "__metadata__":
            start, stop = tensor["data_offsets"]
            named, step = parse_key(key, stop - start)
            found.append(Stored(Entry(named, _DTYPES[tensor["dtype"]], 8 + length + start, stop - start), step))
    return tuple(found)


def read_metadata(path: Place) -> dict[str, str]:
    """A file's free-form metadata. Raises OSError or ValueError if it is damaged."""
    return dict(_read_header(path)[0].get("__metadata__", {}))


def _read_header(path: Place) -> tuple[dict[str, Any], int]:
    """The header's table, and its length in bytes."""
    size = path.stat().st_size
    if size < 8:
        raise ValueError(f"{path}: {size} bytes are no tensor file")
    (length,) = struct.unpack("<Q", read_bytes(path, 0, 8))
    if 8 + length > size:
        raise ValueError(f"{path}: the header's length is larger than the file")
    return json.loads(bytes(read_bytes(path, 8, length))), length


def read_bytes(path: Place, offset: int, nbytes: int) -> bytearray:
    """Raises OSError if the file ends early."""
    data = bytearray(nbytes)
    view, done = memoryview(data), 0
    with path.open("rb", buffering=0) as file:
        file.seek(offset)
        while done < nbytes:
            count = file.readinto(view[done:])
            if not count:
                raise OSError(errno.EIO, f"the file ends at byte {offset + done:,}, too early", str(path))
            done += count
    return data


def checksum_file(path: Place) -> Written:
    digest, total = xxh3_128(), 0
    buffer = bytearray(_LARGEST)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(view):
            digest.update(view[:count])
            total += count
    return Written(total, digest.hexdigest())


def damaged_tensors(path: Place, expected: str) -> list[str]:
    """The tensors of a damaged file whose bytes are not those of ``expected`` (:attr:`Written.tensors`), if its header
    can still be read and says as many."""
    try:
        entries = read_entries(path)
        if len(expected) != 16 * len(entries):
            return []
        digests = [expected[at : at + 16] for at in range(0, len(expected), 16)]
        return [
            key_of(s.entry, s.step) for s, d in zip(entries, digests, strict=True) if _digest_of(path, s.entry) != d
        ]
    except UnreachableError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return ["the header"]


def _digest_of(path: Place, entry: Entry) -> str:
    digest = xxh3_64()
    for at in range(0, entry.nbytes, _LARGEST):
        digest.update(read_bytes(path, entry.offset + at, min(_LARGEST, entry.nbytes - at)))
    return digest.hexdigest()
