"""Held-out losses of a run by step, in ``heldout.json`` of its folder: which of its checkpoints is the best.

Retention never removes the best checkpoint that is there. Losses over other samples than the newest are not compared.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

FILE_NAME = "heldout.json"


def record(run_dir: Path, step: int, loss: float, over: str) -> None:
    """Add the loss of ``step``, measured ``over`` some samples; those measured over others are forgotten.

    Only one process of a run may call this. A file that cannot be written is left as it was.
    """
    before, losses = _read(run_dir)
    kept = losses if before == over else {}
    text = json.dumps({"over": over, "losses": {str(s): value for s, value in sorted({**kept, step: loss}.items())}})
    temporary = run_dir / f".{FILE_NAME}"
    try:
        with temporary.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(run_dir / FILE_NAME)
    except OSError as error:
        print(f"{run_dir / FILE_NAME}: {error.strerror}; the best checkpoint may not be kept", flush=True)


def losses_of(run_dir: Path) -> dict[int, float]:
    """Losses by step; empty if none were recorded."""
    return _read(run_dir)[1]


def best_of(losses: Mapping[int, float], steps: Iterable[int]) -> int | None:
    """The one of ``steps`` with the lowest loss, the earliest if several have it; None if no loss of them is known."""
    known = [(losses[step], step) for step in steps if step in losses]
    return min(known)[1] if known else None


def _read(run_dir: Path) -> tuple[str, dict[int, float]]:
    try:
        stored = json.loads((run_dir / FILE_NAME).read_text())
        losses = {int(step): float(loss) for step, loss in stored["losses"].items()}
        return str(stored["over"]), {step: loss for step, loss in losses.items() if math.isfinite(loss)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "", {}
