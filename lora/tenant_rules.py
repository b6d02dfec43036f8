"""Which banks several tenants can have, and what their tensors are called (no torch here)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from lora.config import BankConfig
from lora.presets import expand

PREFIX = "tenant-"  # of the module that holds one tenant's factors, inside ``adapter``
T = TypeVar("T")
_NEUTRAL = ("router", "combine", "share", "kind", "mixer", "num_experts", "a_init")


def refused(bank: BankConfig) -> str:
    """Why tenants cannot have this bank, or nothing."""
    full = expand(bank)
    if full.site not in ("linear", "experts"):
        return f"tenants cannot have preset {bank.preset} (site {full.site}); choose lora, rslora or expert-lora"
    neutral = expand(BankConfig("expert-lora" if full.site == "experts" else "lora"))
    for key in _NEUTRAL:
        if getattr(full, key) != getattr(neutral, key):
            return (
                f"tenants cannot have preset {bank.preset} with {key} {getattr(full, key)}; choose preset lora, rslora "
                "or expert-lora as they are, or train it alone, without tenants"
            )
    return ""


def alone(tensors: Mapping[str, T], tenant: str) -> dict[str, T]:
    """One tenant's tensors of all tenants', under the paths that they would have if it trained alone.

    >>> alone({"q_proj.adapter.tenant-a.A": 1, "q_proj.adapter.tenant-b.A": 2}, "b")
    {'q_proj.adapter.A': 2}
    """
    owner = f".{PREFIX}{tenant}."
    return {path.replace(owner, "."): tensor for path, tensor in tensors.items() if owner in path}
