"""Copying verified bytes back into live tensors, from memory slots or from files."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import RawIOBase

import torch

from checkpointing.capture import bytes_of
from checkpointing.records import Kind, RecordError, RecordInfo, payload_of, verify
from checkpointing.recovery import RecoveryError, Transfer, transfers
from checkpointing.slots import Arena
from checkpointing.state.buffers import StateBuffer, needs_of
from checkpointing.store import Checkpoint
from checkpointing.store import verify as verify_files

_PIECE = 64 << 20


def restore_from_memory(
    buffers: Sequence[StateBuffer], records: Iterable[RecordInfo], arenas: Mapping[str, Arena], coordinate: str
) -> dict[str, bytes]:
    """Fill the buffers from sealed records of one step and return the coordinate's extras.

    Every record that is read is first verified against its checksum. Raises RecoveryError.
    """
    by_place = {(r.source, r.slot): r for r in records}
    moves = transfers(needs_of(buffers), by_place.values())
    extras = [r for r in by_place.values() if r.kind is Kind.EXTRAS and r.source == coordinate]
    if len(extras) != 1:
        raise RecoveryError(f"{len(extras)} extras records of {coordinate} where one is needed")
    places = {(m.source, m.slot) for m in moves} | {(coordinate, extras[0].slot)}
    payloads: dict[tuple[str, int], memoryview] = {}
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        for source, slot in sorted(places):
            view = arenas[source].slots[slot]
            try:
                payloads[source, slot] = payload_of(view, verify(view, pool))
            except RecordError as error:
                raise RecoveryError(f"{source}, slot {slot}: {error}") from error
    tensors = {b.name: bytes_of(b.tensor) for b in buffers}
    for move in moves:
        payload = payloads[move.source, move.slot]
        source = torch.frombuffer(payload, dtype=torch.uint8, count=move.nbytes, offset=move.source_offset)
        tensors[move.buffer][move.buffer_offset : move.buffer_offset + move.nbytes].copy_(source)
    payload = payloads[coordinate, extras[0].slot]
    return {e.range.unit: bytes(payload[e.offset : e.offset + e.nbytes]) for e in extras[0].entries}


def restore_from_disk(buffers: Sequence[StateBuffer], checkpoint: Checkpoint, coordinate: str) -> dict[str, bytes]:
    """Fill the buffers from a checkpoint, whose files are verified first, and return the coordinate's extras.

    Raises RecoveryError naming the damaged file, or the layer, expert and tensor that is absent.
    """
    moves = transfers(needs_of(buffers), checkpoint.records)
    problems = verify_files(checkpoint.path, [*{m.source for m in moves}, coordinate])
    if problems:
        raise RecoveryError(problems[0])
    tensors = {b.name: bytes_of(b.tensor) for b in buffers}
    for source in sorted({m.source for m in moves}):
        with checkpoint.file_of(source).open("rb", buffering=0) as file:
            for move in moves:
                if move.source == source:
                    _read_into(tensors[move.buffer], file, move)
    return checkpoint.extras(coordinate)


def _read_into(tensor: torch.Tensor, file: RawIOBase, move: Transfer) -> None:
    for at in range(0, move.nbytes, _PIECE):
        count = min(_PIECE, move.nbytes - at)
        piece = bytearray(count)
        file.seek(move.source_offset + at)
        got = file.readinto(piece)
        if got != count:
            raise RecoveryError(f"{move.source}: the file ended early at byte {move.source_offset + at + (got or 0):,}")
        start = move.buffer_offset + at
        tensor[start : start + count].copy_(torch.frombuffer(piece, dtype=torch.uint8))
