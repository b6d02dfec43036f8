"""From a window on disk (bases of several steps and a log) to a whole checkpoint that needs no redo.

Redo happens in the layout that wrote the log, with the same optimizer class on the same kind of device: anything else
can give other bits, and is refused unless asked for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from checkpointing.capture import bytes_of
from checkpointing.records import Kind, RecordInfo, extras_entries
from checkpointing.recovery import RecoveryError
from checkpointing.redo import Redo
from checkpointing.restore import Target, restore_from_disk
from checkpointing.state.buffers import StateBuffer
from checkpointing.state.fragments import rotation
from checkpointing.state.partitions import build_partitions
from checkpointing.store import Checkpoint, write_checkpoint
from checkpointing.tensorfile import Section, read_metadata


def whole(checkpoint: Checkpoint, scratch: Path, inexact: bool = False) -> Checkpoint:
    """The checkpoint itself if it has no log, else one that is whole, redone and written under ``scratch``.

    Raises RecoveryError if the log was written on another kind of device, by another torch, or cannot be redone, and if
    the checkpoint is a lossy one whose experts are of several steps.
    """
    if not checkpoint.has_log and not checkpoint.is_whole and not inexact:
        raise RecoveryError(
            f"{checkpoint.path} holds experts of several steps (mode pec): no step had this state. Take one that is "
            "whole, as a finished run's last is, or accept that with --inexact"
        )
    if not checkpoint.has_log:
        return checkpoint
    device = _device(checkpoint, inexact)
    sections: dict[str, list[Section]] = {}
    partitions: dict[str, str] = {}
    for coordinate in checkpoint.manifest["coordinates"]:
        described = read_metadata(checkpoint.file_of(coordinate)).get("partitions")
        if described is None:
            raise RecoveryError(f"{checkpoint.file_of(coordinate)} does not say how partitions lie; use another step")
        buffers, optimizer = build_partitions(described, _settings(checkpoint, coordinate), device)
        extras = restore_from_disk(Target(buffers, coordinate, Redo(optimizer)), checkpoint)
        partitions[coordinate] = described
        sections[coordinate] = sections_of(buffers, extras)
    manifest = checkpoint.manifest
    path = write_checkpoint(
        scratch, checkpoint.step, sections, manifest["tensors"], manifest["metadata"], described=partitions
    )
    return Checkpoint.open(path)


def _device(checkpoint: Checkpoint, inexact: bool) -> str:
    written: Mapping[str, str] = checkpoint.manifest["metadata"]
    device = written.get("device", "cpu")
    here = "cuda" if torch.cuda.is_available() else "cpu"
    problems = []
    if device != here and device != "cpu":
        problems.append(f"on {device}, and this machine has none")
    if written.get("torch", torch.__version__) != torch.__version__:
        problems.append(f"by torch {written['torch']}, and this is {torch.__version__}")
    if problems and not inexact:
        raise RecoveryError(
            f"{checkpoint.path} holds a log that was written {' and '.join(problems)}: redoing it here may give other "
            "bits. Do it there, or accept that with --inexact"
        )
    return device if device == here else "cpu"


def _settings(checkpoint: Checkpoint, coordinate: str) -> list[dict[str, Any]]:
    """Of each parameter group, from the oldest log; a worker that was captured whole has none, and redoes nothing."""
    logs = [r for r in checkpoint.records if r.kind is Kind.LOG and r.source == coordinate]
    if not logs:
        return list(json.loads(read_metadata(checkpoint.file_of(coordinate))["partitions"])["groups"])
    oldest: RecordInfo = min(logs, key=lambda r: r.step)
    (meta,) = [e for e in oldest.entries if e.range.kind == "meta"]
    with checkpoint.file_of(coordinate).open("rb") as file:
        file.seek(meta.offset)
        return json.loads(file.read(meta.nbytes))["groups"]


def sections_of(buffers: Sequence[StateBuffer], extras: dict[str, bytes]) -> list[Section]:
    """What a whole checkpoint holds of one coordinate: its state in one piece, and its extras."""
    (fragment,) = rotation(buffers, 1)
    payload = torch.empty(fragment.nbytes, dtype=torch.uint8)
    for piece in fragment.pieces:
        source = bytes_of(buffers[piece.buffer].tensor[piece.lo : piece.hi])
        payload[piece.offset : piece.offset + source.numel()].copy_(source)
    state = Section(fragment.entries, memoryview(payload.numpy()).cast("B"))
    return [state, Section(extras_entries(extras), memoryview(b"".join(extras.values())))]
