"""An adapter folder's ``manifest.json``: what the adapter is, on which base, and the checksum of every tensor.

Schema 2 keeps every field of each bank, so that a later change of a preset's defaults changes no adapter that exists.
Schema 1 kept seven fields, of the presets expert-lora and mola; it is still read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora.base_facts import BaseFacts
from lora.combinations import used_fields
from lora.config import BankConfig
from lora.errors import AdapterError
from lora.exactness import obstacles
from lora.presets import expand

SCHEMA = 2
MANIFEST_FILE = "manifest.json"
LAYOUT = "A=E,r,in;B=E,out,r;C=E,r,r;delta=scale*B*C*A"
_PACKAGES = ("planaria", "torch", "transformers", "peft", "safetensors")
# What schema 1 said of a bank, where its preset had a use for it.
_FIRST_FIELDS = {
    "expert-lora": ("preset", "targets", "r", "alpha"),
    "mola": ("preset", "targets", "r", "alpha", "num_experts", "top_k", "router_aux_loss_coef"),
}


def make_manifest(
    tensors: Mapping[str, Tensor],
    banks: Mapping[str, BankConfig],
    owners: Mapping[str, str],
    base_fingerprint: str,
    *,
    base: BaseFacts,
    topology: Mapping[str, Any] | None,
    loads_in_peft: bool,
) -> dict[str, Any]:
    manifest = {
        "schema": SCHEMA,
        "layout": LAYOUT,
        "base_fingerprint": base_fingerprint,
        "base": asdict(base),
        "banks": {name: asdict(expand(bank)) for name, bank in banks.items()},
        "exports": {form: why or "exact" for form, why in obstacles(banks).items()},
        "loads_in_peft": loads_in_peft,
        "topology": dict(topology) if topology else None,
        "versions": _versions(),
        "tensors": {
            path: {
                "bank": owners[path],
                "shape": list(tensor.shape),
                "dtype": str(tensor.dtype).removeprefix("torch."),
                "sha256": digest(tensor),
            }
            for path, tensor in tensors.items()
        },
    }
    return manifest | {"sha256": _seal(manifest)}


def read_manifest(folder: Path) -> dict[str, Any]:
    """The folder's manifest, sealed and of a schema that we know.

    Raises AdapterError naming the file, and what is wrong with it.
    """
    file = folder / MANIFEST_FILE
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        sealed = manifest.pop("sha256")
    except (FileNotFoundError, NotADirectoryError):
        raise AdapterError(f"{folder} is no adapter: it has no {MANIFEST_FILE}{_hint(folder)}") from None
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise AdapterError(f"{file} is damaged ({error}); export the adapter again") from error
    if manifest.get("schema") not in (1, SCHEMA):
        raise AdapterError(
            f"{file} has schema {manifest.get('schema')}, this version reads 1 and {SCHEMA}; read it with the version "
            f"that wrote it ({manifest.get('versions', {}).get('planaria', 'unknown')})"
        )
    if sealed != _seal(manifest):
        raise AdapterError(f"{file} is damaged: its own checksum does not match; export the adapter again")
    return dict(manifest)


def banks_of(manifest: Mapping[str, Any], folder: Path) -> dict[str, BankConfig]:
    """The banks with every field. Raises AdapterError for a preset or field that this version does not know."""
    return {name: _bank(name, dict(values), manifest["schema"], folder) for name, values in manifest["banks"].items()}


def _bank(name: str, values: dict[str, Any], schema: int, folder: Path) -> BankConfig:
    where = f"{folder / MANIFEST_FILE}: adapter.{name}"
    if schema == 1:
        kept = _FIRST_FIELDS.get(values.get("preset", ""))
        if kept is None:
            raise AdapterError(
                f"{where} has preset {values.get('preset')!r}, which schema 1 never had; export it again"
            )
        values = {field: values[field] for field in kept if field in values}
    known = {field.name for field in fields(BankConfig)}
    if unknown := sorted(values.keys() - known):
        raise AdapterError(f"{where} has the field {unknown[0]!r}, which this version does not know; use a newer one")
    try:
        full = expand(BankConfig(**{key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}))
    except (AdapterError, TypeError) as error:
        raise AdapterError(f"{where}: {error}; use the version that wrote it") from error
    # Fields without an effect follow the preset: they would look like a choice where its default has changed since.
    preset, idle = expand(BankConfig(full.preset)), known.difference(used_fields(full))
    return replace(full, **{field: getattr(preset, field) for field in idle})


def digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().flatten().view(torch.uint8).numpy()).hexdigest()


def _seal(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _versions() -> dict[str, str]:
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def _hint(folder: Path) -> str:
    if (folder / "adapter_config.json").is_file():
        return ", but PEFT's adapter_config.json; make an adapter of it with `planaria adapter import`"
    if (folder / "adapter" / MANIFEST_FILE).is_file():
        return f"; give {folder / 'adapter'}"
    return "; give a folder written by `planaria export`"
