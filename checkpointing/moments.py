"""What elementwise optimizers keep of each parameter besides its fp32 master weight (no torch here).

Only their steps can be logged and applied again: the update of an element depends on no other element.
"""

from __future__ import annotations

_ADAM = ("exp_avg", "exp_avg_sq")

# By class name: the tensors in torch's state of a parameter, each as large as it. SGD's is with momentum.
MOMENTS: dict[str, tuple[str, ...]] = {
    "Adam": _ADAM,
    "AdamW": _ADAM,
    "FusedAdam": _ADAM,
    "SGD": ("momentum_buffer",),
    "Lion": ("exp_avg",),
}

# By the name in recipes (``train.optimizer``).
CLASSES = {"adamw": "AdamW", "sgd": "SGD", "lion": "Lion"}

_FP32 = 4


def state_width(optimizer: str) -> int:
    """Bytes of state per parameter, the fp32 master weight included, of an optimizer in a recipe."""
    return _FP32 * (1 + len(MOMENTS[CLASSES[optimizer]]))
