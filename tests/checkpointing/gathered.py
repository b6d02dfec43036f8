"""One hash of a checkpoint's state, whatever layout wrote it."""

from __future__ import annotations

import hashlib

from checkpointing.store import Checkpoint


def gathered_hash(checkpoint: Checkpoint) -> str:
    """SHA-256 over every kind of every whole unit in name order: equal for equal state in any layout.

    Raises RecoveryError if an element is absent or held twice.
    """
    assert not checkpoint.has_log
    digest = hashlib.sha256()
    for unit, kind in sorted({held.key for held in checkpoint.entries}):
        values = checkpoint.assemble(unit, kind)
        digest.update(f"{unit}#{kind} {values.dtype} {values.size}\n".encode())
        digest.update(values.tobytes())
    return digest.hexdigest()
