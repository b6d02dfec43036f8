"""A model as banks see it, from the names and shapes of its tensors (no torch here).

Files and families name and stack tensors differently; here every path is that of transformers' module, and experts are
stacked.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from lora.config import BankAt, BankConfig
from lora.cost import Size
from lora.methods import EXPERT_TENSORS, FFN
from lora.presets import bank_at
from lora.targets import OUTPUT, ROUTER, Placed, Places, resolve

Shapes = Mapping[str, tuple[int, ...]]

_ONE_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(\w+)\.weight")
_HALVES = {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj", "w1": "gate_up_proj", "w3": "gate_up_proj"}
_WHOLE = {"down_proj": "down_proj", "w2": "down_proj"}


@dataclass(frozen=True)
class ModelShapes:
    """Attributes:
    layers: decoder layers.
    active: routed experts of a token.
    linear: (out, in) of each linear layer by path; ``experts``: (E, out, in) of each stacked tensor.
    norms: width of each vector by path, such as norms' weights.
    places: where banks may go.
    clamped: whether experts clamp their pre-activations, as those with biases do.
    """

    layers: int
    active: int
    linear: Mapping[str, tuple[int, int]]
    experts: Mapping[str, tuple[int, int, int]]
    norms: Mapping[str, int]
    places: Places
    clamped: bool = False

    def size(self, placed: Placed) -> Size:
        """Of one place that :func:`lora.targets.resolve` found."""
        if placed.site == "experts":
            count, outs, ins = self.experts[placed.path]
            return Size(ins, outs, count, self.active)
        if placed.site == "linear":
            outs, ins = self.linear[placed.path]
            return Size(ins, outs, hidden=self.norms.get("model.norm", 0))
        if placed.site == "ffn":
            outs, ins = self.linear[f"{placed.path}.{FFN[0]}"]
            return Size(ins, outs)
        count, _, hidden = self.experts[f"{placed.path}.experts.{EXPERT_TENSORS[0]}"]
        return Size(hidden, hidden, count, self.active)

    def resolve(self, banks: Mapping[str, BankConfig]) -> list[tuple[Placed, BankAt, Size]]:
        """Every place of the banks. Raises AdapterError as :func:`lora.targets.resolve` and ``bank_at`` do."""
        found = []
        for placed in resolve(banks, self.places):
            size = self.size(placed)
            here = bank_at(banks[placed.bank], placed.layer, self.layers, size.count, self.active)
            found.append((placed, here, size))
        return found


def model_shapes(shapes: Shapes, active: int) -> ModelShapes:
    """From parameters' names, as transformers' modules or safetensors files have them."""
    stacked = _stacked(shapes)
    blocks = {name.rpartition(".experts.")[0]: None for name in stacked}
    linear: dict[str, tuple[int, int]] = {}
    refused: dict[str, str] = {}
    for name, shape in shapes.items():
        path, _, last = name.replace(".block_sparse_moe.", ".mlp.").rpartition(".")
        if last != "weight" or len(shape) != 2 or ".experts." in name or path.endswith("embed_tokens"):
            continue
        if re.search(r"\.\d+\.", path) is None:
            refused[path] = OUTPUT
        elif path.rpartition(".")[0] in blocks and path.rpartition(".")[2] in ("gate", "router"):
            refused[path] = ROUTER
        else:
            linear[path] = (shape[0], shape[1])
    parents = dict.fromkeys(path.rpartition(".")[0] for path in linear)
    ffn = tuple(parent for parent in parents if all(f"{parent}.{name}" in linear for name in FFN))
    layers = [int(match[1]) for name in shapes if (match := re.search(r"layers\.(\d+)\.", name))]
    places = Places(tuple(linear), tuple(stacked), ffn, tuple(blocks), refused)
    norms = {name.rpartition(".")[0]: shape[0] for name, shape in shapes.items() if len(shape) == 1}
    clamped = any(f"{name}_bias" in shapes for name in stacked)
    return ModelShapes(max(layers, default=-1) + 1, active, linear, stacked, norms, places, clamped)


def _stacked(shapes: Shapes) -> dict[str, tuple[int, int, int]]:
    """(E, out, in) by the path of the stacked tensor."""
    found: dict[str, tuple[int, int, int]] = {}
    counts: dict[str, int] = {}
    for name, shape in shapes.items():
        name = name.replace(".block_sparse_moe.", ".mlp.")
        if (one := _ONE_EXPERT.fullmatch(name)) is not None:
            tensor = _HALVES.get(one[3]) or _WHOLE.get(one[3])
            if tensor is None:
                continue
            path, rows = f"{one[1]}.{tensor}", shape[0] * (2 if one[3] in _HALVES else 1)
            counts[path] = max(counts.get(path, 0), int(one[2]) + 1)
            found[path] = (counts[path], rows, shape[1])
        elif ".experts." in name and len(shape) == 3 and name.rpartition(".")[2] in EXPERT_TENSORS:
            # Families whose experts have biases keep them as (E, in, out).
            outs, ins = (shape[2], shape[1]) if f"{name}_bias" in shapes else (shape[1], shape[2])
            found[name] = (shape[0], outs, ins)
    return dict(sorted(found.items(), key=_order))


def _order(entry: tuple[str, tuple[int, ...]]) -> tuple[int, int]:
    path = entry[0]
    layer = re.search(r"\.(\d+)\.", path)
    return (int(layer[1]) if layer else -1, EXPERT_TENSORS.index(path.rpartition(".")[2]))
