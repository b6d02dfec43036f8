"""Which other forms hold exactly the function of an adapter, and why the others do not (no torch here).

"Exactly" is meant of the function at inference: dropout and router jitter act in training only, and each weight of the
result is rounded once, to the dtype that it is written in. And it is meant of products in fp32: a bank's router
computes in fp32 whatever the model's dtype, those of Hugging Face's mixtures in the model's, so that an upcycled model
in bf16 may choose other experts where two are nearly as good.
"""

from __future__ import annotations

from collections.abc import Mapping

from lora.config import BankConfig
from lora.errors import AdapterError
from lora.presets import expand

FORMS = ("peft", "peft-per-expert", "tasks", "upcycled", "merged")


def obstacles(banks: Mapping[str, BankConfig]) -> dict[str, str]:
    """For each form of :data:`FORMS`: why these banks cannot be written so; empty where they can, exactly."""
    found = dict.fromkeys(FORMS, "")
    for name, bank in banks.items():
        for form, why in _of_bank(expand(bank)).items():
            if why and not found[form]:
                found[form] = f"adapter.{name} ({bank.preset}) {why}"
    kinds = [expand(bank) for bank in banks.values()]
    if not found["tasks"] and not any(bank.router == "task" for bank in kinds):
        found["tasks"] = "no bank is routed by task"
    if not found["upcycled"] and sum(bank.site == "ffn" for bank in kinds) != 1:
        found["upcycled"] = "it takes exactly one bank on feed-forward blocks (mixlora)"
    return found


def require(form: str, banks: Mapping[str, BankConfig]) -> None:
    """Raises AdapterError if the banks cannot be written in ``form`` exactly, naming the bank and what can be had."""
    found = obstacles(banks)
    if found[form]:
        exact = [other for other, why in found.items() if not why]
        instead = f"; {', '.join(exact)} can be had" if exact else "; planaria's own folder is the only exact form"
        raise AdapterError(f"this adapter cannot be written as {form}: {found[form]}{instead}")


def is_exactly_lora(banks: Mapping[str, BankConfig]) -> bool:
    """Whether the whole adapter is the function PEFT calls LoRA, so that PEFT may load it."""
    return bool(banks) and not obstacles(banks)["peft"]


def needs_whole_prompts(banks: Mapping[str, BankConfig]) -> str:
    """Why a runtime that runs a prompt once and in pieces cannot run these banks; empty if it can."""
    for name, bank in banks.items():
        full = expand(bank)
        if full.router == "prompt":
            return f"adapter.{name} ({bank.preset}) has to see a prompt whole before its first layer adapts anything"
        if full.score == "states" and full.router == "token":
            return f"adapter.{name} ({bank.preset}) runs the model twice"
    return ""


def _of_bank(full: BankConfig) -> dict[str, str]:
    lora = _not_lora(full)
    task = "" if full.router == "task" and full.site == "linear" and full.combine == "soft" else lora
    if full.kind != "lowrank":
        task = lora
    upcycled = _not_experts(full) if full.site == "ffn" else lora
    if not upcycled and full.site == "experts":
        upcycled = "is on experts, and the base of an upcycled model has none"
    return {"peft": lora, "peft-per-expert": lora, "tasks": task, "upcycled": upcycled, "merged": lora}


def _not_lora(full: BankConfig) -> str:
    """Why a bank is not one fixed low-rank update of a weight; empty if it is."""
    if full.site == "ffn":
        return "runs a whole feed-forward block for each of its experts, which is no update of one weight"
    if full.site == "parallel":
        return "adds a branch beside the block, which is no update of one of its weights"
    if full.kind != "lowrank":
        return "scales outputs by vectors instead of adding a low-rank product"
    if full.router in ("token", "task", "prompt"):
        return f"weighs its experts by a router for each {full.router}"
    if full.site == "linear" and _most(full) > 1 and full.combine != "sum":
        return f"has several experts on a linear layer and combine: {full.combine}"
    return ""


def _not_experts(full: BankConfig) -> str:
    """Why a bank on feed-forward blocks is not a Hugging Face mixture of experts; empty if it is."""
    if full.router != "token" or full.combine != "top_k":
        return (
            f"uses router: {full.router} and combine: {full.combine}; Hugging Face's mixtures take the top k of a token"
        )
    if full.kind != "lowrank":
        return "scales outputs by vectors instead of adding a low-rank product"
    if isinstance(full.num_experts, tuple) and len(set(full.num_experts)) > 1:
        return "has another number of experts in some layers, and a configuration has one number"
    return ""


def _most(full: BankConfig) -> int:
    counts = full.num_experts if isinstance(full.num_experts, tuple) else (full.num_experts or 1,)
    return max(counts)
