"""When the parts of a recovery run, in whatever thread: they overlap, so each one's own time is not the whole's."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import checkpointing.restore
import trainer.snapshots
from checkpointing.intake import Intake
from checkpointing.keeper.client import KeeperClient
from checkpointing.pinning import Pinning
from checkpointing.recover import Recovery

# The wait for the keeper's proof; that, and the proof that steps are complete; verifying again; registering; carrying
# out the plan; of that, what follows the oldest bases; weights from masters.
PARTS = {
    "verify_s": (KeeperClient, "inventory"),
    "report_s": (Recovery, "report_memory"),
    "check_s": (Intake, "_verified"),
    "pin_s": (Pinning, "_register"),
    "apply_s": (Recovery, "apply"),
    "redo_s": (checkpointing.restore, "redo_steps"),
    "weights_s": (trainer.snapshots, "after_restore"),
}
_RESTORE = ("verify_s", "check_s", "pin_s", "apply_s")


@dataclass
class Clock:
    """Spans of time, (begin, end), of each part."""

    spans: dict[str, list[tuple[float, float]]] = field(default_factory=lambda: {name: [] for name in PARTS})

    def seconds(self) -> dict[str, float]:
        """Of each part its own time until the plan is carried out; slots are registered beyond that, beside training.

        ``restore_s`` is the time from the beginning of the first of proving, verifying, registering and carrying out to
        the end of the last, which waits for the device.
        """
        ended = max(end for _, end in self.spans["apply_s"])
        begun = min(begin for name in _RESTORE for begin, _ in self.spans[name])
        own = {
            name: sum(end - begin for begin, end in spans if begin < ended or name == "weights_s")
            for name, spans in self.spans.items()
        }
        return own | {"restore_s": ended - begun}


@contextmanager
def watched() -> Iterator[Clock]:
    """Notes when the parts of a recovery run."""
    clock = Clock()

    def clocked(name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            begun = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                clock.spans[name].append((begun, time.perf_counter()))

        return call

    with ExitStack() as stack:
        for name, (owner, attribute) in PARTS.items():
            stack.enter_context(patch.object(owner, attribute, clocked(name, getattr(owner, attribute))))
        yield clock
