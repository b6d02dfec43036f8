"""Where each Hugging Face family keeps its gate and its experts.

Blocks are found by shape, not by class name: a module with ``experts`` that hold stacked 3-D weights and a ``gate``
(or ``router``) beside them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn

from moe.family_table import FAMILIES, known_families


class FamilyError(ValueError):
    """The model is not a mixture of experts this project knows how to handle."""


@dataclass(frozen=True)
class MoEBlock:
    """One MoE layer of a transformers model.

    Attributes:
        layer: global layer index, from the block's path.
        path: module path of the block, e.g. ``model.layers.3.mlp``.
        gate: the router module, which returns (logits, scores [T,K], indices [T,K]).
        experts: called as ``experts(hidden_states [T,H], top_k_index [T,K], top_k_weights [T,K]) -> [T,H]``.
    """

    layer: int
    path: str
    module: nn.Module
    gate: nn.Module
    experts: nn.Module


def find_moe_blocks(model: nn.Module) -> list[MoEBlock]:
    """All MoE blocks in layer order. Raises FamilyError if there is none, saying what was looked for."""
    blocks = []
    for path, module in model.named_modules():
        experts = getattr(module, "experts", None)
        gate = getattr(module, "gate", None) or getattr(module, "router", None)
        if not isinstance(experts, nn.Module) or not isinstance(gate, nn.Module):
            continue
        layer = re.search(r"\.(\d+)\.", f".{path}.")
        if layer is None:
            raise FamilyError(f"the MoE block {path!r} has no layer index in its path")
        blocks.append(MoEBlock(int(layer[1]), path, module, gate, experts))
    if not blocks:
        raise FamilyError(
            f"{type(model).__name__} has no MoE block: looked for modules with `experts` and `gate` or `router`"
            f"{_looks_like_experts(model)}; use a mixture-of-experts model of {known_families()}"
        )
    return blocks


def _looks_like_experts(model: nn.Module) -> str:
    """What there is instead, for the message."""
    found = [path for path, _ in model.named_modules() if re.search(r"expert|moe|router", path.rpartition(".")[2])]
    return f", found {', '.join(found[:3])}" if found else ", found nothing of that kind"


def check_family(model: nn.Module, blocks: list[MoEBlock]) -> None:
    """Raises FamilyError if the model says that it is of a type outside our table: its routing may differ unseen."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind is not None and kind not in FAMILIES:
        block = blocks[0]
        raise FamilyError(
            f"{type(model).__name__} is of model_type {kind!r}: looked for one of {known_families()}; found "
            f"{type(block.module).__name__} at {block.path} with {type(block.gate).__name__} and "
            f"{type(block.experts).__name__}; use a model of one of these families"
        )
