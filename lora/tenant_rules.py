"""Which banks several tenants can have (no torch here)."""

from __future__ import annotations

from lora.config import BankConfig
from lora.presets import expand

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
