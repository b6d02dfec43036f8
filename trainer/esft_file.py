"""The file that says which experts train (`planaria esft select` writes it); no torch here.

``{"score": "token", "p": 0.2, "tokens": 131072, "layers": {"0": [3, 17], ...}}``; a person may write ``layers`` alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class SelectionError(ValueError):
    """The file of trainable experts cannot be used; says where and what to do."""


def read_selection(path: str) -> dict[int, tuple[int, ...]]:
    """Experts by layer. Raises SelectionError."""
    try:
        found = json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise SelectionError(
            f"model.trainable_experts: no {path}; make it with `planaria esft select RECIPE {path}`"
        ) from None
    except (OSError, ValueError) as error:
        raise SelectionError(f"model.trainable_experts: {path} cannot be read ({error}); select again") from error
    layers = found.get("layers") if isinstance(found, dict) else None
    if not isinstance(layers, dict) or not all(_good(layer, experts) for layer, experts in layers.items()):
        raise SelectionError(f'model.trainable_experts: {path} must hold {{"layers": {{"0": [3, 17]}}}}; select again')
    if not any(layers.values()):
        raise SelectionError(f"model.trainable_experts: {path} chooses no expert; select again with a larger --p")
    return {int(layer): tuple(experts) for layer, experts in layers.items()}


def _good(layer: str, experts: Any) -> bool:
    return layer.isdecimal() and isinstance(experts, list) and all(type(e) is int and e >= 0 for e in experts)


def selection_digest(path: str) -> str:
    """What a run's identity has of the file: the experts, not how they were found. Raises SelectionError."""
    canonical = json.dumps({str(k): sorted(set(v)) for k, v in sorted(read_selection(path).items())})
    return hashlib.sha256(canonical.encode()).hexdigest()


def write_selection(path: str, facts: Mapping[str, Any], layers: Mapping[int, Sequence[int]]) -> None:
    """Raises SelectionError if the file exists."""
    if Path(path).exists():
        raise SelectionError(f"{path} exists; give another file or remove it")
    shown = {**facts, "layers": {str(layer): list(experts) for layer, experts in layers.items()}}
    Path(path).write_text(json.dumps(shown, indent=1) + "\n")
