"""Expert weights where they lie: in the safetensors files of a model folder.

Nothing is read until an expert is asked for, and then only its own bytes. They are read, not mapped, into the block
that is to hold them: of a file that is cut short meanwhile, a read says so, where a mapping would kill the process.

Shapes: E experts, B elements of a block, I intermediate, H hidden.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from inference.errors import InferenceError
from inference.expert_block import ExpertBlock, ExpertShape
from inference.shards import read_header, shard_names
from moe.refs import ExpertRef

# How families call (gate, up, down) when every expert has its own tensors.
SPLIT_NAMES = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
Span = tuple[int, int]
FLOAT_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def stored_names(name: str) -> tuple[str, ...]:
    """The names a file may use for the model's tensor ``name``, most usual first (Mixtral's files say otherwise)."""
    return (name, name.replace(".mlp.", ".block_sparse_moe."))


class TensorFiles:
    """All tensors of a model folder by name: as views of the mapped files, or read from them.

    Raises InferenceError if the folder has no safetensors, lacks a shard, or holds a damaged file.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise InferenceError(f"{self.folder}: no such folder; give the folder that `planaria export` wrote")
        self._handles = {}
        self._home: dict[str, str] = {}
        self._views: dict[str, Tensor] = {}
        self._raw: dict[str, tuple[BinaryIO, dict[str, Any], int]] = {}
        for file in shard_names(self.folder):
            handle = self._open(file)
            self._handles[file] = handle
            self._raw[file] = self._open_raw(file)
            self._home |= dict.fromkeys(handle.keys(), file)

    def _open(self, file: str):
        try:
            return safe_open(self.folder / file, framework="pt", device="cpu")
        except (SafetensorError, OSError) as error:
            raise InferenceError(
                f"{self.folder / file}: damaged or cut short ({error}); copy the folder again"
            ) from error

    def close(self) -> None:
        """Nothing can be read from here on. Views that somebody has stay valid."""
        for file, _, _ in self._raw.values():
            file.close()
        self._raw.clear()
        self._views.clear()
        self._handles.clear()

    def __contains__(self, name: str) -> bool:
        return name in self._home

    @property
    def names(self) -> Set[str]:
        """Of all tensors."""
        return self._home.keys()

    def file(self, name: str) -> Path:
        return self.folder / self._home[name]

    def describe(self, name: str) -> tuple[tuple[int, ...], str]:
        """Shape and safetensors dtype of a tensor, from the header alone."""
        part = self._handles[self._home[name]].get_slice(name)
        return tuple(part.get_shape()), part.get_dtype()

    def view(self, name: str) -> Tensor:
        """The tensor as a view of the mapped file. Read it, never write to it."""
        view = self._views.get(name)
        if view is None:  # finding a tensor costs more than copying a small one, so each is found once
            view = self._views[name] = self._handles[self._home[name]].get_tensor(name)
        return view

    def place(self, name: str, start: int = 0) -> tuple[int, int]:
        """The file descriptor, and where byte ``start`` of the tensor is in that file."""
        if not self._raw:
            raise InferenceError(f"{self.folder} was closed; open the model again")
        file, header, data = self._raw[self._home[name]]
        return file.fileno(), data + header[name]["data_offsets"][0] + start

    def read(self, name: str, start: int, out: Tensor) -> None:
        """Fill the contiguous CPU tensor ``out`` with the tensor's bytes from byte ``start`` on.

        Raises InferenceError if the file does not give them all.
        """
        file, at = self.place(name, start)
        left = memoryview(out.view(torch.uint8).numpy())
        while len(left):
            try:
                count = os.preadv(file, [left], at)
            except OSError as error:
                where = self.file(name)
                raise InferenceError(f"{where}: {error.strerror}; restore the file and start again") from error
            if not count:
                raise InferenceError(
                    f"{self.file(name)}: ends before byte {at + len(left)}: it was cut short after it was opened; "
                    "restore the file and start again"
                )
            left, at = left[count:], at + count

    def _open_raw(self, file: str) -> tuple[BinaryIO, dict[str, Any], int]:
        """The file, its header, and where its data begins. safetensors has checked the header."""
        handle = (self.folder / file).open("rb", buffering=0)
        return handle, *read_header(handle)


@dataclass(frozen=True)
class _Layer:
    """Where one layer's experts are: under ``prefix``, fused (``names`` is None) or three tensors per expert."""

    prefix: str
    names: tuple[str, str, str] | None


