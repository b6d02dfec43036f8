"""Adapters on disk: one folder, global experts, every tensor checked when it is read.

bank.safetensors           factors by parameter path, stacked over all experts: A [E, r, in], B [E, out, r]
manifest.json              banks, base fingerprint, versions, sha256 of each tensor and of itself
adapter_config.json        PEFT's, if the adapter is exactly LoRA; else a type that PEFT refuses
adapter_model.safetensors  PEFT's tensors, only if the adapter is exactly LoRA
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lora.attach import AttachReport, attach
from lora.config import BankConfig
from lora.errors import AdapterError
from lora.exactness import is_exactly_lora
from lora.peft_format import CONFIG_FILE, export_peft
from lora.presets import bank_of, check_banks, expand
from moe.convert import convert
from moe.families import find_moe_blocks

SCHEMA = 1
TENSORS_FILE = "bank.safetensors"
MANIFEST_FILE = "manifest.json"
LAYOUT = "A=E|1,r,in;C=E,r,r;B=E,out,r;router.weight=E,in"


@dataclass(frozen=True)
class Adapter:
    """A loaded adapter: CPU tensors by parameter path, over all experts, and the banks they belong to."""

    tensors: dict[str, Tensor]
    banks: dict[str, BankConfig]
    base_fingerprint: str


def collect_adapter(model: nn.Module) -> dict[str, Tensor]:
    """The adapter tensors of ``model`` by parameter path, on the CPU.

    Raises AdapterError if this process holds only some of the experts.
    """
    tensors = {}
    for path, parameter in model.named_parameters():
        if ".adapter." not in path:
            continue
        if parameter.address.global_shape != tuple(parameter.shape):
            raise AdapterError(
                f"{path} holds experts from {parameter.address.first_expert} on, "
                f"{parameter.shape[0]} of {parameter.address.num_experts}; gather them over the ranks first"
            )
        tensors[path] = parameter.detach().cpu()
    return tensors


def save_adapter(
    folder: str | Path,
    tensors: Mapping[str, Tensor],
    banks: Mapping[str, BankConfig],
    base_fingerprint: str,
    *,
    base_model: str | None = None,
) -> None:
    """Write an adapter folder, whole or not at all; one that is there is replaced.

    Args:
        tensors: by parameter path, stacked over *all* experts.
        base_fingerprint: identifies the weights that the adapter was trained on.
        base_model: path or name of the base model, for PEFT's configuration.

    Raises AdapterError if the tensors are not what the banks call for.
    """
    folder = Path(folder)
    check_banks(banks)
    _check_tensors(tensors, banks)
    stored = {path: tensor.detach().cpu().contiguous() for path, tensor in sorted(tensors.items())}
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        save_file(stored, temporary / TENSORS_FILE, metadata={"schema": str(SCHEMA), "layout": LAYOUT})
        if is_exactly_lora(banks):
            export_peft(temporary, stored, banks, base_model=base_model)
        else:
            _write_json(temporary / CONFIG_FILE, {"peft_type": "MOE_BANK", "base_model_name_or_path": base_model})
        _write_json(temporary / MANIFEST_FILE, _manifest(stored, banks, base_fingerprint))
        for file in temporary.iterdir():
            _sync(file)
        _put_in_place(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load_adapter(folder: str | Path) -> Adapter:
    """Read an adapter folder and verify every byte that is used.

    Raises AdapterError naming the file or tensor that is missing, damaged or not of this format.
    """
    folder = Path(folder)
    manifest = _read_manifest(folder / MANIFEST_FILE)
    banks = {
        name: BankConfig(**{key: tuple(v) if isinstance(v, list) else v for key, v in bank.items()})
        for name, bank in manifest["banks"].items()
    }
    expected: dict[str, dict[str, Any]] = manifest["tensors"]
    file = folder / TENSORS_FILE
    try:
        with safe_open(file, framework="pt") as reader:
            tensors = {path: reader.get_tensor(path) for path in reader.keys()}  # noqa: SIM118 - not a dict
    except FileNotFoundError:
        raise AdapterError(f"{folder} has no {TENSORS_FILE}; give a folder written by `planaria export`") from None
    except SafetensorError as error:
        raise AdapterError(f"{file} is damaged ({error}); export the adapter again") from error
    if missing := sorted(expected.keys() - tensors.keys()):
        raise AdapterError(f"{file} lacks the tensor {missing[0]}; export the adapter again")
    for path, tensor in tensors.items():
        if path not in expected:
            raise AdapterError(f"{file} has a tensor that its manifest does not know: {path}")
        if expected[path]["sha256"] != _digest(tensor):
            raise AdapterError(f"{file}: {path} is damaged, its checksum does not match; export the adapter again")
    check_banks(banks)
    _check_tensors(tensors, banks)
    return Adapter(tensors, banks, manifest["base_fingerprint"])


def apply_adapter(model: nn.Module, adapter: Adapter, *, base_fingerprint: str | None = None) -> AttachReport:
    """Attach ``adapter`` to ``model`` and load its values; everything else is frozen.

    Plain transformers experts are replaced by :class:`~moe.experts.Experts` around the same parameters;
    experts that already have the seam's attributes stay. Expert-parallel experts take their share.

    Args:
        base_fingerprint: of ``model``, if known; must then be the one the adapter was trained on.

    Raises AdapterError if the adapter does not fit the model, naming the tensor.
    """
    if base_fingerprint is not None and base_fingerprint != adapter.base_fingerprint:
        raise AdapterError(
            f"the adapter was trained on base {adapter.base_fingerprint}, this model is {base_fingerprint}; "
            "use the base model it was exported with"
        )
    blocks = []
    sites = {expand(bank).site for bank in adapter.banks.values()}
    if sites & {"experts", "parallel"}:
        blocks = find_moe_blocks(model)
        if not all(hasattr(block.experts, "adapter") for block in blocks):
            blocks = convert(model)
    layout_ep = blocks[0].experts.ep_size if blocks else 1
    report = attach(model, adapter.banks, blocks, layout_ep=layout_ep)
    _load(model, adapter)
    return report


@torch.no_grad()
def _load(model: nn.Module, adapter: Adapter) -> None:
    places = {path: p for path, p in model.named_parameters() if ".adapter." in path}
    if surplus := sorted(adapter.tensors.keys() - places.keys()):
        raise AdapterError(f"the model has no place for the adapter tensor {surplus[0]}; is it another base model?")
    for path, parameter in places.items():
        tensor, address = adapter.tensors.get(path), parameter.address
        if tensor is None:
            raise AdapterError(f"the adapter has no tensor {path}, which the model needs; is it another base model?")
        if tuple(tensor.shape) != address.global_shape:
            raise AdapterError(
                f"{path}: the adapter has shape {tuple(tensor.shape)}, the model needs {address.global_shape}"
            )
        first = address.first_expert
        parameter.copy_(tensor[first : first + parameter.shape[0]])


def _check_tensors(tensors: Mapping[str, Tensor], banks: Mapping[str, BankConfig]) -> None:
    if not banks:
        raise AdapterError("an adapter needs at least one bank")
    used = set()
    for path, tensor in tensors.items():
        name = bank_of(path, banks) if ".adapter." in path else None
        if name is None:
            raise AdapterError(f"{path} belongs to none of the banks {', '.join(banks)}")
        used.add(name)
        factor = path.rpartition(".")[2]
        if ".adapter.router." in path:
            fits = tensor.dim() == (1 if factor == "threshold_bias" else 2)
        elif factor == "C":
            fits = tensor.dim() == 3 and tensor.shape[1] == tensor.shape[2]
        elif expand(banks[name]).kind == "scale":
            fits = factor == "B" and tensor.dim() == 3 and tensor.shape[2] == 1
        else:
            fits = tensor.dim() == 3
            if (partner := path[:-1] + ("B" if factor == "A" else "A")) not in tensors:
                raise AdapterError(f"{path} is there, but {partner} is not")
            fits = fits and tensor.shape[1 if factor == "A" else 2] == tensors[partner].shape[2 if factor == "A" else 1]
        if not fits:
            raise AdapterError(f"{path}: shape {tuple(tensor.shape)} is not {LAYOUT} ({name})")
    if empty := [name for name in banks if name not in used]:
        raise AdapterError(f"adapter.{empty[0]} has no tensors")


def _manifest(tensors: Mapping[str, Tensor], banks: Mapping[str, BankConfig], base: str) -> dict[str, Any]:
    versions = {}
    for package in ("planaria", "torch", "transformers", "peft", "safetensors"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    manifest = {
        "schema": SCHEMA,
        "layout": LAYOUT,
        "base_fingerprint": base,
        "banks": {name: asdict(bank) | {"targets": list(bank.targets)} for name, bank in banks.items()},
        "loads_in_peft": is_exactly_lora(banks),
        "versions": versions,
        "tensors": {
            path: {
                "shape": list(tensor.shape),
                "dtype": str(tensor.dtype).removeprefix("torch."),
                "sha256": _digest(tensor),
            }
            for path, tensor in tensors.items()
        },
    }
    return manifest | {"sha256": _seal(manifest)}


def _read_manifest(file: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        sealed = manifest.pop("sha256")
    except (FileNotFoundError, NotADirectoryError):
        raise AdapterError(f"{file.parent} is no adapter: it has no {MANIFEST_FILE}") from None
    except (ValueError, KeyError, AttributeError) as error:
        raise AdapterError(f"{file} is damaged ({error}); export the adapter again") from error
    if manifest.get("schema") != SCHEMA:
        raise AdapterError(f"{file} has schema {manifest.get('schema')}, this version reads {SCHEMA}")
    if sealed != _seal(manifest):
        raise AdapterError(f"{file} is damaged: its own checksum does not match; export the adapter again")
    return manifest


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().flatten().view(torch.uint8).numpy()).hexdigest()


def _seal(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _put_in_place(temporary: Path, folder: Path) -> None:
    old = folder.with_name(f"{folder.name}.old-{os.getpid()}")
    if folder.exists():
        folder.rename(old)
    temporary.rename(folder)
    _sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)
