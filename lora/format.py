"""Adapters on disk: one folder, global experts, every tensor checked when it is read.

bank.safetensors           tensors by parameter path, over all experts: factors A, B, C, scales, routers, whatever a
                           bank trains, under the names and in the shapes that the model holds them
manifest.json              banks with every field, base fingerprint, versions, exact exports, sha256 of each tensor
adapter_config.json        PEFT's, if the adapter is exactly LoRA; else a type that PEFT refuses
adapter_model.safetensors  PEFT's tensors, only if the adapter is exactly LoRA

Shapes: E experts (1, or no axis, where experts share a factor), r rank.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lora.attach import AttachReport, attach
from lora.base_facts import BaseFacts
from lora.config import BankConfig
from lora.deltas import split_factor
from lora.errors import AdapterError
from lora.exactness import is_exactly_lora
from lora.manifest import LAYOUT, MANIFEST_FILE, SCHEMA, banks_of, digest, make_manifest, read_manifest
from lora.owners import owners_of
from lora.peft_format import CONFIG_FILE, WEIGHTS_FILE, peft_files, write_files
from lora.presets import check_banks, expand
from lora.targets import Places
from moe.convert import convert
from moe.families import find_moe_blocks

TENSORS_FILE = "bank.safetensors"
FILES = (TENSORS_FILE, MANIFEST_FILE, CONFIG_FILE, WEIGHTS_FILE)
_CLOSED = "MOE_BANK"  # no PEFT has this type, so every PEFT refuses it by name


@dataclass(frozen=True)
class Adapter:
    """A loaded adapter: CPU tensors by parameter path, over all experts, and the banks they belong to.

    Attributes:
        base: what else was known of the base model when it was saved.
        topology: of the run that trained it, if it was given.
        owners: the bank of each tensor; if empty, it is found by :func:`lora.owners.owners_of`.
    """

    tensors: dict[str, Tensor]
    banks: dict[str, BankConfig]
    base_fingerprint: str
    base: BaseFacts = field(default_factory=BaseFacts)
    topology: Mapping[str, Any] | None = None
    owners: Mapping[str, str] = field(default_factory=dict)


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
    topology: Mapping[str, Any] | None = None,
    places: Places | None = None,
) -> None:
    """Write an adapter folder, whole or not at all; an adapter that is there is replaced.

    Args:
        tensors: by parameter path, stacked over *all* experts.
        base_fingerprint: identifies the weights that the adapter was trained on.
        base_model: path or name of the base model, for PEFT's configuration.
        topology: of the run: workers, expert-parallel degree and the like, to be kept.
        places: of the base model, which tell whose a tensor is where targets with wildcards leave that open.

    Raises AdapterError if the tensors are not what the banks call for, or the folder holds anything else.
    """
    folder = Path(folder)
    check_banks(banks)
    owners = owners_of(tensors, banks, places)
    _check_tensors(tensors, banks, owners)
    _check_place(folder)
    stored = {path: tensor.detach().cpu().contiguous() for path, tensor in sorted(tensors.items())}
    base = BaseFacts.read(base_model)
    # Whether the experts' number is known decides if shared factors can be given to each of them.
    shared = any(expand(bank).site == "experts" and expand(bank).share == "all" for bank in banks.values())
    peft = is_exactly_lora(banks) and not (shared and base.routed_experts is None)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        save_file(stored, temporary / TENSORS_FILE, metadata={"schema": str(SCHEMA), "layout": LAYOUT})
        if peft:
            write_files(temporary, *peft_files(stored, banks, base, owners=owners))
        else:
            _write_json(temporary / CONFIG_FILE, {"peft_type": _CLOSED, "base_model_name_or_path": base_model})
        manifest = make_manifest(
            stored,
            banks,
            owners,
            base_fingerprint,
            base=base,
            topology=topology,
            loads_in_peft=peft,
        )
        _write_json(temporary / MANIFEST_FILE, manifest)
        for file in temporary.iterdir():
            _sync(file)
        _put_in_place(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load_adapter(folder: str | Path) -> Adapter:
    """Read an adapter folder and verify every byte that is used. Banks come with every field filled in.

    Raises AdapterError naming the file or tensor that is missing, damaged or not of this format.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    banks = banks_of(manifest, folder)
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
            raise AdapterError(f"{file} has a tensor that its manifest does not know: {path}; export the adapter again")
        if expected[path]["sha256"] != digest(tensor):
            raise AdapterError(f"{file}: {path} is damaged, its checksum does not match; export the adapter again")
        if expected[path]["shape"] != list(tensor.shape) or f"torch.{expected[path]['dtype']}" != str(tensor.dtype):
            raise AdapterError(f"{file}: {path} has another shape or dtype than its manifest; export the adapter again")
    check_banks(banks)
    kept = {path: entry["bank"] for path, entry in expected.items() if "bank" in entry}
    owners = kept or owners_of(tensors, banks)
    _check_tensors(tensors, banks, owners)
    base = BaseFacts(**manifest.get("base", {}))
    return Adapter(tensors, banks, manifest["base_fingerprint"], base, manifest.get("topology"), owners)


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
    if any(expand(bank).site in ("experts", "parallel") for bank in adapter.banks.values()):
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
    tensors = {_present_name(path, places): tensor for path, tensor in adapter.tensors.items()}
    if surplus := sorted(tensors.keys() - places.keys()):
        raise AdapterError(f"the model has no place for the adapter tensor {surplus[0]}; is it another base model?")
    for path, parameter in places.items():
        tensor, address = tensors.get(path), parameter.address
        if tensor is None:
            raise AdapterError(f"the adapter has no tensor {path}, which the model needs; is it another base model?")
        if tuple(tensor.shape) != address.global_shape:
            raise AdapterError(
                f"{path}: the adapter has shape {tuple(tensor.shape)}, the model needs {address.global_shape}"
            )
        first = address.first_expert
        parameter.copy_(tensor[first : first + parameter.shape[0]] if address.is_expert else tensor)


