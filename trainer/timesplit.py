"""Where the time of a recovery went, read from a run's events (no torch here)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True)
class Seconds:
    """From the kill to the step that was in flight being done again; the parts follow each other.

    Attributes:
        detect: until the launcher or the keeper noticed.
        teardown: until the last old worker was gone.
        spawn: until the new workers' processes had begun.
        imports: until they had imported what they need.
        join: until they had found each other.
        build: until data, model, engine and keeper were ready.
        load: until the state was restored, optimizer steps of the log included.
        redo: until the step in flight was done again.
    """

    detect: float = 0.0
    teardown: float = 0.0
    spawn: float = 0.0
    imports: float = 0.0
    join: float = 0.0
    build: float = 0.0
    load: float = 0.0
    redo: float = 0.0

    @property
    def total(self) -> float:
        return float(sum(asdict(self).values()))

    def __str__(self) -> str:
        parts = " + ".join(f"{name} {value:.2f}" for name, value in asdict(self).items())
        return f"{self.total:.1f} s = {parts}"


def split_seconds(rows: Sequence[Row], strike: Row, reached: int) -> Seconds:
    """Split one recovery.

    Args:
        rows: of the whole run, in the order of its file.
        strike: the row of the kill, or of whatever else began the recovery.
        reached: the step that was in flight.
    """
    after = [row for row in rows if row["time"] >= strike["time"]]
    starts = [row for row in after if row["kind"] == "start"]
    redone = next((r for r in after if r["kind"] == "step" and r["step"] >= reached), None)
    # Workers that are killed while they recover make room for the next ones.
    attempt = redone["attempt"] if redone else max((row["attempt"] for row in starts), default=-1)
    starts = [row for row in starts if row["attempt"] == attempt]
    new = [row for row in after if row["attempt"] == attempt]
    began = _latest((row["spawned"] for row in starts), strike["time"])
    ends = [r for r in after if r["kind"] in ("worker_stuck", "worker_exit", "worker_gone", "workers_ended")]
    gone = [row["time"] for row in ends if row["time"] <= began]
    marks = [
        strike["time"],
        min(gone, default=strike["time"]),
        _latest(gone, strike["time"]),
        began,
        _latest((row["imported"] for row in starts), began),
        _latest((row["joined"] for row in starts), began),
        _latest(_times(new, "recover_begin"), began),
        _latest(_times(new, "recovered"), began),
        redone["time"] if redone else 0.0,
    ]
    # What an attempt never came to takes no time.
    for i in range(1, len(marks)):
        marks[i] = max(marks[i], marks[i - 1])
    return Seconds(*(later - earlier for earlier, later in pairwise(marks)))


def _times(rows: Sequence[Row], kind: str) -> list[float]:
    return [row["time"] for row in rows if row["kind"] == kind]


def _latest(times: Iterable[float], default: float) -> float:
    return max(times, default=default)
