"""What the adapter presets stand for (no torch here)."""

from __future__ import annotations

from collections.abc import Mapping

from lora.config import BankConfig
from lora.errors import AdapterError

EXPERT_TENSORS = ("gate_up_proj", "down_proj")
DEFAULT_TARGETS: dict[str, tuple[str, ...]] = {
    "expert-lora": EXPERT_TENSORS,
    "mola": ("q_proj", "v_proj"),
}


def targets_of(bank: BankConfig) -> tuple[str, ...]:
    """The bank's targets, or its preset's when it names none."""
    return tuple(bank.targets) or DEFAULT_TARGETS[bank.preset]


def check_banks(banks: Mapping[str, BankConfig]) -> None:
    """Raises AdapterError for banks that no model could carry; the message names the bank."""
    owners: dict[str, str] = {}
    for name, bank in banks.items():
        if bank.preset not in DEFAULT_TARGETS:
            raise AdapterError(f"adapter.{name}: no preset {bank.preset!r}; one of {', '.join(DEFAULT_TARGETS)}")
        if bank.r < 1:
            raise AdapterError(f"adapter.{name}: r={bank.r} is no rank; use 1 or more")
        if bank.preset == "mola" and not 1 <= bank.top_k <= bank.num_experts:
            raise AdapterError(
                f"adapter.{name}: top_k={bank.top_k} must lie between 1 and num_experts={bank.num_experts}"
            )
        for target in targets_of(bank):
            if bank.preset == "expert-lora" and target not in EXPERT_TENSORS:
                raise AdapterError(
                    f"adapter.{name}: experts have no tensor {target!r}; they have {', '.join(EXPERT_TENSORS)}"
                )
            if target in owners:
                raise AdapterError(
                    f"adapter.{name}: {target!r} already belongs to adapter.{owners[target]}; "
                    "give each target to one bank"
                )
            owners[target] = name


def is_exactly_lora(banks: Mapping[str, BankConfig]) -> bool:
    """Whether the whole adapter is the function PEFT calls LoRA, so that PEFT may load it."""
    return bool(banks) and all(bank.preset == "expert-lora" for bank in banks.values())


def bank_of(path: str, banks: Mapping[str, BankConfig]) -> str | None:
    """Name of the bank that the adapter tensor at ``path`` belongs to; None if no bank has such a target.

    >>> bank_of("model.layers.3.mlp.experts.adapter.down_proj.A", {"e": BankConfig("expert-lora")})
    'e'
    >>> bank_of("model.layers.3.self_attn.q_proj.adapter.router", {"a": BankConfig("mola")})
    'a'
    """
    site, _, inner = path.rpartition(".adapter.")
    tensor, on_experts, _ = inner.partition(".")
    for name, bank in banks.items():
        if on_experts and bank.preset == "expert-lora" and tensor in targets_of(bank):
            return name
        if not on_experts and bank.preset == "mola" and f".{site}".endswith(tuple(f".{t}" for t in targets_of(bank))):
            return name
    return None