def _present_name(path: str, places: Mapping[str, nn.Parameter]) -> str:
    """Routers of schema 1 were one tensor; a router's only tensor goes by another name since."""
    if path in places or not path.endswith(".adapter.router"):
        return path
    inside = [place for place in places if place.startswith(f"{path}.")]
    return inside[0] if len(inside) == 1 else path


def _check_tensors(tensors: Mapping[str, Tensor], banks: Mapping[str, BankConfig], owners: Mapping[str, str]) -> None:
    """What can be said without the model; :func:`apply_adapter` compares every name and shape with the model's."""
    if not banks:
        raise AdapterError("an adapter needs at least one bank")
    used = set(owners.values())
    sites: dict[tuple[str, str], dict[str, str]] = {}
    for path in tensors:
        if owners.get(path) not in banks:
            raise AdapterError(f"{path} belongs to none of the banks {', '.join(banks)}")
        place, inner, factor = split_factor(path)
        if factor:
            sites.setdefault((place, inner), {})[factor] = path
    for paths in sites.values():
        full = expand(banks[owners[next(iter(paths.values()))]])
        _check_factors(paths, tensors, full)
    if empty := [name for name in banks if name not in used]:
        raise AdapterError(f"adapter.{empty[0]} has no tensors")


def _check_factors(paths: Mapping[str, str], tensors: Mapping[str, Tensor], full: BankConfig) -> None:
    here = next(iter(paths.values()))
    if full.kind == "scale":
        return
    for factor in ("A", "B"):
        if factor not in paths:
            raise AdapterError(f"{here} is there, but {here[:-1]}{factor} is not")
    ranks, counts = set(), set()
    for factor, path in paths.items():
        shape = tuple(tensors[path].shape)
        if len(shape) not in (2, 3):
            raise AdapterError(f"{path}: shape {shape} is not {LAYOUT}")
        ranks |= {"A": {shape[-2]}, "B": {shape[-1]}, "C": set(shape[-2:])}[factor]
        counts |= {shape[0]} if len(shape) == 3 else {1}
    if len(ranks) > 1 or len(counts - {1}) > 1:
        shapes = ", ".join(f"{factor} {tuple(tensors[path].shape)}" for factor, path in paths.items())
        raise AdapterError(f"{here[:-2]}: the shapes {shapes} do not agree; they must be {LAYOUT}")


def _check_place(folder: Path) -> None:
    """Only an adapter may be replaced: whatever else is there is somebody's."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise AdapterError(f"{folder} is a file; give another folder or remove it")
    found = {path.name for path in folder.iterdir()}
    foreign = sorted(found - set(FILES)) or sorted(found if MANIFEST_FILE not in found else ())
    if foreign:
        raise AdapterError(f"{folder} holds {foreign[0]}, which is no file of an adapter; give another folder")


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
