"""Loading a whole checkpoint into another layout: other ranks, ZeRO stage or expert-parallel degree.

State has names, so a change of layout is a remap of intervals. What is promised is equal state, not an equal
trajectory: sums over other ranks round differently.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from checkpointing.capture import bytes_of
from checkpointing.recovery import RecoveryError, transfers
from checkpointing.state.buffers import StateBuffer, needs_of
from checkpointing.store import Checkpoint, verify
from checkpointing.tensorfile import read_bytes

_PIECE = 64 << 20


def load_resized(buffers: Sequence[StateBuffer], checkpoint: Checkpoint) -> None:
    """Fill the buffers, whatever layout wrote the checkpoint; the files that are read are verified first.

    Raises RecoveryError for a damaged file, a window whose log must be redone first, or a range that is absent, held
    twice or of another dtype; nothing is then changed.
    """
    if checkpoint.has_log:
        raise RecoveryError(f"{checkpoint.path} holds bases of several steps and a log; redo it first")
    moves = transfers(needs_of(buffers), checkpoint.newest)
    problems = verify(checkpoint.path, sorted({move.source for move in moves}))
    if problems:
        raise RecoveryError(problems[0])
    tensors = {buffer.name: bytes_of(buffer.tensor) for buffer in buffers}
    for move in moves:
        file, into = checkpoint.file_of(move.source, move.slot), tensors[move.buffer][move.buffer_offset :]
        for at in range(0, move.nbytes, _PIECE):
            size = min(_PIECE, move.nbytes - at)
            piece = read_bytes(file, move.source_offset + at, size)
            into[at : at + size].copy_(torch.frombuffer(piece, dtype=torch.uint8))


def tensor_differences(held: Mapping[str, Mapping[str, Any]], wanted: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """How a checkpoint's tensors (its manifest's) differ from a model's, one line per tensor; empty if they agree."""
    lines = [f"{unit}: only in the checkpoint" for unit in sorted(held.keys() - wanted.keys())]
    lines += [f"{unit}: not in the checkpoint" for unit in sorted(wanted.keys() - held.keys())]
    for unit in sorted(held.keys() & wanted.keys()):
        if dict(held[unit]) != dict(wanted[unit]):
            lines.append(f"{unit}: {dict(held[unit])} in the checkpoint, {dict(wanted[unit])} in this model")
    return lines
