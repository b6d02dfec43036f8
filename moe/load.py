"""A model from a Hugging Face folder, tensor by tensor: each rank reads what it holds and nothing else.

>>> # model = empty_model(folder, dtype=torch.bfloat16)
>>> # blocks = convert(model, Layout(world=8, ep=8), rank)
>>> # fill(model, folder)

The result has the bits of transformers' ``from_pretrained``. Whatever the folder lacks, has too much or has in another
shape is an error that names it, so nothing keeps the values it was initialised with.

Shapes: E experts, L local experts, I intermediate, H hidden.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from moe.build import in_dtype
from moe.families import FamilyError
from moe.family_table import DENSE, FAMILIES, family_of, known_families
from moe.quantised import quantisation
from moe.refs import TensorAddress

_FLOATS = ("F64", "F32", "BF16", "F16")
_SHOWN = 5  # tensors that an error names
_FUSED = "gate_up_proj"


class FolderError(FamilyError):
    """A model folder cannot be loaded, or must not be written: what, where, and what to do."""


def read_config(folder: str | Path) -> PreTrainedConfig:
    """The folder's configuration. Raises FolderError if there is none, or if it is of no family we know."""
    path = Path(folder) / "config.json"
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        raise FolderError(
            f"{folder} has no config.json; give a Hugging Face model folder, e.g. one written by `planaria export`"
        ) from None
    except (OSError, ValueError) as error:
        raise FolderError(f"{path} cannot be read ({error}); copy the folder again") from error
    kind = found.get("model_type") if isinstance(found, dict) else None
    if kind not in FAMILIES and kind not in DENSE:
        raise FolderError(
            f"{path}: looked for model_type {known_families()}, or for adapters {', '.join(DENSE)}; found {kind!r}; "
            "train a model of one of these families"
        )
    if why := quantisation(path.parent, found):
        raise FolderError(why)
    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FolderError(f"{path}: transformers cannot read it: {error}") from error


def empty_model(
    source: str | Path | PreTrainedConfig, *, dtype: torch.dtype, overrides: Mapping[str, Any] | None = None
) -> PreTrainedModel:
    """The model of a folder or configuration, its parameters on the meta device, buffers as transformers makes them.

    Args:
        overrides: of the configuration, such as dropout.
    Raises FolderError.
    """
    config = source if isinstance(source, PreTrainedConfig) else read_config(source)
    for name, value in (overrides or {}).items():
        setattr(config, name, value)
    attention = family_of(config.model_type).attention
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32)
    model.tie_weights()  # what was tied before it became empty is no longer
    return in_dtype(model, dtype).eval()


def fill(model: PreTrainedModel, folder: str | Path) -> int:
    """Read this rank's tensors into a converted ``model`` of :func:`empty_model`; returns the bytes that were read.

    Raises FolderError naming all tensors that are missing, misshapen, of another kind, or not the model's.
    """
    with_names = _Names(family_of(model.config.model_type).expert_names, _block_names(model.config.model_type))
    files = TensorFiles(Path(folder))
    plan = _Plan(files, with_names)
    for path, tensor in _stored(model):
        plan.add(path, tensor)
    for path, kept in _tied(model).items():
        plan.add_alias(path, kept)
    plan.check(model)
    replaced: dict[int, Tensor] = {}
    for path, tensor in _stored(model):
        replaced[id(tensor)] = _read(files, plan.pieces[path], tensor)
    _replace(model, replaced)
    for path, kept in plan.aliases.items():
        if not torch.equal(files.read(path), files.read(kept)):
            raise FolderError(f"{folder}: {path} is tied to {kept} and yet another tensor; untie them in config.json")
    return files.bytes_read


def _block_names(kind: str) -> tuple[str, str]:
    return ".mlp.", f".{family_of(kind).block_on_disk}."


