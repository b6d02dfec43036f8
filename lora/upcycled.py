"""MixLoRA on a dense model as an exact mixture of experts in Hugging Face's format.

MixLoRA (arXiv 2404.15159) runs the dense block once for each chosen expert, every projection with that expert's update:
the experts of a mixture are therefore ``W + s B_e A_e``, its router is the bank's, and the weights of the top k sum to
one where the bank's do. Updates of other linear layers are merged.

The base is read, and the result written, one tensor at a time.

Shapes: E experts, H hidden.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from lora.base_facts import BaseFacts
from lora.config import BankConfig
from lora.deltas import Delta, deltas_of
from lora.errors import AdapterError
from lora.exactness import require
from lora.merge import Loss, Merger, Update
from lora.presets import expand
from moe.folder import copy_companions, new_folder, read_tensors, write_tensors
from moe.upcycle import TARGETS, UpcycleError, Upcycling, drawn, target_config

_MLP = re.compile(r"((?:.*\.)?layers\.(\d+)\.)mlp\.((?:gate|up|down)_proj)\.weight")
_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def write_upcycled(
    tensors: Mapping[str, Tensor],
    banks: Mapping[str, BankConfig],
    base: Path,
    out: Path,
    *,
    owners: Mapping[str, str] | None = None,
) -> tuple[PreTrainedConfig, dict[str, Loss]]:
    """Write the mixture to ``out``, whole or not at all; returns its configuration and what rounding cost.

    The configuration's dtype is that of the base's blocks, in which transformers' routers compute.

    Raises AdapterError for an adapter that no mixture computes, naming the bank, or that does not fit the base;
    FolderError if ``out`` exists or ``base`` has no weights.
    """
    require("upcycled", banks)
    name, bank = next((name, expand(bank)) for name, bank in banks.items() if expand(bank).site == "ffn")
    found = deltas_of(tensors, banks, owners=owners)
    blocks = [delta for delta in found if delta.site == "ffn"]
    routers = {delta.place: _router(delta.place, tensors) for delta in blocks}
    config = _config(base, name, bank, routers)
    merger = Merger((delta for delta in found if delta.site == "linear"), BaseFacts.read(base))
    writer = _Writer(config, blocks, routers, merger)
    with new_folder(out) as temporary:
        write_tensors(writer.converted(read_tensors(base)), temporary)
        merger.check(base)
        config.dtype = writer.routes_in
        config.save_pretrained(temporary)
        copy_companions(base, temporary)
    return config, merger.losses


class _Writer:
    def __init__(
        self, config: PreTrainedConfig, blocks: Iterable[Delta], routers: Mapping[str, Tensor], merger: Merger
    ) -> None:
        self.config, self.routers, self.merger = config, routers, merger
        self.deltas = {delta.name: delta for delta in blocks}
        self.target = next(target for target in TARGETS.values() if target.model_type == config.model_type)
        self.experts = next(iter(routers.values())).shape[0]
        self.routes_in = torch.float32

    def converted(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors of the mixture. Raises AdapterError if the base lacks a projection of a block."""
        seen = set()
        for name, tensor in tensors:
            match = _MLP.fullmatch(name)
            if match is None:
                yield name, self.merger.add(name, tensor)
                continue
            prefix, projection = match[1], match[3]
            seen.add(f"{prefix}mlp.{projection}")
            ours = self.target.projections[_PROJECTIONS.index(projection)]
            delta = self.deltas.get(f"{prefix}mlp.{projection}")
            for expert in range(self.experts):
                weight = tensor if delta is None else self.merger.apply(name, tensor, Update(delta, expert))
                yield prefix + self.target.expert.format(expert, ours), weight
            if projection == "down_proj":
                yield prefix + self.target.gate, self._cast(self.routers[f"{prefix}mlp"], tensor)
                yield from self._shared_expert(prefix, tensor)
        wanted = {f"{place}.{projection}" for place in self.routers for projection in _PROJECTIONS}
        if missing := sorted(wanted - seen):
            raise AdapterError(f"the base has no tensor {missing[0]}.weight; is it another base model?")

    def _cast(self, router_EH: Tensor, like: Tensor) -> Tensor:
        self.routes_in = like.dtype
        cast = router_EH.to(like.dtype)
        loss = self.merger.losses["router"]
        loss.update += float(router_EH.double().square().sum())
        loss.rounding += float((cast.double() - router_EH.double()).square().sum())
        return cast

    def _shared_expert(self, prefix: str, down: Tensor) -> Iterator[tuple[str, Tensor]]:
        """qwen2_moe cannot be without one: it adds nothing, but could be trained."""
        if self.config.model_type != "qwen2_moe":
            return
        hidden, width = down.shape
        for projection in ("gate_proj", "up_proj"):
            name = f"{prefix}mlp.shared_expert.{projection}.weight"
            yield name, drawn((width, hidden), self.config.initializer_range, 0, name).to(down.dtype)
        yield f"{prefix}mlp.shared_expert.down_proj.weight", torch.zeros_like(down)
        yield f"{prefix}mlp.shared_expert_gate.weight", down.new_zeros(1, hidden)


def _router(place: str, tensors: Mapping[str, Tensor]) -> Tensor:
    """[E, H]."""
    inside = [path for path in tensors if path.startswith(f"{place}.adapter.router")]
    if len(inside) != 1 or tensors[inside[0]].dim() != 2:
        raise AdapterError(f"{place}: looked for one router [E, H], found {', '.join(inside) or 'none'}; export again")
    return tensors[inside[0]]


def _config(base: Path, name: str, bank: BankConfig, routers: Mapping[str, Tensor]) -> PreTrainedConfig:
    facts = BaseFacts.read(base)
    if facts.family is None:
        raise AdapterError(f"{base} has no config.json that names its model_type; give a Hugging Face model folder")
    source = AutoConfig.from_pretrained(base)
    if len(routers) != source.num_hidden_layers:
        raise AdapterError(
            f"adapter.{name} is on {len(routers)} of {source.num_hidden_layers} feed-forward blocks; a mixture has "
            "experts in all layers: adapt all of them"
        )
    experts = next(iter(routers.values())).shape[0]
    try:
        config = target_config(source, Upcycling(copies=experts, top_groups=bank.top_k or 1))
    except UpcycleError as error:
        raise AdapterError(f"adapter.{name} cannot be written as a mixture: {error}") from error
    if not bank.renormalise:
        if config.model_type == "mixtral":
            raise AdapterError(
                f"adapter.{name} has renormalise: false, and mixtral's weights always sum to one; it cannot be written "
                "as one"
            )
        config.norm_topk_prob = False
    return config
