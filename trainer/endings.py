"""How workers ended, and whether they end the same way again and again (no torch here).

A restart mends what chance has broken: a killed process, a lost machine. What breaks at the same place each time it
would break for ever, so after three identical failures without progress a run stops and says what it knows.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trainer.events import FILE_NAME, read_events
from trainer.phases import key_of

IDENTICAL = 3
_RESTARTS_VARIABLE = "TORCHELASTIC_RESTART_COUNT"


class CrashLoopError(ValueError):
    """The workers ended three times in the same way; the message is the diagnosis."""


@dataclass(frozen=True)
class Ending:
    """Why an attempt ended: the worker that went first, where it was, of what kind its end was, and of what exactly.

    >>> str(Ending(1, "backward", 7, "signal", "SIGKILL"))
    'worker 1 in backward of step 7: SIGKILL'
    """

    rank: int
    phase: str
    step: int
    kind: Literal["stuck", "failed", "signal", "status"]
    cause: str

    @property
    def likeness(self) -> tuple[object, ...]:
        """Equal for two ends of the same kind: numbers in an error's text (addresses, sizes) may differ, and an error
        that all workers meet may be seen on any of them first. But each attempt may find another checkpoint damaged."""
        if self.kind == "failed" and self.cause.startswith("RecoveryError"):
            return self.kind, self.step, self.cause
        if self.kind == "failed":
            return self.kind, self.step, re.sub(r"0x[0-9a-f]+|\d+", "#", self.cause)
        if self.kind == "stuck":
            return self.kind, self.step
        return self.kind, self.step, self.rank, self.cause

    def __str__(self) -> str:
        where = f" in {self.phase}" if self.phase else ""
        return f"worker {self.rank}{where}{f' of step {self.step}' if self.step > 0 else ''}: {self.cause}"


def name_of_status(status: int) -> str:
    """A process's exit status as text; negative ones are signals.

    >>> name_of_status(-9), name_of_status(1)
    ('SIGKILL', 'exit status 1')
    """
    if status >= 0:
        return f"exit status {status}"
    try:
        return signal.Signals(-status).name
    except ValueError:
        return f"signal {-status}"


def ending_of(rows: Sequence[dict[str, Any]]) -> Ending | None:
    """What one attempt's events say of its end; None if nothing.

    A worker that was killed as stuck comes first, since the others only waited for it; then one that failed by itself,
    then one that was seen to go; a worker that only lost its peer is no reason.
    """
    bereft = {row["pid"] for row in rows if row.get("lost_peer")}
    for kind in ("worker_stuck", "failed", "worker_exit", "worker_gone"):
        found = [row for row in rows if row["kind"] == kind and row.get("pid") not in bereft]
        # Several hang when one does: the one that a signal stopped is the one. And who was killed went first.
        found.sort(key=lambda row: (not row.get("stopped", False), row.get("status", 0) >= 0))
        if found:
            return _read(found[0])
    return None


def _read(row: dict[str, Any]) -> Ending:
    rank, phase, step = _rank(row), str(row.get("phase", "")), int(row.get("step") or 0)
    if row["kind"] == "worker_stuck":
        stopped = ", stopped by a signal" if row.get("stopped") else ""
        return Ending(rank, phase, step, "stuck", f"stuck for more than {row['allowed_s']:g} s{stopped}")
    if row["kind"] == "failed":
        return Ending(rank, phase, step, "failed", str(row["error"]))
    status = row.get("status", -signal.SIGKILL)  # the keeper only sees that a worker is gone
    return Ending(rank, phase, step, "signal" if status < 0 else "status", name_of_status(status))


def _rank(row: dict[str, Any]) -> int:
    if "worker" in row:
        return int(row["worker"])
    return int(row["coordinate"].removeprefix("dp")) if "coordinate" in row else int(row["rank"])


def is_loop(endings: Sequence[Ending | None]) -> bool:
    """Whether the last three attempts ended alike, which they cannot if steps were made in between."""
    last = list(endings[-IDENTICAL:])
    return len(last) == IDENTICAL and None not in last and len({e.likeness for e in last if e is not None}) == 1


def diagnosis(ending: Ending, run_dir: Path) -> str:
    """What to tell the user of a crash loop."""
    return (
        f"crash loop: the workers ended {IDENTICAL} times in the same way, with no step made in between\n"
        f"  {ending}\n"
        f"  see  {run_dir / FILE_NAME} (worker_stuck, failed, worker_exit), {run_dir / 'keeper.log'}\n"
        f"  try  {_advice(ending)}\n"
        "The state is kept: the same command goes on from it."
    )


def _advice(ending: Ending) -> str:
    if ending.kind == "stuck":
        return f"a longer {key_of(ending.phase)}, or parallel.deadlines.first_step if a first step takes that long"
    if ending.cause == "SIGKILL":
        return "`dmesg | tail`: if the kernel was out of memory, a smaller train.micro_batch_size or sequence length"
    if ending.cause in ("SIGSEGV", "SIGBUS", "SIGILL", "SIGABRT"):
        return "another version of torch or of the driver: a library crashed, and its words are above"
    return "what the worker said above; its error is the same each time"


def check_restarts(run_dir: Path) -> None:
    """For a worker that torchrun started again: raises CrashLoopError if this launch's last attempts ended alike."""
    restarts = int(os.environ.get(_RESTARTS_VARIABLE, 0))
    if restarts < IDENTICAL:
        return
    attempts: dict[int, list[dict[str, Any]]] = {}
    for row in read_events(run_dir):
        attempts.setdefault(row["attempt"], []).append(row)
    endings = [ending_of(attempts[attempt]) for attempt in sorted(attempts)[-IDENTICAL:]]
    if is_loop(endings) and endings[-1] is not None:
        raise CrashLoopError(diagnosis(endings[-1], run_dir))
