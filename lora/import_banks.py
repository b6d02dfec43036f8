"""Banks for updates that come from elsewhere, and their tensors under our names.

Shapes: E experts, R rank, M inputs, O outputs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from lora.attach import attach
from lora.config import BankConfig
from lora.deltas import split_factor
from lora.errors import AdapterError
from lora.methods import EXPERT_TENSORS
from lora.peft_config import PeftConfig
from lora.presets import layer_of
from moe.convert import convert
from moe.families import MoEBlock, find_moe_blocks


@dataclass(frozen=True)
class Place:
    """``scale * B_e A_e`` for one tensor: A [E,R,M], B [E,O,R]; E = 1 for a linear layer's ``weight``."""

    site: str
    place: str
    tensor: str
    a: Tensor
    b: Tensor
    scale: float

    @property
    def r(self) -> int:
        return self.a.shape[1]


def banks_for(places: Iterable[Place], model: nn.Module, config: PeftConfig) -> dict[str, BankConfig]:
    """As few banks as can say the ranks and scales of all places: one for each site, rank and alpha."""
    groups: dict[tuple[str, int, float], set[str]] = {}
    for place in places:
        path = place.place if place.site == "linear" else f"{place.place}.{place.tensor}"
        groups.setdefault((place.site, place.r, _alpha(place, config)), set()).add(path)
    every = {"linear": _linears(model), "experts": _stacked(model)}
    found: dict[str, BankConfig] = {}
    for (site, r, alpha), paths in groups.items():
        first = {"linear": "lora", "experts": "experts"}[site]
        number = sum(name.partition("_")[0] == first for name in found) + 1
        fields = {"r": r, "alpha": alpha, "dropout": config.dropout}
        if site == "linear":
            bank = BankConfig("rslora" if config.rslora else "lora", _targets(paths, every[site]), **fields)
        else:
            scaling = "sqrt_r" if config.rslora else "r"
            bank = BankConfig("expert-lora", _targets(paths, every[site]), scaling=scaling, **fields)
        found[first if number == 1 else f"{first}_{number}"] = bank
    return found


def native_tensors(places: Iterable[Place], banks: Mapping[str, BankConfig], model: nn.Module) -> dict[str, Tensor]:
    """The factors under the paths and in the shapes that ``model`` has with these banks; ``model`` holds no weights.

    Raises AdapterError if a bank puts an adapter where there is no factor, or elsewhere.
    """
    places = list(places)
    blocks = convert(model) if any(place.site == "experts" for place in places) else _blocks(model)
    attach(model, banks, blocks)
    factors = {}
    for place in places:
        inner = "" if place.site == "linear" else place.tensor
        if (place.place, inner, "A") in factors:
            raise AdapterError(f"{place.place}.{place.tensor} is adapted twice in the file; save the adapter again")
        factors[place.place, inner, "A"], factors[place.place, inner, "B"] = place.a, place.b
    tensors = {}
    for path, parameter in model.named_parameters():
        if ".adapter." not in path:
            continue
        value = factors.pop(split_factor(path), None)
        shape = parameter.address.global_shape
        if value is None or value.numel() != math.prod(shape):
            raise AdapterError(f"{path} {list(shape)} has no tensor in the file; it cannot be imported")
        tensors[path] = value.reshape(shape).contiguous()
    if factors:
        raise AdapterError(f"{'.'.join(filter(None, next(iter(factors))))} has no place in the model with these banks")
    return tensors


def _blocks(model: nn.Module) -> list[MoEBlock]:
    has = any(isinstance(getattr(module, "experts", None), nn.Module) for module in model.modules())
    return find_moe_blocks(model) if has else []


def _linears(model: nn.Module) -> set[str]:
    return {path for path, module in model.named_modules() if isinstance(module, nn.Linear)}


def _stacked(model: nn.Module) -> set[str]:
    return {f"{block.path}.experts.{tensor}" for block in _blocks(model) for tensor in EXPERT_TENSORS}


def _targets(paths: set[str], every: set[str]) -> tuple[str, ...]:
    """``self_attn.q_proj`` where that of all layers is among the paths, else whole paths."""
    targets = []
    for path in sorted(paths, key=lambda p: (re.sub(r"\.\d+\.", ".", p), layer_of(p))):
        rest = re.sub(r"^.*?layers\.\d+\.", "", path)
        covered = {other for other in every if other.endswith(f".{rest}")} <= paths
        targets.append(rest if covered else path)
    return tuple(dict.fromkeys(targets))


def _alpha(place: Place, config: PeftConfig) -> float:
    """What gives the scale under the bank's rule."""
    divisor = math.sqrt(place.r) if config.rslora else place.r
    alpha = place.scale * divisor
    nearest = (float(round(alpha)), alpha, math.nextafter(alpha, math.inf), math.nextafter(alpha, -math.inf))
    return next((value for value in nearest if value / divisor == place.scale), alpha)
