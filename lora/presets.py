"""What the adapter presets stand for (no torch here).

Each preset is a point of Site x Bank x Router x Combine x Objective; the fields are explained in
:class:`lora.config.BankConfig`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import fields, replace
from fnmatch import fnmatchcase
from typing import Any

from lora.config import BankAt, BankConfig, Count, Preset
from lora.errors import AdapterError

EXPERT_TENSORS = ("gate_up_proj", "down_proj")
ATTENTION = ("q_proj", "v_proj")
FFN = ("gate_proj", "up_proj", "down_proj")

_NEUTRAL: dict[str, Any] = {
    "targets": ATTENTION,
    "site": "linear",
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
_EXPERTS = {"site": "experts", "targets": EXPERT_TENSORS, "router": "base", "combine": "top_k"}
_TOKEN = {"router": "token", "combine": "soft", "num_experts": 8}
_MIXLORA = {
    "site": "ffn",
    "targets": ("mlp",),
    "num_experts": 8,
    "r": 16,
    "alpha": 32.0,
    "dropout": 0.05,
    "router": "token",
    "router_init": 0.02,
    "combine": "top_k",
    "balance": "switch",
    "balance_pooled": True,
    "router_aux_loss_coef": 0.001,
}
_PERFT = {"site": "parallel", "targets": ("mlp",)}

PRESETS: dict[Preset, dict[str, Any]] = {
    "lora": {},
    "rslora": {"scaling": "sqrt_r"},
    "expert-lora": _EXPERTS,
    "expert-lora-shared": _EXPERTS | {"share": "all"},
    "expert-lora-shared-outer": _EXPERTS | {"share": "outer"},
    "mixlora": _MIXLORA,
    "mixlora-dynamic": _MIXLORA | {"combine": "top_p", "renormalise": False},
    "mixlora-switch": _MIXLORA
    | {"combine": "switch", "capacity": 32.0, "z_loss_coef": 0.001, "jitter": 0.01, "router_init": 1.0},
    "molora": _TOKEN | {"num_experts": 10, "r": 4, "a_init": 0.02, "router_init": 0.02},
    "mov": _TOKEN | {"num_experts": 30, "kind": "scale", "router_init": 0.02},
    "loramoe": _TOKEN | {"targets": FFN, "r": 4, "alpha": 32.0, "balance": "localized_cv2"},
    "mola": _TOKEN | {"num_experts": 4, "combine": "top_k", "balance": "switch"},
    "moelora": _TOKEN | {"combine": "top_k", "balance": "switch", "contrastive_coef": 0.01},
    "moelora-task": _TOKEN | {"router": "task", "r": 16, "rank_rule": "per_total", "a_init": 0.01, "dropout": 0.1},
    "hydralora": _TOKEN | {"num_experts": 3, "r": 4, "alpha": 32.0, "share": "A"},
    "adamole": _TOKEN | {"num_experts": 4, "combine": "threshold", "balance": "switch", "router_aux_loss_coef": 0.01},
    "moslora": {"mixer": True},
    "perft-r": _PERFT | _TOKEN | {"num_experts": 4, "combine": "top_k"},
    "perft-e": _PERFT | {"router": "base", "combine": "top_k"},
    "perft-d": _PERFT | {"num_experts": 4, "combine": "sum"},
    "perft-s": _PERFT,
}


def expand(bank: BankConfig) -> BankConfig:
    """``bank`` with every field filled in: its own, else its preset's, else the neutral one.

    >>> expand(BankConfig("mixlora", r=4)).top_k, expand(BankConfig("mixlora", r=4)).r
    (2, 4)
    """
    if bank.preset not in PRESETS:
        raise AdapterError(f"no preset {bank.preset!r}; one of {', '.join(PRESETS)}")
    values = _NEUTRAL | PRESETS[bank.preset]
    missing = {f.name: values[f.name] for f in fields(bank) if getattr(bank, f.name) in (None, ())}
    return replace(bank, **missing)


def targets_of(bank: BankConfig) -> tuple[str, ...]:
    """The bank's targets, or its preset's when it names none."""
    return expand(bank).targets


def bank_at(bank: BankConfig, layer: int, layers: int, routed: int = 0, active: int = 0) -> BankAt:
    """The bank at one of ``layers`` layers, each with ``routed`` experts of its own, ``active`` of them a token.

    Raises AdapterError if a list does not divide the layers, or if a rank is not whole.
    """
    full = expand(bank)
    experts = routed if full.router == "base" else _at("num_experts", full.num_experts, layer, layers)
    r = _at("r", full.r, layer, layers)
    shares = {"fixed": 1, "per_active": _active(full, experts, active), "per_total": experts}[str(full.rank_rule)]
    if r % shares:
        raise AdapterError(f"r={r} cannot be divided among {shares} experts (rank_rule: {full.rank_rule})")
    r //= shares
    assert full.alpha is not None
    return BankAt(full, experts, r, full.alpha / (math.sqrt(r) if full.scaling == "sqrt_r" else r))


def _active(full: BankConfig, experts: int, active: int) -> int:
    if full.router == "base":
        return active or experts
    if full.combine in ("static", "switch"):
        return 1
    return min(full.top_k or 1, experts) if full.combine == "top_k" else experts


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
    """Raises AdapterError for banks that no model could carry; the message names the bank."""
    owners: dict[tuple[str, str], str] = {}
    for name, bank in banks.items():
        try:
            full = expand(bank)
        except AdapterError as error:
            raise AdapterError(f"adapter.{name}: {error}") from None
        ranks = full.r if isinstance(full.r, tuple) else (full.r,)
        if any(r is None or r < 1 for r in ranks):
            raise AdapterError(f"adapter.{name}: r={full.r} is no rank; use 1 or more")
        counts = full.num_experts if isinstance(full.num_experts, tuple) else (full.num_experts,)
        if full.combine == "top_k" and full.router != "base":
            for count in counts:
                if not 1 <= (full.top_k or 0) <= (count or 0):
                    raise AdapterError(f"adapter.{name}: top_k={full.top_k} must lie between 1 and num_experts={count}")
        for target in full.targets:
            if full.site == "experts" and target not in EXPERT_TENSORS:
                raise AdapterError(
                    f"adapter.{name}: experts have no tensor {target!r}; they have {', '.join(EXPERT_TENSORS)}"
                )
            if (str(full.site), target) in owners:
                raise AdapterError(
                    f"adapter.{name}: {target!r} already belongs to adapter.{owners[str(full.site), target]}; "
                    "give each target to one bank"
                )
            owners[str(full.site), target] = name


def is_exactly_lora(banks: Mapping[str, BankConfig]) -> bool:
    """Whether the whole adapter is the function PEFT calls LoRA, so that PEFT may load it."""
    return bool(banks) and all(bank.preset == "expert-lora" for bank in banks.values())


def bank_of(path: str, banks: Mapping[str, BankConfig]) -> str | None:
    """Name of the bank that the adapter tensor at ``path`` belongs to; None if no bank has such a target.

    >>> bank_of("model.layers.3.mlp.experts.adapter.down_proj.A", {"e": BankConfig("expert-lora")})
    'e'
    >>> bank_of("model.layers.3.self_attn.q_proj.adapter.router.weight", {"a": BankConfig("mola")})
    'a'
    """
    place, _, inner = path.rpartition(".adapter.")
    for name, bank in banks.items():
        site = expand(bank).site
        if site == "experts":
            if place.endswith(".experts") and inner.partition(".")[0] in targets_of(bank):
                return name
        elif any(matches(target, place) for target in targets_of(bank)):
            return name
    return None
