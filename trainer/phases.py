"""What this worker is doing now, posted where the keeper and the launcher can see it (no torch here).

Each phase has a deadline from the recipe. One that is missed gets the worker killed from outside; see
:mod:`checkpointing.keeper.watch` and :mod:`trainer.supervisor`.
"""

from __future__ import annotations

import os
import time
from dataclasses import asdict

from checkpointing.phases import Board
from trainer.schema import DeadlinesSection

BOARD_VARIABLE = "PLANARIA_BOARD"
IMPORT = "import"
_KEYS = {IMPORT: "build", "build": "build", "load": "load", "evaluate": "evaluate", "finish": "finish"}
# A phase that took long in the step before may take this many times as long.
_SLACK = 4.0


class Phases:
    """Posts phases on ``board``; a later :meth:`enter` ends the one before.

    A phase of a step may take ``deadlines.step`` seconds, or four times what it took last time if that is more: a run
    whose steps are slow is not a run that hangs.
    """

    def __init__(self, board: Board, deadlines: DeadlinesSection) -> None:
        self.board = board
        self.phase, self.step = "", 0
        self._allowed: dict[str, float] = asdict(deadlines)
        self._took: dict[str, float] = {}
        self._first_step = -1
        self._since = time.monotonic()

    @classmethod
    def open(cls, deadlines: DeadlinesSection) -> Phases:
        """On the board that the launcher handed down, or on a new one under a launcher that knows of none."""
        inherited = os.environ.get(BOARD_VARIABLE)
        return cls(Board(int(inherited)) if inherited else Board.create(os.environ.get("RANK", "0")), deadlines)

    def enter(self, phase: str, step: int = 0) -> None:
        now = time.monotonic()
        self._took[self.phase] = now - self._since
        self.phase, self.step, self._since = phase, step, now
        self.board.post(phase, step, self.allowed_s(phase, step))

    def allowed_s(self, phase: str, step: int) -> float:
        """How long a phase may take; 0: for ever."""
        if phase in _KEYS:
            return self._allowed[_KEYS[phase]]
        if self._first_step < 0:
            self._first_step = step
        if step == self._first_step:
            return self._allowed["first_step"]
        allowed = self._allowed["step"]
        return max(allowed, _SLACK * self._took.get(phase, 0.0)) if allowed else 0.0


def longest_deadline_s(deadlines: DeadlinesSection) -> float | None:
    """The longest that one worker may rightly keep its peers waiting; None: for ever."""
    values = asdict(deadlines).values()
    return max(values) if all(values) else None


def key_of(phase: str) -> str:
    """The recipe's key of a phase's deadline, apart from first steps."""
    return f"parallel.deadlines.{_KEYS.get(phase, 'step')}"
