"""The recipe's optimizers: which keys each has, and their defaults (no torch here)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

from trainer.schema import TrainSection

if TYPE_CHECKING:
    from trainer.recipe_view import Finding, View

OPTIMIZER_KEYS: dict[str, dict[str, float]] = {
    "adamw": {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8},
    "sgd": {"momentum": 0.9},
    "lion": {"beta1": 0.9, "beta2": 0.99},  # the paper's
}

_KEYS = tuple(dict.fromkeys(key for keys in OPTIMIZER_KEYS.values() for key in keys))


def resolved_optimizer(train: TrainSection) -> TrainSection:
    """The optimizer's own defaults written out; keys of other optimizers stay None."""
    given = {key: value for key in _KEYS if (value := getattr(train, key)) is not None}
    return dataclasses.replace(train, **{**OPTIMIZER_KEYS[train.optimizer], **given})


def _keys(view: View) -> Iterator[Finding]:
    optimizer = view("train.optimizer")
    for key in _KEYS:
        if view.given(f"train.{key}") and key not in OPTIMIZER_KEYS[optimizer]:
            owners = " or ".join(name for name, keys in OPTIMIZER_KEYS.items() if key in keys)
            has = ", ".join(OPTIMIZER_KEYS[optimizer])
            yield f"train.{key}", f"train.{key} is of {owners}; train.optimizer: {optimizer} has {has}; remove it"


OPTIMIZER_RULES = (_keys,)
