"""The keeper's rows in a run's ``events.jsonl``, in the format of the training loop's (rank -1 is the keeper)."""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path


def append_event(run_dir: Path, kind: str, step: int | None = None, attempt: int = 0, **fields: object) -> None:
    """One row, in one system call so that rows of several processes never mix. A full disk loses the row only."""
    row = {"v": 1, "time": time.time(), "rank": -1, "attempt": attempt, "step": step, "kind": kind, **fields}
    data = json.dumps(row, separators=(",", ":")).encode() + b"\n"
    with contextlib.suppress(OSError):
        fd = os.open(run_dir / "events.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            os.write(fd, data)
        finally:
            os.close(fd)
