"""Rules for one bank of the recipe's ``adapter`` section; ``bank`` is its dotted key."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

from lora.config import BankConfig
from lora.presets import EXPERT_TENSORS, expand
from trainer.recipe_view import Finding, View

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def expanded(view: View, bank: str) -> BankConfig:
    """The bank with its preset's fields. Raises Unknown if any of its values is wrong already."""
    given = [field.name for field in fields(BankConfig) if view.given(f"{bank}.{field.name}")]
    values: dict[str, Any] = {name: view(f"{bank}.{name}") for name in ("preset", *given)}
    values |= {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    return expand(BankConfig(**values))


def _ranges(view: View, bank: str) -> Iterator[Finding]:
    full = expanded(view, bank)
    for name in ("r", "num_experts", "top_k"):
        value = getattr(full, name)
        if any(count < 1 for count in (value if isinstance(value, tuple) else (value,))):
            yield f"{bank}.{name}", f"{bank}.{name} must be at least 1, not {value}; change it"
    if (full.alpha or 0) <= 0:
        yield f"{bank}.alpha", f"{bank}.alpha must be more than 0, not {full.alpha}; change it"
    if (full.router_aux_loss_coef or 0) < 0:
        yield f"{bank}.router_aux_loss_coef", f"{bank}.router_aux_loss_coef must be at least 0; change it"


def _top_k(view: View, bank: str) -> Iterator[Finding]:
    full = expanded(view, bank)
    counts = full.num_experts if isinstance(full.num_experts, tuple) else (full.num_experts or 1,)
    top_k, experts = full.top_k or 1, min(counts)
    if full.combine == "top_k" and full.router == "token" and top_k > experts >= 1:
        yield f"{bank}.top_k", f"{bank}.top_k={top_k} is more than {bank}.num_experts={experts}; choose fewer"


def _keys(view: View, bank: str) -> Iterator[Finding]:
    full = expanded(view, bank)
    if full.site == "experts":
        for name in ("num_experts", "top_k", "router_aux_loss_coef"):
            if view.given(f"{bank}.{name}"):
                yield (
                    f"{bank}.{name}",
                    f"{bank}.{name} belongs to banks with a router of their own; {full.preset} follows the model's: "
                    "remove it",
                )


def _targets(view: View, bank: str) -> Iterator[Finding]:
    full = expanded(view, bank)
    allowed = {"experts": EXPERT_TENSORS, "linear": _ATTENTION}.get(str(full.site), full.targets)
    names = view(f"{bank}.targets")
    for i, name in enumerate(names):
        if name not in allowed:
            yield (
                f"{bank}.targets.{i}",
                f"{bank}.targets: {name!r} is no target of preset {full.preset}; choose from {', '.join(allowed)}",
            )
        elif name in names[:i]:
            yield f"{bank}.targets.{i}", f"{bank}.targets names {name!r} twice; keep one"


def _overlap(view: View, bank: str) -> Iterator[Finding]:
    mine = expanded(view, bank)
    for other in view.values["adapter"]:
        if f"adapter.{other}" == bank or "." in other:
            return
        theirs = expanded(view, f"adapter.{other}")
        if theirs.site == mine.site and (shared := [name for name in mine.targets if name in theirs.targets]):
            yield bank, f"banks adapter.{other} and {bank} both target {', '.join(shared)}; keep one of them"


BANK_RULES: tuple[Callable[[View, str], Iterator[Finding]], ...] = (_ranges, _top_k, _keys, _targets, _overlap)
