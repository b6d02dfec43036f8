"""Expert LoRA as a folder that PEFT (0.19 or later) loads by itself.

PEFT adapts a stacked parameter through ``target_parameters``. It packs A [E, r, in] as (E*r, in), the
expert slowest, but B [E, out, r] as (out, r*E), the expert *fastest*, and nests one wrapper per tensor
around the experts: the keys of gate_up_proj end in ``experts.base_layer``, those of down_proj in
``experts``, when both are adapted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from lora.config import BankConfig
from lora.errors import AdapterError
from lora.exactness import is_exactly_lora
from lora.presets import EXPERT_TENSORS, expand, targets_of

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
_LAYER = re.compile(r"(?:^|.*?\.)layers\.\d+\.")


def pack_a(a_ERM: Tensor) -> Tensor:
    return a_ERM.flatten(0, 1).contiguous()


def pack_b(b_EOR: Tensor) -> Tensor:
    return b_EOR.permute(1, 2, 0).flatten(1).contiguous()


def peft_tensors(tensors: Mapping[str, Tensor], banks: Mapping[str, BankConfig]) -> dict[str, Tensor]:
    """PEFT's tensors for an adapter of expert-lora banks; ``tensors`` by parameter path, over all experts.

    Raises AdapterError if the adapter is anything else than LoRA.
    """
    _require_lora(banks)
    adapted = {target for bank in banks.values() for target in targets_of(bank)}
    packed = {}
    for path, tensor in tensors.items():
        experts, _, inner = path.rpartition(".adapter.")
        target, _, factor = inner.partition(".")
        nested = ".base_layer" if target == EXPERT_TENSORS[0] and len(adapted) == 2 else ""
        key = f"base_model.model.{experts}{nested}.lora_{factor}.weight"
        packed[key] = pack_a(tensor) if factor == "A" else pack_b(tensor)
    return packed


def peft_config(
    tensors: Mapping[str, Tensor], banks: Mapping[str, BankConfig], base_model: str | None
) -> dict[str, Any]:
    """The ``adapter_config.json`` that goes with :func:`peft_tensors`."""
    _require_lora(banks)
    of = {target: expand(bank) for bank in banks.values() for target in targets_of(bank)}
    first = next(iter(of.values()))
    sites = {_LAYER.sub("", path.rpartition(".adapter.")[0]) for path in tensors}
    return {
        "peft_type": "LORA",
        # Which axis of a stacked parameter is "in" changed with 0.19; readers need to know.
        "peft_version": version("peft"),
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": first.r,
        "lora_alpha": first.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": [],
        "target_parameters": sorted(f"{site}.{target}" for site in sites for target in of),
        "rank_pattern": {t: bank.r for t, bank in of.items() if bank.r != first.r},
        "alpha_pattern": {t: bank.alpha for t, bank in of.items() if bank.alpha != first.alpha},
    }


def export_peft(
    folder: str | Path,
    tensors: Mapping[str, Tensor],
    banks: Mapping[str, BankConfig],
    *,
    base_model: str | None = None,
) -> None:
    """Write ``adapter_model.safetensors`` and ``adapter_config.json`` into an existing folder.

    Raises AdapterError if the adapter is anything else than LoRA on experts.
    """
    folder = Path(folder)
    config = peft_config(tensors, banks, base_model)
    save_file(peft_tensors(tensors, banks), folder / WEIGHTS_FILE, metadata={"format": "pt"})
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")


def _require_lora(banks: Mapping[str, BankConfig]) -> None:
    if not is_exactly_lora(banks):
        routed = ", ".join(f"{name} ({bank.preset})" for name, bank in banks.items() if bank.preset != "expert-lora")
        raise AdapterError(f"PEFT can only load expert-lora banks as LoRA; this adapter has {routed or 'no bank'}")
