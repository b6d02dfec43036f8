"""The binary record that a memory slot holds.

    page 0            header: what it is, how long, checksum, and the state word
    page 1 ...        table: a JSON line of the parts it holds, then one row [range, dtype, payload offset, bytes]
                      for each range
    next whole page   payload: bytes of state; bytes that no row names are padding

The state word is written last. A reader accepts only SEALED with a matching checksum. The checksum is a two-level
XXH3-128: the header's own fields, then the digests of all 4 MiB chunks of table and payload, so that chunks can be
hashed in parallel, and by a GPU that still has their bytes.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from enum import IntEnum

from xxhash import xxh3_128_digest

from checkpointing.units import Range
from checkpointing.xxh3 import DIGEST

PAGE = 4096
VERSION = 2
_MAGIC = b"PLANREC\x01"
# magic, version, kind, attempt, reserved, step, sequence, table length, payload offset, payload length
_FIELDS = struct.Struct("<8sIIIIqQQQQ")
_CHECKSUM = slice(_FIELDS.size, _FIELDS.size + 16)
_STATE = struct.Struct("<Q")
_STATE_AT = _CHECKSUM.stop
CHUNK = 4 << 20
_TOGETHER = 16  # chunks that one task of a pool hashes

DTYPE_BYTES = {
    "float64": 8,
    "int64": 8,
    "float32": 4,
    "int32": 4,
    "bfloat16": 2,
    "float16": 2,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}


class RecordError(RuntimeError):
    """Bytes that should be a record are not, or not what their checksum says."""


class State(IntEnum):
    """Who may touch a slot. Zeroes are FREE; the others differ in many bits, so that no single flip seals a slot."""

    FREE = 0
    WRITING = 0x9D3A_51C7_0000_0001
    COPIED = 0x6B55_A2F1_0000_0002
    SEALED = 0xE4C9_7E18_0000_0003
    QUARANTINED = 0x1F87_C83D_0000_0004


class Kind(IntEnum):
    BASE = 1
    LOG = 2
    EXTRAS = 3


@dataclass(frozen=True, slots=True)
class Entry:
    """One range in a payload: ``offset`` and ``nbytes`` in bytes, ``dtype`` as torch spells it (``bfloat16``)."""

    range: Range
    dtype: str
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Table:
    """What a record holds. ``parts`` are the numbers by which a schedule calls pieces of a worker's state."""

    entries: tuple[Entry, ...]
    parts: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class RecordInfo:
    """A record that was found sealed and whole: what it holds, and its place (``source`` is a coordinate)."""

    source: str
    kind: Kind
    step: int
    attempt: int
    sequence: int
    entries: tuple[Entry, ...]
    slot: int = -1


@dataclass(frozen=True)
class Header:
    kind: Kind
    step: int
    attempt: int
    sequence: int
    table_bytes: int
    payload_offset: int
    payload_bytes: int


