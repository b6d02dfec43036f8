"""Named places in a training step where a drill can strike."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

from trainer.events import EventLog
from trainer.faults import DiskFaultSpec, KillSpec

KILL_VARIABLE = "PLANARIA_KILL"
DISK_VARIABLE = "PLANARIA_DISK_FAULT"


class Failpoints:
    """Carries out one :class:`~trainer.faults.KillSpec` with SIGKILL.

    The environment may name one per attempt of a run, separated by ``;``.

    ``reached(point, step)`` is called at every failpoint on every worker; it returns unless this is the place.
    """

    def __init__(self, spec: KillSpec | None, *, rank: int, run_dir: Path, events: EventLog) -> None:
        self._spec = spec if spec is not None and spec.rank == rank else None
        self._run_dir = run_dir
        self._events = events

    @classmethod
    def from_environment(cls, *, rank: int, attempt: int, run_dir: Path, events: EventLog) -> Failpoints:
        specs = os.environ.get(KILL_VARIABLE, "").split(";")
        text = specs[attempt] if attempt < len(specs) else ""
        return cls(KillSpec.parse(text) if text else None, rank=rank, run_dir=run_dir, events=events)

    def reached(self, point: str, step: int) -> None:
        spec = self._spec
        if spec is None or spec.at != point or spec.step != step:
            return
        self._spec = None
        self._events.write("kill", step=step, at=point, who=spec.who, pid=os.getpid())
        if spec.who in ("keeper", "both"):
            os.kill(json.loads((self._run_dir / "keeper.json").read_text())["pid"], signal.SIGKILL)
        if spec.who in ("worker", "both"):
            os.kill(os.getpid(), signal.SIGKILL)

    def disk_kill(self) -> dict[str, object] | None:
        """What to tell the keeper when the strike is in the middle of its disk write."""
        spec = self._spec
        if spec is None or spec.at != "disk":
            return None
        pids: list[object] = []
        if spec.who in ("worker", "both"):
            pids.append(os.getpid())
        if spec.who in ("keeper", "both"):
            pids.append("keeper")
        return {"at": "disk", "step": spec.step, "pids": pids}

    @staticmethod
    def disk_fault() -> dict[str, str | int] | None:
        """What to tell the keeper when its disk is to be slow, full or hung. Raises FaultError."""
        text = os.environ.get(DISK_VARIABLE)
        return DiskFaultSpec.parse(text).fields() if text else None
