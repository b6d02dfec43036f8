"""What is kept of an adapter's base model beside its fingerprint (no torch here)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from moe.family_table import FAMILIES

_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True)
class BaseFacts:
    """What exporters need of the base model; None where its folder was not at hand.

    Attributes:
        name: path or name, for PEFT's configuration.
        family: ``model_type``.
        routed_experts: of a layer.
    """

    name: str | None = None
    family: str | None = None
    routed_experts: int | None = None

    @classmethod
    def read(cls, base: str | Path | None) -> BaseFacts:
        """Of a Hugging Face folder; only the name if ``base`` is no folder with a configuration."""
        if base is None:
            return cls()
        try:
            found = json.loads((Path(base) / "config.json").read_text(encoding="utf-8"))
            family = found.get("model_type")
        except (OSError, ValueError, AttributeError):
            return cls(str(base))
        # transformers writes some families' under another name than it reads.
        counts = [found[key] for key in _COUNTS if isinstance(found.get(key), int)] if family in FAMILIES else []
        return cls(str(base), family, counts[0] if counts else None)
