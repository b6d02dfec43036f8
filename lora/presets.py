"""From what a recipe says of a bank to all of its fields, and to what it is at one layer (no torch here).

Each preset is a point of Site x Bank x Router x Combine x Objective; :mod:`lora.methods` has them, and the fields are
explained in :class:`lora.config.BankConfig`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import fields, replace
from fnmatch import fnmatchcase
from typing import Any

from lora.combinations import faults, idle, shown, used_fields
from lora.config import BankAt, BankConfig, Count, Preset
from lora.errors import AdapterError
from lora.methods import ATTENTION, METHODS

_NEUTRAL: dict[str, Any] = {
    "targets": ATTENTION,
    "site": "linear",
    "adapters": (),
    "num_experts": 1,
    "r": 8,
    "rank_rule": "fixed",
    "alpha": 16.0,
    "scaling": "r",
    "share": "none",
    "kind": "lowrank",
    "mixer": False,
    "dropout": 0.0,
    "a_init": "kaiming",
    "router_init": "kaiming",
    "router": "none",
    "task_embedding": 64,
    "num_tasks": 1,
    "score": "linear",
    "temperature": 1.0,
    "jitter": 0.0,
    "combine": "static",
    "top_k": 2,
    "renormalise": True,
    "top_p": 0.8,
    "capacity": 1.0,
    "max_threshold": 0.0,
    "balance": "none",
    "router_aux_loss_coef": 0.0,
    "balance_pooled": False,
    "localized_delta": 0.1,
    "z_loss_coef": 0.0,
    "contrastive_coef": 0.0,
    "contrastive_temperature": 0.07,
}
PRESETS: dict[Preset, dict[str, Any]] = {name: method() for name, method in METHODS.items()}


def expand(bank: BankConfig) -> BankConfig:
    """``bank`` with every field filled in: its own, else its preset's, else the neutral one.

    >>> expand(BankConfig("mixlora", r=4)).top_k, expand(BankConfig("mixlora", r=4)).r
    (2, 4)
    """
    if bank.preset not in PRESETS:
        raise AdapterError(f"no preset {bank.preset!r}; one of {', '.join(PRESETS)}")
    values = _NEUTRAL | PRESETS[bank.preset]
    missing = {f.name: values[f.name] for f in fields(bank) if getattr(bank, f.name) in (None, ())}
    if bank.adapters and bank.num_experts is None:
        missing["num_experts"] = len(bank.adapters)
    return replace(bank, **missing)


def expansion(bank: BankConfig) -> str:
    """The preset and every field in use with its value, in one line.

    >>> expansion(BankConfig("perft-s", r=4))[:47]
    'perft-s: targets [mlp], site parallel, r 4, ran'
    """
    full = expand(bank)
    used = [name for name in used_fields(full) if name != "preset"]
    return f"{full.preset}: {', '.join(f'{name} {shown(getattr(full, name))}' for name in used)}"


def expansions(banks: Mapping[str, BankConfig]) -> list[str]:
    """One line for each bank."""
    return [f"{name} = {expansion(bank)}" for name, bank in banks.items()]


def bank_at(bank: BankConfig, layer: int, layers: int, routed: int = 0, active: int = 0) -> BankAt:
    """The bank at one of ``layers`` layers, each with ``routed`` experts of its own, ``active`` of them a token.

    Raises AdapterError if a list does not divide the layers, or if a rank is not whole.
    """
    full = expand(bank)
    experts = routed if full.router == "base" else _at("num_experts", full.num_experts, layer, layers)
    r = _at("r", full.r, layer, layers)
    shares = _shares(full, experts, active)
    if r % shares:
        raise AdapterError(
            f"r={r} cannot be divided among {shares} experts (rank_rule: {full.rank_rule}); choose a multiple"
        )
    r //= shares
    assert full.alpha is not None
    return BankAt(full, experts, r, full.alpha / (math.sqrt(r) if full.scaling == "sqrt_r" else r))


def _shares(full: BankConfig, experts: int, active: int) -> int:
    """How many experts ``r`` is divided among."""
    if full.rank_rule == "fixed" or full.adapters:
        return 1
    if full.rank_rule == "per_total" or full.combine in ("soft", "sum", "top_p", "threshold"):
        return experts  # of the last two a token may use all
    if full.router == "base":
        if not active:
            raise AdapterError(
                "rank_rule: per_active needs the model's experts per token, which are not known here; write "
                "rank_rule: fixed and the rank itself"
            )
        return active
    return min(full.top_k or 1, experts) if full.combine == "top_k" else 1


def _at(name: str, value: Count | None, layer: int, layers: int) -> int:
    if isinstance(value, int):
        return value
    assert value
    if layers % len(value):
        raise AdapterError(f"{name} has {len(value)} entries, which do not divide the model's {layers} layers evenly")
    return value[layer * len(value) // layers]


def layer_of(path: str) -> int:
    """The layer that a module belongs to. Raises AdapterError if its path has no number.

    >>> layer_of("model.layers.3.self_attn.q_proj")
    3
    """
    found = re.search(r"\.(\d+)\.", f".{path}.")
    if found is None:
        raise AdapterError(f"{path} is in no layer, and adapters are for layers; give another target")
    return int(found[1])


def matches(pattern: str, path: str) -> bool:
    """Whether a target names the module or tensor at ``path``: by its last parts, with shell wildcards.

    >>> matches("q_proj", "model.layers.0.self_attn.q_proj"), matches("layers.1.*.q_proj", "layers.0.self_attn.q_proj")
    (True, False)
    """
    return fnmatchcase(f".{path}", f"*.{pattern}")


def check_banks(banks: Mapping[str, BankConfig]) -> None:
    """Raises AdapterError for banks that no model could carry; the message names the bank and the key."""
    owners: dict[tuple[str, str], str] = {}
    for name, bank in banks.items():
        try:
            full = expand(bank)
        except AdapterError as error:
            raise AdapterError(f"adapter.{name}: {error}") from None
        default = expand(BankConfig(bank.preset))
        changed = [f.name for f in fields(full) if getattr(full, f.name) != getattr(default, f.name)]
        for _, sentence in (*faults(full), *idle(full, changed)):
            raise AdapterError(f"adapter.{name}.{sentence}")
        for target in full.targets:
            if (str(full.site), target) in owners:
                raise AdapterError(
                    f"adapter.{name}: {target!r} already belongs to adapter.{owners[str(full.site), target]}; "
                    "give each target to one bank"
                )
            owners[str(full.site), target] = name
