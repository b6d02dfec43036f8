"""Shapes of what optional parts add to a model or take from it, for the plan (no torch here)."""

from __future__ import annotations

import re
from collections.abc import Mapping

from trainer.schema import SoftSection

Shapes = Mapping[str, tuple[int, ...]]


def mtp_shapes(shapes: Shapes, depth: int) -> dict[str, tuple[int, ...]]:
    """Of ``depth`` multi-token prediction modules: a layer like the model's last, a projection and three norms each."""
    layers = [int(match[1]) for name in shapes if (match := re.match(r"model\.layers\.(\d+)\.", name))]
    hidden = shapes["model.norm.weight"][0] if layers else 0
    last = f"model.layers.{max(layers, default=0)}."
    added: dict[str, tuple[int, ...]] = {}
    for k in range(depth if layers else 0):
        module = f"mtp.{max(layers) + 1 + k}"
        added |= {name.replace(last, f"{module}.block."): shape for name, shape in shapes.items() if last in name}
        added |= {f"{module}.{name}.weight": (hidden,) for name in ("state_norm", "embedding_norm", "norm")}
        added[f"{module}.projection.weight"] = (hidden, 2 * hidden)
    return added


def soft_shapes(shapes: Shapes, soft: SoftSection) -> dict[str, tuple[int, ...]]:
    """``shapes`` with the routers of its MoE blocks replaced by what a soft block has instead."""
    found = dict(shapes)
    routers = [name for name in shapes if re.search(r"\.(gate|router)\.weight$", name)] if soft.kind != "none" else []
    for name in routers:
        experts, hidden = found.pop(name)
        block = name.rsplit(".", 2)[0]
        if soft.kind == "soft_moe":
            found |= {f"{block}.slot_vectors": (hidden, experts * soft.slots), f"{block}.slot_scale": (1,)}
        else:
            found[f"{block}.router"] = (experts, hidden)
            if soft.segment:
                found[f"{block}.before"] = (hidden,)
    return found
