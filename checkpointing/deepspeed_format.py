"""Checkpoint folders as DeepSpeed 0.19 writes them for native MoE under ZeRO-1 and 2: names, and reading without it.

FOLDER/latest                                              the newest tag
FOLDER/TAG/mp_rank_00_model_states.pt                      all weights but the experts', shapes, counts
FOLDER/TAG/layer_<n>_expert_<e>_mp_rank_00_model_states.pt one for each MoE layer, counted from 0, and expert
FOLDER/TAG/[bf16_]zero_pp_rank_<r>_mp_rank_00_optim_states.pt  each rank's flat partitions: masters, moments

A parameter group is spread over all ranks; one of expert-parallel parameters (``moe``, ``ep_size_N``) over every N-th.
Where a parameter lies in a partition is said by name (``param_slice_mappings``); what part of it that is follows from
the parts on the ranks before. Files are read with torch's ``weights_only``: nothing but tensors, plain values and the
classes given is ever unpickled.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpointing.moments import MOMENTS as MOMENTS_OF
from checkpointing.state.buffers import StateBuffer, StateSpan
from checkpointing.units import Range
from moe.refs import TensorAddress

EXPERT_PREFIX = "deepspeed_moe.experts.deepspeed_experts."
MODEL_STATES = "mp_rank_00_model_states.pt"
MOMENTS = MOMENTS_OF["AdamW"]
_STACKED = re.compile(r"(?:.*\.)?(?:layers|mtp)\.(\d+)\..*\bexperts\.(\w+)")
_GROUP = re.compile(r"ep_size_(\d+)")


class DeepSpeedFormatError(ValueError):
    """A folder is torn or is none that can be read; the message names what is missing."""


def optimizer_file(rank: int, bf16: bool) -> str:
    return f"{'bf16_' if bf16 else ''}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"


def expert_file(layer: int, expert: int) -> str:
    """``layer`` counts MoE layers from 0."""
    return f"layer_{layer}_expert_{expert}_mp_rank_00_model_states.pt"


@dataclass(frozen=True)
class DeepSpeedFolder:
    """One tag, read and found whole: the model's states and each rank's optimizer states, as DeepSpeed nests them.

    ``experts`` has each expert's weights by the name of its file.
    """

    path: Path
    model: dict[str, Any]
    ranks: tuple[dict[str, Any], ...]
    experts: dict[str, dict[str, Tensor]]

    @property
    def step(self) -> int:
        return int(self.model["global_steps"])

    @property
    def shapes(self) -> list[dict[str, tuple[int, ...]]]:
        """Of each parameter group, by name; experts' are of one rank."""
        return [{name: tuple(shape) for name, shape in group.items()} for group in self.model["param_shapes"]]

    def ep_of(self, group: int) -> int:
        """On how many ranks one set of a group's parameters lies; 1 for parameters that all ranks have."""
        settings = self.ranks[0]["base_optimizer_state"]["param_groups"][group]
        if not settings.get("moe"):
            return 1
        match = _GROUP.fullmatch(str(settings.get("name")))
        if match is None:
            raise DeepSpeedFormatError(f"{self.path}: parameter group {group} is named {settings.get('name')!r}")
        return int(match[1])

    @property
    def ep(self) -> int:
        return max(self.ep_of(group) for group in range(len(self.shapes)))

    def address_of(self, param: str, group: int, rank: int) -> TensorAddress:
        """Where a rank's tensor lies in the whole model."""
        shape, ep = self.shapes[group][param], self.ep_of(group)
        match = _STACKED.fullmatch(param)
        if match is None or len(shape) not in (2, 3):  # weights, or biases
            if ep > 1:
                raise DeepSpeedFormatError(
                    f"{self.path}: {param} {shape} is expert-parallel, and not stacked as layers.N...experts.TENSOR"
                )
            return TensorAddress(param, shape)
        return TensorAddress(param, shape, int(match[1]), match[2], rank % ep * shape[0], ep * shape[0])


def resolve_tag(folder: Path, tag: str | None = None) -> Path:
    """The tag's folder: ``folder`` itself if it is one, else by ``tag``, else by the file ``latest``."""
    if tag is None and (folder / MODEL_STATES).is_file():
        return folder
    there = sorted(path.parent.name for path in folder.glob(f"*/{MODEL_STATES}")) if folder.is_dir() else []
    hint = f"tags there: {', '.join(there) or 'none'}"
    if tag is None:
        latest = folder / "latest"
        if not latest.is_file():
            raise DeepSpeedFormatError(f"{folder} has no file 'latest'; give --tag TAG ({hint})")
        tag = latest.read_text().strip()
        if tag not in there:
            raise DeepSpeedFormatError(
                f"{latest} names {tag!r}, which has no {MODEL_STATES}: it is stale or the save was cut off; "
                f"give --tag TAG ({hint})"
            )
    if tag not in there:
        raise DeepSpeedFormatError(f"{folder / tag} has no {MODEL_STATES} ({hint})")
    return folder / tag


