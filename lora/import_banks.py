"""Banks for updates that come from elsewhere, and their tensors under our names.

Shapes: E experts, R rank, M inputs, O outputs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor, nn
from torch.nn import functional

from lora.attach import attach
from lora.config import BankConfig
from lora.deltas import split_factor
from lora.errors import AdapterError
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


def levelled(places: Iterable[Place]) -> list[Place]:
    """The same updates, with one rank in all layers where the scale is one and the ranks are not.

    A bank has one alpha, and with it a scale that follows the rank. Rows of zeros in A and B change no update.
    """
    found = list(places)
    for tensor in {place.tensor for place in found if place.site == "experts"}:
        here = [i for i, place in enumerate(found) if place.site == "experts" and place.tensor == tensor]
        if len({found[i].scale for i in here}) == 1:
            most = max(found[i].r for i in here)
            for i in here:
                place, missing = found[i], most - found[i].r
                a, b = functional.pad(place.a, (0, 0, 0, missing)), functional.pad(place.b, (0, missing))
                found[i] = replace(place, a=a, b=b)
    return found


def banks_for(places: Iterable[Place], model: nn.Module, config: PeftConfig) -> dict[str, BankConfig]:
    """As few banks as can say the ranks and scales of all places.

    Raises AdapterError where no bank can: experts that some layers lack.
    """
    places = list(places)
    experts = [place for place in places if place.site == "experts"]
    banks = _expert_banks(experts, model, config) if experts else {}
    return banks | _linear_banks([place for place in places if place.site == "linear"], model, config)


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


def _expert_banks(experts: list[Place], model: nn.Module, config: PeftConfig) -> dict[str, BankConfig]:
    """One for each tensor; banks on experts are on those of all layers."""
    all_paths = {f"{block.path}.experts" for block in find_moe_blocks(model)}
    by_tensor: dict[str, list[Place]] = {}
    for place in experts:
        by_tensor.setdefault(place.tensor, []).append(place)
    found: dict[str, BankConfig] = {}
    for tensor, places in by_tensor.items():
        if missing := sorted(all_paths - {place.place for place in places}):
            raise AdapterError(f"{missing[0]}.{tensor} is not adapted, and other layers' is; a bank is on all experts")
        bank = _expert_bank(tensor, places, model, config)
        same = next((name for name, other in found.items() if _alike(other, bank)), None)
        if same is None:
            found["experts" if not found else f"experts_{tensor}"] = bank
        else:
            found[same] = BankConfig(**{**vars(bank), "targets": (*found[same].targets, tensor)})
    return found


def _alike(one: BankConfig, other: BankConfig) -> bool:
    return {**vars(one), "targets": ()} == {**vars(other), "targets": ()}


def _expert_bank(tensor: str, places: list[Place], model: nn.Module, config: PeftConfig) -> BankConfig:
    ranks = {layer_of(place.place): place.r for place in places}
    alphas = {_alpha(place, config) for place in places}
    if len(alphas) > 1:
        told = ", ".join(f"{alpha:g}" for alpha in sorted(alphas))
        raise AdapterError(f"experts' {tensor} has alpha {told} in different layers, and a bank has one for all")
    r: int | tuple[int, ...] = places[0].r
    if len(set(ranks.values())) > 1:
        # A rank for each layer of the model; dense ones have no use for theirs.
        r = tuple(ranks.get(layer, places[0].r) for layer in range(_layers(model)))
    return BankConfig(
        "expert-lora", (tensor,), r=r, alpha=alphas.pop(), scaling=_scaling(config), dropout=config.dropout
    )


def _linear_banks(linears: list[Place], model: nn.Module, config: PeftConfig) -> dict[str, BankConfig]:
    """One for each rank and alpha; its targets are as short as they can be without naming another layer."""
    groups: dict[tuple[int, float], list[str]] = {}
    for place in linears:
        groups.setdefault((place.r, _alpha(place, config)), []).append(place.place)
    every = {path for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    found = {}
    for number, ((r, alpha), paths) in enumerate(groups.items()):
        preset = "rslora" if config.rslora else "lora"
        targets = _targets(set(paths), every)
        found["lora" if not number else f"lora_{number + 1}"] = BankConfig(
            preset, targets, r=r, alpha=alpha, dropout=config.dropout
        )
    return found


def _targets(paths: set[str], every: set[str]) -> tuple[str, ...]:
    """``self_attn.q_proj`` where all layers' is among the paths, else whole paths."""
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


def _scaling(config: PeftConfig) -> str:
    return "sqrt_r" if config.rslora else "r"


def _layers(model: nn.Module) -> int:
    return int(model.config.num_hidden_layers)
