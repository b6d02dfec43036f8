"""An adapter that is exactly LoRA as a folder that PEFT (0.19 or later) loads by itself.

PEFT adapts a stacked parameter through ``target_parameters``. It packs A [E, r, in] as (E*r, in), the
expert slowest, but B [E, out, r] as (out, r*E), the expert *fastest*, and nests one wrapper per tensor
around the experts: the keys of gate_up_proj end in ``experts.base_layer``, those of down_proj in
``experts``, when both are adapted.

The other layout has each expert's matrices apart, under the names that the family's files give them; PEFT fuses them
when it loads them: A of gate and up one below the other, B block-diagonal, twice the rank and alpha.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from lora.base_facts import BaseFacts
from lora.config import BankConfig
from lora.deltas import Delta, deltas_of, summed
from lora.errors import AdapterError
from lora.exactness import require
from lora.methods import EXPERT_TENSORS
from lora.presets import expand
from moe.family_table import FAMILIES
from moe.folder import new_folder

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
_PREFIX = "base_model.model."
_LAYER = re.compile(r"^(.*?layers\.\d+\.)(.*)$")
# PEFT takes these names of a mixture's linear layers for its experts', and would adapt those instead.
_MISTAKEN = ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")


def pack_a(a_ERM: Tensor) -> Tensor:
    """(E*R, M)."""
    return a_ERM.flatten(0, 1).contiguous()


def pack_b(b_EOR: Tensor) -> Tensor:
    """(O, R*E)."""
    return b_EOR.permute(1, 2, 0).flatten(1).contiguous()


def unpack_a(a_XM: Tensor, experts: int) -> Tensor:
    return a_XM.unflatten(0, (experts, -1)).contiguous()


def unpack_b(b_OX: Tensor, experts: int, *, expert_slowest: bool = False) -> Tensor:
    """[E, O, R]; ``expert_slowest``: the packing is (O, E*R)."""
    if expert_slowest:
        return b_OX.unflatten(1, (experts, -1)).permute(1, 0, 2).contiguous()
    return b_OX.unflatten(1, (-1, experts)).permute(2, 0, 1).contiguous()


@dataclass(frozen=True)
class _Rank:
    """What PEFT has to know of the places whose path matches ``rest`` behind ``layer``, a regular expression."""

    layer: str
    rest: str
    r: int
    alpha: float
    told: bool = False  # even if it is the default


def peft_files(
    tensors: Mapping[str, Tensor],
    banks: Mapping[str, BankConfig],
    base: BaseFacts,
    *,
    per_expert: bool = False,
    owners: Mapping[str, str] | None = None,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """PEFT's tensors by key and its configuration, for an adapter that is exactly LoRA.

    Args:
        tensors: by parameter path, over all experts.
        per_expert: each expert's matrices apart; needs the base's family.
        owners: the bank of each tensor, as :func:`lora.deltas.deltas_of` takes them.
    Raises AdapterError if the adapter is anything else than LoRA, naming the bank.
    """
    require("peft", banks)
    found = deltas_of(tensors, banks, base.routed_experts, owners)
    return pack(found, base, dropout=_dropout(banks), per_expert=per_expert)


def pack(
    found: Iterable[Delta], base: BaseFacts, *, dropout: float = 0.0, per_expert: bool = False
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """As :func:`peft_files`, of updates. Updates of linear layers with several experts are summed."""
    found = [summed(delta) if delta.site == "linear" else delta for delta in found]
    # PEFT doubles rank and alpha of what it fuses, which is right for alpha / r only.
    by_root = all(delta.rank_scaling for delta in found) and not per_expert
    packed: dict[str, Tensor] = {}
    ranks: list[_Rank] = []
    modules: set[str] = set()
    parameters: set[str] = set()
    stacked = [delta for delta in found if delta.site == "experts"]
    for delta in found:
        alpha = delta.alpha if by_root or not delta.rank_scaling else delta.alpha * math.sqrt(delta.r)
        if delta.site == "linear":
            as_parameter = _is_mistaken(delta, base, bool(stacked))
            key = delta.name if as_parameter else delta.place
            (parameters if as_parameter else modules).add(key)
            ranks.append(_rank(key, delta.r, alpha))
            packed |= _pair(delta.place, delta.a_ERM[0], delta.b_EOR[0])
        elif per_expert:
            names = _expert_names(delta, base, stacked)
            packed |= _apart(delta, names)
            # Modules where experts are apart; the parameter where PEFT fuses them, which it does not tell all families.
            where = "experts" if delta.everywhere else names[0]
            modules |= {f"{where}.{e}.{name}" for e in range(delta.experts) for name in names[1]}
            parameters.add(_rest(delta.name) if delta.everywhere else delta.name)
            ranks += _ranks_apart(delta, names, alpha)
        else:
            both = sum(other.place == delta.place for other in stacked) == 2
            nested = ".base_layer" if both and delta.tensor == EXPERT_TENSORS[0] else ""
            packed |= _pair(f"{delta.place}{nested}", pack_a(delta.a_ERM), pack_b(delta.b_EOR))
            parameters.add(_rest(delta.name) if delta.everywhere else delta.name)
            ranks.append(_rank(delta.name, delta.r, alpha))
    config = _config(ranks, sorted(modules), sorted(parameters), base.name)
    # PEFT refuses dropout together with target_parameters; it acts in training only, and our manifest keeps it.
    return packed, config | {"use_rslora": by_root, "lora_dropout": 0.0 if parameters or stacked else dropout}


def write_peft(
    tensors: Mapping[str, Tensor],
    banks: Mapping[str, BankConfig],
    out: Path,
    base: BaseFacts,
    *,
    per_expert: bool = False,
    owners: Mapping[str, str] | None = None,
) -> int:
    """Write PEFT's folder, whole or not at all; returns how many tensors it has.

    Raises AdapterError as :func:`peft_files`, FolderError if ``out`` exists.
    """
    packed, config = peft_files(tensors, banks, base, per_expert=per_expert, owners=owners)
    with new_folder(out) as temporary:
        write_files(temporary, packed, config)
    return len(packed)


def write_files(folder: Path, packed: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    save_file({key: tensor.contiguous() for key, tensor in packed.items()}, folder / WEIGHTS_FILE, {"format": "pt"})
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def lost_dropout(folder: Path, banks: Mapping[str, BankConfig]) -> str | None:
    """A line on the dropout that PEFT's configuration in ``folder`` leaves out of the banks'; None if it has all."""
    config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    full = {name: float(expand(bank).dropout or 0) for name, bank in banks.items()}
    kept = config.get("lora_dropout")  # absent where PEFT refuses the adapter
    if kept is None or set(full.values()) <= {kept}:
        return None
    had = ", ".join(f"adapter.{name} {value:g}" for name, value in full.items())
    return (
        f"PEFT's file has lora_dropout {kept:g}, the banks have {had}: PEFT takes one number for all of them, and none "
        "beside stacked experts. It acts in training only; set it again to train on there"
    )


def _config(ranks: list[_Rank], modules: list[str], parameters: list[str], base: str | None) -> dict[str, Any]:
    (r, alpha), _ = Counter((rank.r, rank.alpha) for rank in ranks).most_common(1)[0]
    told = _patterns(ranks, r, alpha)
    return {
        "peft_type": "LORA",
        # Which axis of a stacked parameter is "in" changed with 0.19; readers need to know.
        "peft_version": version("peft"),
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": r,
        "lora_alpha": _number(alpha),
        "bias": "none",
        "target_modules": modules,
        "target_parameters": parameters or None,
        "rank_pattern": {key: rank.r for key, rank in told.items()},
        "alpha_pattern": {key: _number(rank.alpha) for key, rank in told.items()},
    }


def _patterns(ranks: list[_Rank], r: int, alpha: float) -> dict[str, _Rank]:
    """One entry for all layers where they agree, else one for each."""
    by_rest: dict[str, list[_Rank]] = {}
    for rank in ranks:
        by_rest.setdefault(rank.rest, []).append(rank)
    told = {}
    for rest, group in by_rest.items():
        if len({(rank.r, rank.alpha) for rank in group}) == 1:
            told[rest] = group[0]
        else:
            told |= {rank.layer + rest: rank for rank in group}
    return {key: rank for key, rank in told.items() if rank.told or (rank.r, rank.alpha) != (r, alpha)}


def _rank(path: str, r: int, alpha: float) -> _Rank:
    found = _LAYER.match(path)
    layer, rest = (found[1], found[2]) if found else ("", path)
    return _Rank(re.escape(layer), re.escape(rest), r, alpha)


def _rest(path: str) -> str:
    found = _LAYER.match(path)
    return found[2] if found else path


def _number(value: float) -> float | int:
    return int(value) if float(value).is_integer() else value


def _pair(place: str, a: Tensor, b: Tensor) -> dict[str, Tensor]:
    return {f"{_PREFIX}{place}.lora_A.weight": a, f"{_PREFIX}{place}.lora_B.weight": b}


def _expert_names(delta: Delta, base: BaseFacts, stacked: list[Delta]) -> tuple[str, tuple[str, ...]]:
    """What the family's files call the place, and the matrices of one expert that are stacked in ``delta.tensor``."""
    family = FAMILIES.get(base.family or "")
    if family is None or family.expert_names is None:
        raise AdapterError(
            f"how files name each expert's matrices depends on the model's family, and {base.family or 'that'} is not "
            "one with such names here; name the base's folder with --base, or use --to peft"
        )
    if {other.tensor for other in stacked if other.place == delta.place} != set(EXPERT_TENSORS):
        raise AdapterError(
            f"adapter.{delta.bank} adapts only {delta.tensor} of {delta.place}; PEFT fuses matrices that are apart "
            "only if all of an expert's are there: use --to peft"
        )
    gate, up, down = family.expert_names
    place = delta.place.replace(".mlp.", f".{family.block_on_disk}.")
    return place, ((gate, up) if delta.tensor == EXPERT_TENSORS[0] else (down,))