def _stored(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, each once, and persistent buffers, by path."""
    yield from model.named_parameters()
    persistent = model.state_dict(keep_vars=True)
    yield from ((path, buffer) for path, buffer in model.named_buffers() if path in persistent)


def _tied(model: nn.Module) -> dict[str, str]:
    """Paths that share another path's parameter."""
    first: dict[int, str] = {}
    tied = {}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        if first.setdefault(id(parameter), path) != path:
            tied[path] = first[id(parameter)]
    return tied


@dataclass(frozen=True)
class _Piece:
    """One tensor of a file, or ``rows`` of it, and where in the local parameter it goes."""

    name: str
    shape: tuple[int, ...]  # whole, in the file
    rows: tuple[int, int] | None = None
    at: tuple[int | slice, ...] = ()


@dataclass(frozen=True)
class _Names:
    """What files call a tensor of the model."""

    expert: tuple[str, str, str] | None
    block: tuple[str, str]

    def of(self, path: str, files: TensorFiles) -> str:
        renamed = path.replace(*self.block)
        return path if path in files and renamed not in files else renamed

    def pieces(self, path: str, tensor: Tensor, files: TensorFiles) -> list[_Piece]:
        """The parts that make up a local parameter or buffer."""
        address: TensorAddress | None = getattr(tensor, "address", None)
        if address is None or not address.is_expert:
            return [_Piece(self.of(path, files), tuple(tensor.shape))]
        fused, first = self.of(path, files), address.first_expert
        if self.expert is None or fused in files:
            return [_Piece(fused, address.global_shape, rows=(first, first + tensor.shape[0]))]
        return [piece for i in range(tensor.shape[0]) for piece in self._expert(fused, address, i)]

    def _expert(self, fused: str, address: TensorAddress, i: int) -> list[_Piece]:
        assert self.expert is not None
        gate, up, down = self.expert
        parent, rows, columns = fused.rpartition(".")[0], *address.shape[1:]
        prefix = f"{parent}.{address.first_expert + i}"
        if address.tensor != _FUSED:
            return [_Piece(f"{prefix}.{down}.weight", (rows, columns), at=(i,))]
        half = rows // 2
        return [
            _Piece(f"{prefix}.{gate}.weight", (half, columns), at=(i, slice(0, half))),
            _Piece(f"{prefix}.{up}.weight", (half, columns), at=(i, slice(half, rows))),
        ]

    def others(self, path: str, tensor: Tensor, files: TensorFiles) -> list[str]:
        """Files' names of the same tensor in the experts of all ranks: they must be there, but are not read."""
        address: TensorAddress | None = getattr(tensor, "address", None)
        fused = self.of(path, files)
        if address is None or not address.is_expert or self.expert is None or fused in files:
            return []
        parent, kinds = fused.rpartition(".")[0], self.expert[:2] if address.tensor == _FUSED else self.expert[2:]
        return [f"{parent}.{e}.{kind}.weight" for e in range(address.num_experts) for kind in kinds]


@dataclass
class _Plan:
    """What will be read from where; :meth:`check` compares it with the folder before a byte is read."""

    files: TensorFiles
    names: _Names
    pieces: dict[str, list[_Piece]] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    expected: set[str] = field(default_factory=set)

    def add(self, path: str, tensor: Tensor) -> None:
        self.pieces[path] = self.names.pieces(path, tensor, self.files)
        self.expected |= {piece.name for piece in self.pieces[path]}
        self.expected |= set(self.names.others(path, tensor, self.files))

    def add_alias(self, path: str, kept: str) -> None:
        """``path`` is tied to ``kept``; files may have it nevertheless, or it alone."""
        if path in self.files and kept in self.files:
            self.aliases[path] = kept
        elif path in self.files:
            self.expected -= {kept}
            self.expected |= {path}
            self.pieces[kept] = [_Piece(path, piece.shape) for piece in self.pieces[kept]]

    def check(self, model: PreTrainedModel) -> None:
        problems = []
        ignored = [re.compile(p) for p in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()]
        surplus = set(self.files) - self.expected - set(self.aliases)
        surplus = {name for name in surplus if not any(pattern.search(name) for pattern in ignored)}
        if missing := sorted(self.expected - set(self.files)):
            problems.append(f"missing {_some(missing)}")
        if surplus:
            problems.append(f"not in the model {_some(sorted(surplus))}")
        for piece in (piece for pieces in self.pieces.values() for piece in pieces if piece.name in self.files):
            shape, dtype = self.files.describe(piece.name)
            if shape != piece.shape:
                problems.append(f"{piece.name} has shape {list(shape)}, config.json asks for {list(piece.shape)}")
            elif dtype not in _FLOATS:
                problems.append(f"{piece.name} is {dtype}; only {', '.join(_FLOATS)} can be trained")
        if problems:
            shown = "; ".join(problems[:_SHOWN]) + (f"; and {len(problems) - _SHOWN} more" * (len(problems) > _SHOWN))
            raise FolderError(
                f"{self.files.folder} does not hold the {model.config.model_type} model that its config.json "
                f"describes: {shown}; copy or export it again"
            )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _read(files: TensorFiles, pieces: list[_Piece], like: Tensor) -> Tensor:
    """A tensor of ``like``'s local shape and dtype from its pieces."""
    target = torch.empty(like.shape, dtype=like.dtype)
    for piece in pieces:
        (target[piece.at] if piece.at else target).copy_(files.read(piece.name, piece.rows))
    return target


def _replace(model: nn.Module, replaced: Mapping[int, Tensor]) -> None:
    """Put the tensors in the places of those whose ids they are kept under; tied places get one Parameter."""
    parameters: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, old in list(module._parameters.items()):
            if old is None or id(old) not in replaced:
                continue
            if id(old) not in parameters:
                parameters[id(old)] = nn.Parameter(replaced[id(old)], requires_grad=old.requires_grad)
                vars(parameters[id(old)]).update(vars(old))
            module._parameters[name] = parameters[id(old)]
        for old in module._buffers.values():
            if old is not None and id(old) in replaced:
                old.copy_(replaced[id(old)])


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """What state dicts and files hold besides parameters, by path."""
    parameters = {path for path, _ in model.named_parameters()}
    return {path: tensor for path, tensor in _stored(model) if path not in parameters}


def read_buffers(model: PreTrainedModel, folder: str | Path) -> None:
    """Only the persistent buffers of a model, in place; see :func:`fill`."""
    names = _Names(None, _block_names(model.config.model_type))
    buffers, files = persistent_buffers(model), TensorFiles(Path(folder))
    for path, buffer in buffers.items():
        name = names.of(path, files)
        if name not in files:
            raise FolderError(f"{folder}: {name} is missing; copy or export it again")
        buffer.copy_(files.read(name))


class TensorFiles:
    """The tensors of a folder's safetensors files by name. Counts what is read.

    Raises FolderError if there are no files, one of the index is absent, or one is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bytes_read = 0
        self._home: dict[str, Any] = {}
        for path in self._paths():
            try:
                handle = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as error:
                raise FolderError(f"{path} is no whole safetensors file ({error}); copy the folder again") from error
            self._home |= dict.fromkeys(handle.keys(), handle)

    def _paths(self) -> list[Path]:
        index = self.folder / "model.safetensors.index.json"
        if not index.is_file():
            paths = sorted(self.folder.glob("model*.safetensors"))
            if not paths:
                raise FolderError(f"{self.folder} holds no model*.safetensors; save the model as safetensors there")
            return paths
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise FolderError(f"{index} is no index of safetensors files ({error}); copy the folder again") from error
        if absent := [name for name in names if not (self.folder / name).is_file()]:
            raise FolderError(f"{self.folder} lacks {_some(absent)}, which its index names; copy the folder again")
        return [self.folder / name for name in names]

    def __contains__(self, name: str) -> bool:
        return name in self._home

    def __iter__(self) -> Iterator[str]:
        return iter(self._home)

    def describe(self, name: str) -> tuple[tuple[int, ...], str]:
        """Shape and safetensors' name of the dtype."""
        found = self._home[name].get_slice(name)
        return tuple(found.get_shape()), found.get_dtype()

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """The tensor, or rows ``[first, last)`` of it."""
        handle = self._home[name]
        tensor = handle.get_tensor(name) if rows is None else handle.get_slice(name)[rows[0] : rows[1]]
        self.bytes_read += tensor.nbytes
        return tensor
