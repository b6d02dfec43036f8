"""Folders whose configuration says that their weights are quantised, whether they are or not (no torch here)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_PLAIN = {"F64", "F32", "BF16", "F16", "I64", "I32", "BOOL"}  # the last three are buffers'


def quantisation(folder: Path, config: Mapping[str, Any]) -> str | None:
    """Why a folder with this config.json is refused, with what its files hold; None if it names no quantisation.

    Plain weights beside such an entry are refused, too: either it was left behind when they were dequantised, or they
    are not the model's, and only the user knows which.
    """
    named = config.get("quantization_config")
    if not named:
        return None
    method = named.get("quant_method", "no quant_method") if isinstance(named, Mapping) else repr(named)
    says = f"{folder / 'config.json'} has a quantization_config ({method})"
    plain: dict[str, str] = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, dtype in _dtypes(file).items():
            if dtype not in _PLAIN:
                return (
                    f"{says}, and {file.name} is quantised: its {name} is {dtype}; load the model with transformers, "
                    "dequantised, and save it in bf16"
                )
            plain.setdefault(file.name, dtype)
    found = ", ".join(f"{dtype} in {name}" for name, dtype in plain.items()) or "none"
    return (
        f"{says}, but all weights beside it are plain ({found}); remove the entry if they are the dequantised model, "
        "else copy the folder again"
    )


def _dtypes(file: Path) -> dict[str, str]:
    """By tensor; of a damaged file nothing, since whoever opens it says so."""
    try:
        with file.open("rb") as opened:
            header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
        return {name: str(facts["dtype"]) for name, facts in header.items() if name != "__metadata__"}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, MemoryError):
        return {}