def _apart(delta: Delta, names: tuple[str, tuple[str, ...]]) -> dict[str, Tensor]:
    """Gate and up have the same A; the rows of B are theirs by halves. Shared storage is copied."""
    place, matrices = names
    packed: dict[str, Tensor] = {}
    for expert in range(delta.experts):
        for matrix, b_OR in zip(matrices, delta.b_EOR[expert].chunk(len(matrices)), strict=True):
            packed |= _pair(f"{place}.{expert}.{matrix}", delta.a_ERM[expert].clone(), b_OR.clone())
    return packed


def _ranks_apart(delta: Delta, names: tuple[str, tuple[str, ...]], alpha: float) -> list[_Rank]:
    """For models with experts apart, and for those where PEFT fuses them."""
    place, matrices = names
    apart = _rank(place, delta.r, alpha)
    matrix = rf"\.\d+\.({'|'.join(matrices)})"
    fused = _rank(delta.name, delta.r * len(matrices), alpha * len(matrices))
    # Told always: left out, the doubled rank would be PEFT's guess from its default.
    return [
        _Rank(apart.layer, apart.rest + matrix, delta.r, alpha),
        _Rank(fused.layer, fused.rest, fused.r, fused.alpha, told=True),
    ]


def _is_mistaken(delta: Delta, base: BaseFacts, beside_experts: bool) -> bool:
    mixture = beside_experts or ".shared_expert" in delta.place
    if base.family is not None:
        mixture = base.family in FAMILIES
    return mixture and delta.place.rpartition(".")[2] in _MISTAKEN


def _dropout(banks: Mapping[str, BankConfig]) -> float:
    values = {float(expand(bank).dropout or 0) for bank in banks.values()}
    return values.pop() if len(values) == 1 else 0.0
