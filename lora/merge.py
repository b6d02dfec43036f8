"""An adapter that is exactly LoRA added to the weights of its base model's folder.

Tensor by tensor: read, add in fp32, cast to the dtype that it had, write. In bf16 the cast rounds a small update away
in part; how much is reported for each kind of tensor.

Shapes: E experts, O outputs, M inputs.
"""

from __future__ import annotations

import math
import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lora.base_facts import BaseFacts
from lora.config import BankConfig
from lora.deltas import Delta, deltas_of, summed
from lora.errors import AdapterError
from lora.exactness import require
from lora.methods import EXPERT_TENSORS
from moe.family_table import FAMILIES
from moe.folder import copy_companions, new_folder, read_tensors, write_tensors

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Update:
    """What is added to one tensor of the files: an expert's update or, without ``expert``, that of all, stacked.

    Attributes:
        half, halves: which part of the update's rows, where gate and up are apart.
        transposed: the files have inputs before outputs.
    """

    delta: Delta
    expert: int | None
    half: int = 0
    halves: int = 1
    transposed: bool = False

    def parts(self) -> Iterator[tuple[tuple[int, ...], Tensor]]:
        """What is added, in fp32, and at which index: an expert at a time, so that a whole stack is never held."""
        if self.expert is not None:
            yield (), self.delta.of(self.expert).chunk(self.halves)[self.half]
            return
        for expert in range(self.delta.experts):
            value_OM = self.delta.of(expert)
            yield (expert,), value_OM.T if self.transposed else value_OM

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor that it is added to."""
        outputs, inputs = self.delta.b_EOR.shape[1], self.delta.a_ERM.shape[2]
        if self.expert is not None:
            return outputs // self.halves, inputs
        return self.delta.experts, *((inputs, outputs) if self.transposed else (outputs, inputs))


@dataclass
class Loss:
    """Squared norms over all tensors of a kind: of the update, and of what the cast changed in the sum."""

    update: float = 0.0
    rounding: float = 0.0

    @property
    def share(self) -> float:
        return math.sqrt(self.rounding / self.update) if self.update else 0.0


def merge_into_folder(
    tensors: Mapping[str, Tensor],
    banks: Mapping[str, BankConfig],
    base: Path,
    out: Path,
    *,
    owners: Mapping[str, str] | None = None,
) -> dict[str, Loss]:
    """Write ``base`` with the adapter in its weights to ``out``, whole or not at all; returns what rounding cost.

    Raises AdapterError for an adapter that is not exactly LoRA, naming the bank, and for a base without its tensors;
    FolderError if ``out`` exists or ``base`` has no weights.
    """
    require("merged", banks)
    facts = BaseFacts.read(base)
    merger = Merger(deltas_of(tensors, banks, facts.routed_experts, owners), facts)
    with new_folder(out) as temporary:
        write_tensors(merger.merged(read_tensors(base)), temporary)
        merger.check(base)
        shutil.copy2(base / "config.json", temporary / "config.json")
        copy_companions(base, temporary)
    return merger.losses


class Merger:
    """Adds updates to the tensors they belong to, as these stream by, and keeps account."""

    def __init__(self, deltas: Iterable[Delta], base: BaseFacts) -> None:
        self.losses: dict[str, Loss] = defaultdict(Loss)
        self._updates: dict[str, Update] = {}
        self._wanted: dict[str, set[str]] = {}
        for delta in deltas:
            names = dict(_names(summed(delta) if delta.site == "linear" else delta, base))
            self._updates |= names
            # Files hold experts either stacked, under the first name, or apart, under the others.
            self._wanted[delta.name] = set(names)
        self._seen: set[str] = set()

    def merged(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors:
            yield name, self.add(name, tensor)

    def add(self, name: str, tensor: Tensor) -> Tensor:
        """``tensor`` of the files with its update, or as it is if it has none."""
        update = self._updates.get(name)
        if update is None:
            return tensor
        self._seen.add(name)
        return self.apply(name, tensor, update)

    def apply(self, name: str, tensor: Tensor, update: Update) -> Tensor:
        """Raises AdapterError for a tensor that is no matrix of floats, or of another shape than the update."""
        if tensor.dtype not in _FLOATS:
            raise AdapterError(f"the base's {name} is {tensor.dtype}, and nothing can be added to that; dequantise it")
        if tuple(tensor.shape) != update.shape:
            raise AdapterError(
                f"the base's {name} has shape {list(tensor.shape)}, the adapter's update {list(update.shape)}; is it "
                "another base model?"
            )
        cast, loss = torch.empty_like(tensor), self.losses[_kind(update.delta)]
        for at, value in update.parts():
            exact = tensor[at].float() + value
            cast[at] = exact.to(tensor.dtype)
            loss.update += float(value.double().square().sum())
            loss.rounding += float((cast[at].double() - exact.double()).square().sum())
        return cast

    def check(self, base: Path) -> None:
        """Raises AdapterError if an update found no tensor to be added to."""
        for stacked, names in self._wanted.items():
            apart = names - {stacked}
            if stacked not in self._seen and (missing := sorted(apart - self._seen) or not apart):
                name = missing[0] if isinstance(missing, list) else stacked
                raise AdapterError(f"{base} has no tensor {name}, which the adapter updates; is it another base model?")


def _names(delta: Delta, base: BaseFacts) -> Iterator[tuple[str, Update]]:
    """The tensors of the files that the update belongs to."""
    family = FAMILIES.get(base.family or "")
    if delta.site == "linear":
        yield delta.name, Update(delta, 0)
        return
    stacked_only = family is not None and family.expert_names is None
    yield delta.name, Update(delta, None, transposed=stacked_only)
    if family is None or family.expert_names is None:
        return
    gate, up, down = family.expert_names
    matrices = (gate, up) if delta.tensor == EXPERT_TENSORS[0] else (down,)
    place = delta.place.replace(".mlp.", f".{family.block_on_disk}.")
    for expert in range(delta.experts):
        for half, matrix in enumerate(matrices):
            yield f"{place}.{expert}.{matrix}.weight", Update(delta, expert, half, len(matrices))


def _kind(delta: Delta) -> str:
    last = delta.place.rpartition(".")[2]
    return last if delta.tensor == "weight" else f"{last}.{delta.tensor}"


def format_losses(losses: Mapping[str, Loss]) -> str:
    """A line for each kind of tensor."""
    lines = [f"{'tensor':<24} {'|update|':>12} {'lost to rounding':>17}"]
    lines += [
        f"{kind:<24} {math.sqrt(loss.update):>12.4g} {loss.share:>17.2%}" for kind, loss in sorted(losses.items())
    ]
    return "\n".join(lines)
