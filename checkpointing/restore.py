"""Copying verified bytes back into live tensors, from memory slots or from files, and re-applying the log."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from checkpointing.capture import bytes_of
from checkpointing.intake import Intake
from checkpointing.pinning import Pinning
from checkpointing.records import Entry, Kind, RecordInfo
from checkpointing.recovery import GRADIENT, RecoveryError, Restoration, Transfer, restoration_of, restoring_moves
from checkpointing.redo import LoggedStep, Redo, redo_steps
from checkpointing.schedule import WHOLE, Rules
from checkpointing.slots import Arena
from checkpointing.state.buffers import StateBuffer, needs_of
from checkpointing.store import Checkpoint
from checkpointing.store import verify as verify_files
from checkpointing.units import Range

_PIECE = 64 << 20
Read = Callable[[str, int, int, Tensor], None]
"""Fills a flat uint8 tensor from a record's payload, given the record's source, slot and offset in bytes."""


@dataclass(frozen=True)
class Target:
    """What a restore fills.

    Attributes:
        redo: steps the buffers' optimizer; None if no window of a log may be restored.
        rules: how the records in memory belong together.
        pinning: of the coordinate's own arena, whose slots are pinned before they are read.
        halfway: a drill's failpoint, called with the step when half of the pieces of state are in place.
    """

    buffers: Sequence[StateBuffer]
    coordinate: str
    redo: Redo | None = None
    rules: Rules = WHOLE
    pinning: Pinning | None = None
    halfway: Callable[[int], None] = lambda step: None
    applied: list[int] = field(default_factory=list)  # steps that were re-applied
    bases: list[tuple[int, Range]] = field(default_factory=list)  # what was restored from the base of which step


def restore_from_memory(
    target: Target, records: Iterable[RecordInfo], arenas: Mapping[str, Arena], step: int, intake: Intake
) -> dict[str, bytes]:
    """Bring the buffers to ``step`` from sealed records and return the coordinate's extras.

    Every record is verified against its checksum before it is read, by the ``intake`` and ahead of the copying. Raises
    RecoveryError, or KeeperError if its slot cannot be pinned; the buffers may then hold some of the state.
    """
    by_place = {(r.source, r.slot): r for r in records}
    restoration = _restoration(target, by_place.values(), step, target.rules)
    extras = _extras_of(target.coordinate, by_place.values(), step)
    intake.settle([(target.coordinate, extras.slot), *restoration.places()], arenas)

    def read(source: str, slot: int, offset: int, into: Tensor) -> None:
        payload = intake.payload(by_place[source, slot])
        kept = torch.frombuffer(payload, dtype=torch.uint8, count=into.numel(), offset=offset)
        into.copy_(kept, non_blocking=into.is_cuda)

    _fill(target, restoration, read)
    payload = intake.payload(extras)
    if any(b.tensor.is_cuda for b in target.buffers):
        torch.cuda.synchronize()
    return {e.range.unit: bytes(payload[e.offset : e.offset + e.nbytes]) for e in extras.entries}


def restore_from_disk(target: Target, checkpoint: Checkpoint) -> dict[str, bytes]:
    """Bring the buffers to a checkpoint's step, after verifying its files, and return the coordinate's extras.

    Raises RecoveryError naming the damaged file, or the layer, expert and tensor that is absent.
    """
    restoration = _restoration(target, checkpoint.records, checkpoint.step, checkpoint.rules)
    places = restoration.places()
    problems = verify_files(checkpoint.path, [*{source for source, _ in places}, target.coordinate])
    if problems:
        raise RecoveryError(problems[0])
    files = {place: checkpoint.file_of(*place).open("rb", buffering=0) for place in sorted(set(places))}

    def read(source: str, slot: int, offset: int, into: Tensor) -> None:
        for at in range(0, into.numel(), _PIECE):
            piece = bytearray(min(_PIECE, into.numel() - at))
            files[source, slot].seek(offset + at)
            got = files[source, slot].readinto(piece) or 0
            if got != len(piece):
                raise RecoveryError(f"{checkpoint.file_of(source, slot)}: ended early at byte {offset + at + got:,}")
            into[at : at + got].copy_(torch.frombuffer(piece, dtype=torch.uint8))

    try:
        _fill(target, restoration, read)
    finally:
        for file in files.values():
            file.close()
    return checkpoint.extras(target.coordinate)


def _restoration(target: Target, records: Iterable[RecordInfo], step: int, rules: Rules) -> Restoration:
    wanted = tuple(need.range for need in needs_of(target.buffers))
    found = restoration_of(wanted, records, target.coordinate, step, rules)
    if isinstance(found, str):
        raise RecoveryError(f"step {step} cannot be restored: {found}; use another step")
    if found.logs and target.redo is None:
        raise RecoveryError(
            f"step {step} lies in a window of the log (bases from step {found.oldest} on), and nothing here can step "
            "its optimizer; use another step"
        )
    return found


def _extras_of(coordinate: str, records: Iterable[RecordInfo], step: int) -> RecordInfo:
    extras = [r for r in records if r.kind is Kind.EXTRAS and r.source == coordinate and r.step == step]
    if not extras:
        raise RecoveryError(f"no extras record of {coordinate} of step {step}; use another step")
    # Two, if the keeper died when a step had just been captured again.
    return max(extras, key=lambda r: r.sequence)


def _fill(target: Target, restoration: Restoration, read: Read) -> None:
    """Put the oldest bases in place, then re-apply step after step, each time followed by the bases of that step.

    Without a log the bases are all of one step, or of experts that may be older.
    """
    tensors = {b.name: bytes_of(b.tensor) for b in target.buffers}
    moves = dict(restoring_moves(needs_of(target.buffers), restoration))
    target.bases.extend((step, piece) for step, pieces in restoration.bases for piece, _ in pieces)
    left = sum(map(len, moves.values()))
    half = left // 2

    def place(step: int) -> None:
        nonlocal left
        for move in moves.get(step, ()):
            if left == half:
                target.halfway(restoration.step)
            left -= 1
            _carry_out(move, tensors[move.buffer], read)

    if not restoration.logs:
        for step in moves:
            place(step)
        return
    place(restoration.oldest)
    assert target.redo is not None
    # One by one: the first is re-applied while the others are still being verified and pinned.
    logs = (LoggedStep(_meta(record, read), *_gradients(target, record, read)) for record in restoration.logs)
    redo_steps(target.redo, restoration.oldest, logs, place)
    target.applied.extend(record.step for record in restoration.logs)


def _carry_out(move: Transfer, tensor: Tensor, read: Read) -> None:
    read(move.source, move.slot, move.source_offset, tensor[move.buffer_offset : move.buffer_offset + move.nbytes])


def _meta(record: RecordInfo, read: Read) -> bytes:
    entry = next((e for e in record.entries if e.range.kind == "meta"), None)
    if entry is None:
        raise RecoveryError(f"the log of step {record.step} says nothing of its step; use another step")
    blob = torch.empty(entry.nbytes, dtype=torch.uint8)
    read(record.source, record.slot, entry.offset, blob)
    return blob.numpy().tobytes()


def _gradients(target: Target, record: RecordInfo, read: Read) -> tuple[str, Callable[[int, Tensor], None]]:
    """Their dtype, and what reads a group's by their names: neighbours in record and partition as one copy."""
    entries: dict[str, list[Entry]] = {}
    dtype = "float32"
    for entry in record.entries:
        if entry.range.kind == GRADIENT:
            entries.setdefault(entry.range.unit, []).append(entry)
            dtype = entry.dtype
    masters = [buffer for buffer in target.buffers if buffer.name.endswith(".master")]

    def read_group(index: int, into: Tensor) -> None:
        size, flat = into.element_size(), bytes_of(into)
        runs: list[list[int]] = []  # [offset in the record, offset in the partition, bytes]
        for span in sorted(masters[index].spans, key=lambda s: s.offset):
            entry = _holder(entries, span.range.unit, span.range.lo, span.range.hi, record.step)
            at = entry.offset + (span.range.lo - entry.range.lo) * size
            nbytes = span.range.size * size
            if runs and runs[-1][0] + runs[-1][2] == at and runs[-1][1] + runs[-1][2] == span.offset * size:
                runs[-1][2] += nbytes
            else:
                runs.append([at, span.offset * size, nbytes])
        for at, offset, nbytes in runs:
            read(record.source, record.slot, at, flat[offset : offset + nbytes])

    return dtype, read_group


def _holder(entries: Mapping[str, Sequence[Entry]], unit: str, lo: int, hi: int, step: int) -> Entry:
    for entry in entries.get(unit, ()):
        if entry.range.lo <= lo and hi <= entry.range.hi:
            return entry
    raise RecoveryError(f"the log of step {step} holds {unit}[{lo}:{hi}) in pieces; it was written in another layout")
