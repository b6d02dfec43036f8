"""The run's one stream of events: JSON lines that reports, drills and trackers read.

A row is ``{"v": 1, "time": unix seconds, "rank": .., "attempt": .., "step": .., "kind": .., ...}``.
Every process of the run appends to the same file; the keeper's rows have rank -1.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

VERSION = 1
FILE_NAME = "events.jsonl"


class EventLog:
    """Appends rows to ``<run_dir>/events.jsonl``; the folder is made if needed.

    A row is one ``write`` to a descriptor in append mode, so rows of several processes never mix. Rows
    survive the death of the process at once, though not of the machine: nothing is synced. A row that cannot
    be written is lost; the first such loss is said on stderr.
    """

    def __init__(self, run_dir: str | os.PathLike[str], rank: int, attempt: int) -> None:
        self.path = Path(run_dir) / FILE_NAME
        self.rank = rank
        self.attempt = attempt
        self._complained = False
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._end_torn_line()

    def _end_torn_line(self) -> None:
        # A row that was cut short by a full disk must not swallow the first row of this attempt.
        size = os.fstat(self._fd).st_size
        if size and os.pread(self._fd, 1, size - 1) != b"\n":
            with contextlib.suppress(OSError):  # still full: rows are lost, not the run
                os.write(self._fd, b"\n")

    def write(self, kind: str, step: int | None = None, **fields: Any) -> None:
        """Append one row. Numbers that are not finite become text, since JSON has none."""
        row = {
            "v": VERSION,
            "time": time.time(),
            "rank": self.rank,
            "attempt": self.attempt,
            "step": step,
            "kind": kind,
            **{name: _plain(value) for name, value in fields.items()},
        }
        line = json.dumps(row, default=str, ensure_ascii=False) + "\n"
        try:
            os.write(self._fd, line.encode("utf-8", "replace"))
        except OSError as error:
            # A full disk must not end a run whose checkpoints are in memory.
            if not self._complained:
                print(f"{self.path}: events are being lost ({error.strerror}); free some space", file=sys.stderr)
            self._complained = True

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> EventLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(name): _plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return value


def read_events(run_dir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """All whole rows in the order of the file, or none if there is no file. Torn lines are left out."""
    try:
        raw = (Path(run_dir) / FILE_NAME).read_bytes()
    except FileNotFoundError:
        return []
    rows = []
    for line in raw.split(b"\n"):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and "kind" in row:
            rows.append(row)
    return rows
