"""Where each Hugging Face family keeps its gate and its experts.

Blocks are found by shape, not by class name: a module with ``experts`` that hold stacked 3-D weights and a ``gate``
(or ``router``) beside them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn


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
            f"{type(model).__name__} has no MoE block: looked for modules with `experts` and `gate` or `router`; "
            "use a mixture-of-experts model"
        )
    return blocks