def read_folder(path: Path, classes: Sequence[type]) -> DeepSpeedFolder:
    """Read one tag's folder and prove it whole.

    Args:
        classes: what may be unpickled besides tensors and plain values.
    Raises DeepSpeedFormatError naming missing files, ranks that disagree, or elements that no rank has.
    """
    model = _load(path / MODEL_STATES, classes)
    world = int(model["dp_world_size"])
    if int(model.get("mp_world_size", 1)) != 1:
        raise DeepSpeedFormatError(
            f"{path}: written with {model['mp_world_size']} tensor-parallel ranks, only 1 is read"
        )
    if not model.get("param_shapes"):
        raise DeepSpeedFormatError(f"{path}: has no param_shapes, so it was not written under ZeRO-1 or 2")
    bf16 = (path / optimizer_file(0, True)).exists()
    wanted = [optimizer_file(rank, bf16) for rank in range(world)]
    experts = [
        expert_file(layer, expert)
        for layer, count in enumerate(model.get("num_experts") or [])
        for expert in range(int(count))
    ]
    _check_names(path, wanted, experts)
    ranks = tuple(_load(path / name, classes)["optimizer_state_dict"] for name in wanted)
    folder = DeepSpeedFolder(path, model, ranks, {name: _load(path / name, classes) for name in experts})
    _check_ranks(folder)
    return folder


def _load(path: Path, classes: Sequence[type]) -> dict[str, Any]:
    try:
        with torch.serialization.safe_globals(list(classes)):
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise DeepSpeedFormatError(f"{path} is missing") from None
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise DeepSpeedFormatError(
            f"{path}: damaged, or it pickles more than tensors, plain values and DeepSpeed's own classes, which is not "
            f"loaded since it could run any code: {reason[0][:300]}"
        ) from error
    if not isinstance(loaded, dict):
        raise DeepSpeedFormatError(f"{path}: holds a {type(loaded).__name__}, not DeepSpeed's states")
    return loaded


def _check_names(path: Path, wanted: Sequence[str], experts: Sequence[str]) -> None:
    missing = [name for name in [*wanted, *experts] if not (path / name).is_file()]
    if missing:
        more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
        raise DeepSpeedFormatError(f"{path} is torn, it lacks {', '.join(missing[:4])}{more}; use another tag")
    surplus = sorted({p.name for p in path.glob("*zero_pp_rank_*_optim_states.pt")} - set(wanted))
    if surplus:
        raise DeepSpeedFormatError(
            f"{path} holds {surplus[0]}, of more than its {len(wanted)} ranks: two saves are mixed; use another tag"
        )


def _check_ranks(folder: DeepSpeedFolder) -> None:
    for rank, state in enumerate(folder.ranks):
        where = f"{folder.path}: rank {rank}"
        base = state.get("base_optimizer_state")
        if not isinstance(base, dict) or "param_slice_mappings" not in state:
            raise DeepSpeedFormatError(f"{where} was saved in the elastic or an older form; save with DeepSpeed 0.19")
        if len(base["param_groups"]) != len(folder.shapes) or len(base["state"]) != len(folder.shapes):
            raise DeepSpeedFormatError(f"{where} has {len(base['state'])} groups of state, not {len(folder.shapes)}")
        absent = [kind for group in base["state"].values() for kind in (*MOMENTS, "step") if kind not in group]
        if absent:
            raise DeepSpeedFormatError(f"{where} lacks {absent[0]}: only states of Adam and AdamW are read")
    counts = {
        float(group["step"]) for state in folder.ranks for group in state["base_optimizer_state"]["state"].values()
    }
    if len(counts) != 1:
        raise DeepSpeedFormatError(f"{folder.path}: ranks are of optimizer steps {sorted(counts)}; two saves are mixed")


def optimizer_step(folder: DeepSpeedFolder) -> float:
    return float(folder.ranks[0]["base_optimizer_state"]["state"][0]["step"])