def whole_pages(nbytes: int) -> int:
    return -(-nbytes // PAGE) * PAGE


def encode_table(entries: Iterable[Entry], parts: Sequence[int] = (0,)) -> bytes:
    rows = [[str(e.range), e.dtype, e.offset, e.nbytes] for e in entries]
    return json.dumps(list(parts)).encode() + b"\n" + json.dumps(rows, separators=(",", ":")).encode()


def decode_table(table: bytes) -> Table:
    parts, _, rows = table.partition(b"\n")
    entries = tuple(Entry(Range.parse(text), dtype, offset, nbytes) for text, dtype, offset, nbytes in json.loads(rows))
    return Table(entries, tuple(json.loads(parts)))


def state_of(record: memoryview) -> State:
    """The state word; a word that was never valid reads as QUARANTINED."""
    (word,) = _STATE.unpack_from(record, _STATE_AT)
    try:
        return State(word)
    except ValueError:
        return State.QUARANTINED


def set_state(record: memoryview, state: State) -> None:
    _STATE.pack_into(record, _STATE_AT, state)


def begin(record: memoryview) -> None:
    """Take a slot for writing: from here on nothing of its former content can pass for a record."""
    set_state(record, State.WRITING)
    record[:_STATE_AT] = bytes(_STATE_AT)


def finish(record: memoryview, header: Header, table: bytes) -> None:
    """Close a record whose payload is in place: write its table and header, then COPIED."""
    assert len(table) == header.table_bytes
    assert header.payload_offset >= PAGE + len(table)
    if header.payload_offset + header.payload_bytes > len(record):
        total = header.payload_offset + header.payload_bytes
        raise RecordError(f"a record of {total:,} bytes does not fit its slot of {len(record):,}")
    record[PAGE : PAGE + len(table)] = table
    _FIELDS.pack_into(
        record,
        0,
        _MAGIC,
        VERSION,
        header.kind,
        header.attempt,
        0,
        header.step,
        header.sequence,
        header.table_bytes,
        header.payload_offset,
        header.payload_bytes,
    )
    set_state(record, State.COPIED)


def seal(record: memoryview, pool: Executor | None = None, sums: Mapping[int, bytes] | None = None) -> None:
    """Write the checksum of a COPIED record, then SEALED. Raises RecordError for anything that is not one.

    ``sums``: the digests of whole chunks of the payload that the writer took of what it copied, by the number of the
    first of chunks that follow each other, one digest after another. Those are not read again.
    """
    if state_of(record) is not State.COPIED:
        raise RecordError(f"cannot seal a record that is {state_of(record).name}")
    record[_CHECKSUM] = checksum(record, pool, sums or {})
    set_state(record, State.SEALED)


def read_header(record: memoryview) -> Header:
    """Raises RecordError if the bytes are no record of this version or its lengths do not fit."""
    magic, version, kind, attempt, _, step, sequence, table, offset, payload = _FIELDS.unpack_from(record)
    if magic != _MAGIC or version != VERSION:
        raise RecordError(f"no record of version {VERSION}: magic {magic!r}, version {version}")
    if PAGE + table > offset or offset + payload > len(record):
        raise RecordError("the header's lengths do not fit the slot")
    try:
        return Header(Kind(kind), step, attempt, sequence, table, offset, payload)
    except ValueError as error:
        raise RecordError(str(error)) from None


def checksum(record: memoryview, pool: Executor | None = None, sums: Mapping[int, bytes] | None = None) -> bytes:
    """The 16 bytes that a seal writes, with ``sums`` as there. Raises RecordError as :func:`read_header` does."""
    header = read_header(record)
    spans = [*_spans(PAGE, header.table_bytes, {}), *_spans(header.payload_offset, header.payload_bytes, sums or {})]

    def digests(span: bytes | range) -> bytes:
        if isinstance(span, bytes):
            return span
        return b"".join(xxh3_128_digest(record[at : min(at + CHUNK, span.stop)]) for at in span)

    found: Iterable[bytes] = (pool.map if pool else map)(digests, spans)
    return xxh3_128_digest(bytes(record[: _FIELDS.size]) + b"".join(found))


def _spans(start: int, nbytes: int, sums: Mapping[int, bytes]) -> list[bytes | range]:
    """All chunks from ``start`` on, in their order: digests that are known, and where others begin, of which the last
    of a span may be cut short. Raises RecordError if digests are not of whole chunks, each once."""
    spans: list[bytes | range] = []
    at, end = start, start + nbytes

    def read_until(stop: int) -> None:
        nonlocal at
        while at < stop:
            spans.append(range(at, min(at + _TOGETHER * CHUNK, stop), CHUNK))
            at = min(at + _TOGETHER * CHUNK, stop)

    for first, known in sorted(sums.items()):
        begin, count = start + first * CHUNK, len(known) // DIGEST
        if begin < at or begin + count * CHUNK > end or len(known) % DIGEST:
            raise RecordError(f"{len(known):,} bytes of digests from chunk {first} on do not fit {nbytes:,} bytes")
        read_until(begin)
        spans.append(known)
        at += count * CHUNK
    read_until(end)
    return spans


def verify(record: memoryview, pool: Executor | None = None) -> Header:
    """The header of a sealed record whose bytes match its checksum. Raises RecordError saying what is wrong."""
    if state_of(record) is not State.SEALED:
        raise RecordError(f"the record is {state_of(record).name}, not SEALED")
    header = read_header(record)
    if bytes(record[_CHECKSUM]) != checksum(record, pool):
        raise RecordError(f"the {header.kind.name.lower()} record of step {header.step} does not match its checksum")
    return header


def table_of(record: memoryview, header: Header) -> Table:
    return decode_table(bytes(record[PAGE : PAGE + header.table_bytes]))


def parts_of(record: memoryview, header: Header) -> tuple[int, ...]:
    """The parts alone: the keeper asks at every seal, and rows can be thousands. Raises RecordError."""
    table = bytes(record[PAGE : PAGE + header.table_bytes])
    try:
        return tuple(int(part) for part in json.loads(table[: table.index(b"\n")]))
    except (ValueError, TypeError) as error:
        raise RecordError(f"the record of step {header.step} has no readable table: {error}") from None


def payload_of(record: memoryview, header: Header) -> memoryview:
    return record[header.payload_offset : header.payload_offset + header.payload_bytes]


def extras_entries(extras: dict[str, bytes]) -> tuple[Entry, ...]:
    """The table of an extras record whose payload is all values joined in the mapping's order."""
    entries, offset = [], 0
    for name, blob in extras.items():
        entries.append(Entry(Range(name, "extras", 0, len(blob)), "uint8", offset, len(blob)))
        offset += len(blob)
    return tuple(entries)