@dataclass(frozen=True)
class _Piece:
    """A stretch of a tensor in the files, from element ``first``, that goes to element ``start`` of a block."""

    part: str
    name: str
    first: int
    start: int
    elements: int


class ExpertStore:
    """Reads the weights of expert (layer, e) from a model folder.

    Args:
        files: the opened folder.
        paths: module path of each MoE layer's experts, ``{3: "model.layers.3.mlp.experts"}``.
        shape: sizes every expert must have.

    Attributes:
        dtype: of the experts in the files.
        bytes_per_expert: as stored.

    Raises:
        InferenceError: a tensor is missing, misshapen or not in a float format; names layer, expert, tensor and file.
    """

    def __init__(self, files: TensorFiles, paths: Mapping[int, str], shape: ExpertShape) -> None:
        self.files = files
        self.shape = shape
        self._layers = {layer: self._locate(layer, path) for layer, path in sorted(paths.items())}
        dtypes = {self._check(layer) for layer in self._layers}
        if len(dtypes) != 1:
            raise InferenceError(f"{files.folder}: experts of different precision; save the model in one dtype")
        self.dtype = FLOAT_DTYPES[dtypes.pop()]
        self.bytes_per_expert = shape.elements * self.dtype.itemsize
        self._runs: dict[tuple[int, int], list[tuple[int, int, list[Span], int]]] = {}

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(self._layers)

    @property
    def total(self) -> int:
        """Routed experts in the whole model."""
        return len(self._layers) * self.shape.num_experts

    def names(self) -> set[str]:
        """Of all tensors that experts are read from."""
        found = set()
        for where in self._layers.values():
            if where.names is None:
                found |= {f"{where.prefix}.{part.name}" for part in self.shape.unplaced}
            else:
                each = range(self.shape.num_experts)
                found |= {f"{where.prefix}.{expert}.{name}.weight" for expert in each for name in where.names}
        return found

    def forget(self) -> None:
        """Where experts are in open files, since these are about to be closed."""
        self._runs.clear()

    def views(self, layer: int, expert: int) -> tuple[Tensor, Tensor, Tensor]:
        """gate [I,H], up [I,H] and down [H,I] of one expert of the plain form, views of the mapped file."""
        assert self.shape.plain, self.shape
        where = self._layers[layer]
        if where.names is None:
            gate_up_2IH = self.files.view(f"{where.prefix}.gate_up_proj")[expert]
            gate_IH, up_IH = gate_up_2IH.chunk(2)
            return gate_IH, up_IH, self.files.view(f"{where.prefix}.down_proj")[expert]
        gate, up, down = (self.files.view(f"{where.prefix}.{expert}.{name}.weight") for name in where.names)
        return gate, up, down

    def read(self, layer: int, expert: int, layout: ExpertBlock, block_B: Tensor) -> int:
        """Fill a block in host memory with one expert, converted to the layout's dtype. Returns the bytes read.

        Raises InferenceError, naming layer, expert, tensor and file, if a file does not give them; what the block
        holds then is of no use.
        """
        assert layout.shape == self.shape, (layout.shape, self.shape)
        if layout.dtype == self.dtype and self._read_runs(layer, expert, layout, block_B):
            return self.bytes_per_expert
        for piece in self._pieces(layer, expert, layout):
            into_N = block_B[piece.start : piece.start + piece.elements]
            stored_N = into_N if layout.dtype == self.dtype else torch.empty(piece.elements, dtype=self.dtype)
            try:
                self.files.read(piece.name, piece.first * self.dtype.itemsize, stored_N)
            except InferenceError as error:
                ref = ExpertRef(layer, expert)
                raise InferenceError(f"{ref}.{piece.part}: tensor {piece.name}: {error}") from error
            if stored_N is not into_N:
                into_N.copy_(stored_N)
        return self.bytes_per_expert

    def _read_runs(self, layer: int, expert: int, layout: ExpertBlock, block_B: Tensor) -> bool:
        """Read what lies end to end in a file at once; False if anything goes wrong, which the slow way will name."""
        memory = memoryview(block_B.view(torch.uint8).numpy())
        for file, at, spans, nbytes in self._runs_of(layer, expert, layout):
            try:
                if os.preadv(file, [memory[lo:hi] for lo, hi in spans], at) != nbytes:
                    return False
            except OSError:
                return False
        return True

    def _runs_of(self, layer: int, expert: int, layout: ExpertBlock) -> list[tuple[int, int, list[Span], int]]:
        """Of each run of an expert's pieces: file, first byte, where they go in the block, and their bytes together."""
        runs = self._runs.get((layer, expert))
        if runs is None:
            size, runs = self.dtype.itemsize, []
            placed = [(*self.files.place(p.name, p.first * size), p) for p in self._pieces(layer, expert, layout)]
            for file, at, piece in sorted(placed, key=lambda item: item[:2]):
                span = (piece.start * size, (piece.start + piece.elements) * size)
                if runs and runs[-1][0] == file and runs[-1][1] + runs[-1][3] == at:
                    _, first, spans, nbytes = runs.pop()
                    runs.append((file, first, [*spans, span], nbytes + span[1] - span[0]))
                else:
                    runs.append((file, at, [span], span[1] - span[0]))
            self._runs[layer, expert] = runs
        return runs

    def _pieces(self, layer: int, expert: int, layout: ExpertBlock) -> Iterator[_Piece]:
        where = self._layers[layer]
        for part in layout.parts:
            if where.names is None:
                yield _Piece(
                    part.name, f"{where.prefix}.{part.name}", expert * part.elements, part.start, part.elements
                )
                continue
            gate, up, down = (f"{where.prefix}.{expert}.{name}.weight" for name in where.names)
            if part.name == "down_proj":
                yield _Piece(part.name, down, 0, part.start, part.elements)
            else:
                half = part.elements // 2
                yield _Piece(part.name, gate, 0, part.start, half)
                yield _Piece(part.name, up, 0, part.start + half, half)

    def _locate(self, layer: int, path: str) -> _Layer:
        for prefix in stored_names(path):
            fused = (f"{prefix}.gate_up_proj", f"{prefix}.down_proj")
            if any(name in self.files for name in fused):
                return _Layer(prefix, None)
            for names in SPLIT_NAMES:
                if any(
                    f"{prefix}.{expert}.{name}.weight" in self.files
                    for expert in range(self.shape.num_experts)
                    for name in names
                ):
                    return _Layer(prefix, names)
        raise InferenceError(
            f"{self.files.folder}: layer {layer} has no expert tensors; looked for {path}.gate_up_proj and "
            f"{path}.<expert>.{{{','.join(SPLIT_NAMES[0])}}}.weight; export the model again"
        )

    def _check(self, layer: int) -> str:
        """Checks every tensor of a layer against the headers. Returns their safetensors dtype."""
        where, shape = self._layers[layer], self.shape
        dtypes = set()
        if where.names is None:
            for part in shape.unplaced:
                expected = (shape.num_experts, *part.shape)
                stored = f"{where.prefix}.{part.name}"
                dtypes.add(self._check_tensor(f"layer {layer}, {part.name}", stored, expected))
        else:
            inward, outward = (shape.intermediate, shape.hidden), (shape.hidden, shape.intermediate)
            for expert in range(shape.num_experts):
                for name, expected in zip(where.names, (inward, inward, outward), strict=True):
                    stored = f"{where.prefix}.{expert}.{name}.weight"
                    dtypes.add(self._check_tensor(f"{ExpertRef(layer, expert)}.{name}", stored, expected))
        if len(dtypes) != 1:
            raise InferenceError(
                f"{self.files.folder}: layer {layer}: experts of different precision; save the model in one dtype"
            )
        return dtypes.pop()

    def _check_tensor(self, what: str, name: str, expected: tuple[int, ...]) -> str:
        if name not in self.files:
            raise InferenceError(
                f"{what}: tensor {name} is missing from {self.files.folder}; the copy is incomplete: export it again"
            )
        shape, dtype = self.files.describe(name)
        if shape != expected:
            raise InferenceError(
                f"{what}: tensor {name} in {self.files.file(name)} has shape {list(shape)}, but config.json "
                f"asks for {list(expected)}; the folder mixes two models: export it again"
            )
        if dtype not in FLOAT_DTYPES:
            raise InferenceError(
                f"{what}: tensor {name} in {self.files.file(name)} is {dtype}; only {', '.join(FLOAT_DTYPES)} "
                "are served: save the model unquantised"
            )
        return dtype