def state_buffers(folder: DeepSpeedFolder, rank: int) -> list[StateBuffer]:
    """A rank's masters and moments as named ranges. Raises DeepSpeedFormatError if the ranks leave a gap."""
    state = folder.ranks[rank]
    buffers: list[StateBuffer] = []
    for group, shapes in enumerate(folder.shapes):
        spans = tuple(_spans(folder, group, rank, shapes))
        moments = state["base_optimizer_state"]["state"][group]
        for kind in ("master", *MOMENTS):
            tensor = state["single_partition_of_fp32_groups"][group] if kind == "master" else moments[kind]
            named = tuple(StateSpan(Range(unit, kind, lo, hi), offset) for unit, lo, hi, offset in spans)
            try:
                buffers.append(StateBuffer(f"group{group}.{kind}", tensor.detach().view(-1), named))
            except ValueError as error:
                raise DeepSpeedFormatError(f"{folder.path}: rank {rank}: {error}") from error
    return buffers


def _spans(
    folder: DeepSpeedFolder, group: int, rank: int, shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[str, int, int, int]]:
    """(unit, lo, hi, offset into the partition)."""
    peers = range(rank % folder.ep_of(group), len(folder.ranks), folder.ep_of(group))
    slices = {peer: folder.ranks[peer]["param_slice_mappings"][group] for peer in peers}
    for param, shape in shapes.items():
        sizes = {peer: slices[peer][param].numel if param in slices[peer] else 0 for peer in peers}
        if sum(sizes.values()) != math.prod(shape):
            raise DeepSpeedFormatError(
                f"{folder.path}: ranks {list(peers)} hold {sum(sizes.values()):,} elements of {param}, which has "
                f"{math.prod(shape):,}; a rank's file is of another save"
            )
        if not sizes[rank]:
            continue
        first = sum(size for peer, size in sizes.items() if peer < rank)
        for unit in folder.address_of(param, group, rank).units():
            lo, hi = max(first, unit.start), min(first + sizes[rank], unit.stop)
            if lo < hi:
                yield unit.unit, lo - unit.start, hi - unit.start, slices[rank][param].start + lo - first


def described_tensors(folder: DeepSpeedFolder) -> dict[str, dict[str, Any]]:
    """For each unit its parameter's path and whole shape, expert, elements and dtype, as manifests have them."""
    dtype = str(weights_dtype(folder)).removeprefix("torch.")
    described = {}
    for group, shapes in enumerate(folder.shapes):
        for rank in range(folder.ep_of(group)):
            for param in shapes:
                address = folder.address_of(param, group, rank)
                for i, span in enumerate(address.units()):
                    described[span.unit] = {
                        "param": param,
                        "shape": list(address.global_shape),
                        "expert": address.first_expert + i if address.is_expert else None,
                        "elements": span.stop - span.start,
                        "dtype": dtype,
                    }
    return described


def weights_dtype(folder: DeepSpeedFolder) -> torch.dtype:
    found = {tensor.dtype for tensor in folder.model["module"].values() if tensor.is_floating_point()}
    if len(found) != 1:
        raise DeepSpeedFormatError(f"{folder.path}: weights of dtypes {sorted(map(str, found))}; only one is read")
    dtype: torch.dtype = found.pop()
    return dtype


def saved_weights(folder: DeepSpeedFolder) -> Iterator[tuple[tuple[str, int | None], Path, Tensor]]:
    """((parameter, expert or None), file, values) of every trained weight.

    Raises DeepSpeedFormatError if one is absent. An expert's layer and number come from its keys, so that a file under
    another's name is found.
    """
    stacked = {param for group, shapes in enumerate(folder.shapes) if folder.ep_of(group) > 1 for param in shapes}
    found: set[tuple[str, int | None]] = set()
    for name, weights in folder.experts.items():
        for key, weight in weights.items():
            parent, _, rest = key.partition(f".{EXPERT_PREFIX}")
            number, _, tensor = rest.partition(".")
            if not number.isdecimal() or f"{parent}.{tensor}" not in stacked or f"_expert_{number}_" not in name:
                raise DeepSpeedFormatError(f"{folder.path / name} holds {key}, which is not that expert's")
            found.add((f"{parent}.{tensor}", int(number)))
            yield (f"{parent}.{tensor}", int(number)), folder.path / name, weight
    for group, shapes in enumerate(folder.shapes):
        for param, shape in shapes.items():
            if folder.ep_of(group) == 1:
                if param not in folder.model["module"]:
                    raise DeepSpeedFormatError(f"{folder.path / MODEL_STATES} lacks {param}")
                yield (param, None), folder.path / MODEL_STATES, folder.model["module"][param]
                continue
            absent = [e for e in range(shape[0] * folder.ep_of(group)) if (param, e) not in found]
            if absent:
                raise DeepSpeedFormatError(f"{folder.path} lacks experts {absent} of {param}; use another tag")
