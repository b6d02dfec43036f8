"""Which safetensors files a model folder consists of, and what their headers say. No torch here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, BinaryIO

from inference.errors import InferenceError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def shard_names(folder: Path) -> list[str]:
    """Raises InferenceError if the folder has none, lacks one, or its index is none."""
    index = folder / INDEX
    if not index.exists():
        if (folder / SINGLE).exists():
            return [SINGLE]
        raise InferenceError(
            f"{folder}: no {SINGLE} and no {INDEX}; the runtime reads safetensors only: export the model again, or "
            "save it with `save_pretrained`"
        )
    try:
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InferenceError(f"{index}: not a safetensors index ({error!r}); copy the folder again") from error
    for file in files:
        if not isinstance(file, str) or not (folder / file).exists():
            raise InferenceError(f"{folder / str(file)}: listed in {INDEX} but missing; copy the folder again")
    return files


def read_header(opened: BinaryIO) -> tuple[dict[str, Any], int]:
    """The header of an opened safetensors file, and where its data begins. Raises ValueError if it is no JSON."""
    length = int.from_bytes(opened.read(8), "little")
    return json.loads(opened.read(length)), 8 + length
