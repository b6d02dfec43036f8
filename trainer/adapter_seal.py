"""Trained adapters that a recipe names: whether they are there, and which ones they are; no torch here."""

from __future__ import annotations

import json
from pathlib import Path

from lora.errors import AdapterError

_MANIFEST = "manifest.json"


def adapter_problem(folder: str) -> str:
    """Why there is no adapter in ``folder``, and what to do; empty if there is one."""
    if (Path(folder) / _MANIFEST).is_file():
        return ""
    if (Path(folder) / "adapter_config.json").is_file():
        return f"{folder} is PEFT's; make an adapter of it with `planaria adapter import` and name that one"
    return f"{folder} is no adapter, it has no {_MANIFEST}; name the folder `adapter` that `planaria export` wrote"


def adapter_seal(folder: str) -> str:
    """The checksum over the folder's manifest, which holds those of all its tensors. Raises AdapterError."""
    if problem := adapter_problem(folder):
        raise AdapterError(problem)
    try:
        seal = json.loads((Path(folder) / _MANIFEST).read_text(encoding="utf-8"))["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AdapterError(f"{folder}/{_MANIFEST} is damaged ({error}); export the adapter again") from error
    return str(seal)
