"""What a recipe says about one bank of adapters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Preset = Literal["expert-lora", "mola"]


@dataclass(frozen=True)
class BankConfig:
    """One adapter bank.

    Attributes:
        preset: ``expert-lora`` puts one LoRA on every routed expert's stacked tensors; ``mola`` puts
            several LoRA experts behind a router on linear layers of the attention (arXiv 2402.08562).
        targets: tensors of an expert (expert-lora) or names of linear layers (mola); empty means the
            preset's own.
        r: rank of every adapter.
        alpha: the update is scaled by ``alpha / r``.
        num_experts: mola only, LoRA experts per layer.
        top_k: mola only, LoRA experts per token.
        router_aux_loss_coef: mola only, weight of the router's balance loss.
    """

    preset: Preset
    targets: tuple[str, ...] = ()
    r: int = 8
    alpha: float = 16.0
    num_experts: int = 4
    top_k: int = 2
    router_aux_loss_coef: float = 0.0
