"""Learning rates as a function of the step, so that nothing about them needs saving."""

from __future__ import annotations

import math


def learning_rate(
    step: int, *, peak: float, steps: int, warmup_steps: int, min_lr_ratio: float, schedule: str
) -> float:
    """Rate of ``step`` (counted from 1): linear warm-up, then ``cosine`` to ``peak * min_lr_ratio`` or ``constant``."""
    if step <= warmup_steps:
        return peak * step / warmup_steps
    if schedule == "constant":
        return peak
    done = (step - warmup_steps) / max(1, steps - warmup_steps)
    return peak * (min_lr_ratio + (1 - min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * done)))
