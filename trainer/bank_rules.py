"""Rules for one bank of the recipe's ``adapter`` section; ``bank`` is its dotted key."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

from lora.combinations import faults, idle
from lora.config import BankConfig
from lora.presets import expand, matches
from lora.targets import OUTPUT, ROUTER
from trainer.adapter_seal import adapter_problem
from trainer.data_rules import task_need
from trainer.recipe_view import Finding, View

# What is refused by its name before the model is known; lora.targets refuses what the model has.
_REFUSED = {
    "lm_head": OUTPUT,
    "embed_tokens": "embeddings are no linear layer",
    "gate": ROUTER,
    "router": ROUTER,
}


def expanded(view: View, bank: str) -> BankConfig:
    """The bank with its preset's fields. Raises Unknown if any of its values is wrong already."""
    given = _given(view, bank)
    values: dict[str, Any] = {name: view(f"{bank}.{name}") for name in ("preset", *given)}
    values |= {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    return expand(BankConfig(**values))


def _given(view: View, bank: str) -> list[str]:
    return [field.name for field in fields(BankConfig) if view.given(f"{bank}.{field.name}")]


def _empty(view: View, bank: str) -> Iterator[Finding]:
    for name in _given(view, bank):
        if not view.reported(f"{bank}.{name}") and view(f"{bank}.{name}") in (None, []):
            yield f"{bank}.{name}", f"{bank}.{name} is empty; give a value or remove the key"


def _faults(view: View, bank: str) -> Iterator[Finding]:
    for name, sentence in faults(expanded(view, bank)):
        yield f"{bank}.{name}", f"{bank}.{sentence}"


def _idle(view: View, bank: str) -> Iterator[Finding]:
    full = expanded(view, bank)
    for name, sentence in idle(full, _given(view, bank)):
        yield f"{bank}.{name}", f"{bank}.{sentence}"


def _targets(view: View, bank: str) -> Iterator[Finding]:
    if not view.given(f"{bank}.targets"):
        return
    site, names = expanded(view, bank).site, view(f"{bank}.targets") or []
    for i, name in enumerate(names):
        key = f"{bank}.targets.{i}"
        if name in names[:i]:
            yield key, f"{bank}.targets names {name!r} twice; keep one"
        elif site == "linear" and (why := _REFUSED.get(name.rpartition(".")[2])):
            yield key, f"{bank}.targets: {name!r} cannot be adapted: {why}; choose linear layers such as q_proj"


def _overlap(view: View, bank: str) -> Iterator[Finding]:
    mine = expanded(view, bank)
    for other in view.values["adapter"]:
        if f"adapter.{other}" == bank or "." in other:
            return
        theirs = expanded(view, f"adapter.{other}")
        shared = [
            name for name in mine.targets if any(matches(name, one) or matches(one, name) for one in theirs.targets)
        ]
        if theirs.site == mine.site and shared:
            yield bank, f"banks adapter.{other} and {bank} both target {', '.join(shared)}; keep one of them"


def _adapters(view: View, bank: str) -> Iterator[Finding]:
    """Of banks whose experts are trained adapters."""
    full = expanded(view, bank)
    if not full.adapters:
        return
    if not view.given("model.path"):
        yield f"{bank}.adapters", f"{bank}.adapters were trained on a model, and this one is new; give model.path"
    for i, folder in enumerate(full.adapters):
        if why := adapter_problem(folder):
            yield f"{bank}.adapters.{i}", f"{bank}.adapters: {why}"


def _nothing_trains(view: View, bank: str) -> Iterator[Finding]:
    names = [f"adapter.{name}" for name in view.values["adapter"]]
    if bank == names[0] and all(expanded(view, name).score == "arrow" for name in names):
        yield (
            bank,
            f"{bank}: nothing trains, for score: arrow only reads trained adapters; add a bank that trains, or make an "
            "adapter of them without a run: planaria adapter arrow OUT FOLDER FOLDER",
        )


def _tasks(view: View, bank: str) -> Iterator[Finding]:
    """Tenants' data may differ in format; they have no banks that need tasks."""
    full = expanded(view, bank)
    if (need := task_need(full)) and not (view("data.format") == "chat" and view("data.task_key")):
        yield f"{bank}.{'router' if full.router == 'task' else 'balance'}", f"{bank}{need}"


def _prompts(view: View, bank: str) -> Iterator[Finding]:
    """Of plain text a whole row would be the prompt, and its router would see the tokens that are to be predicted."""
    if expanded(view, bank).router == "prompt" and view("data.format") != "chat":
        yield (
            f"{bank}.router",
            f"{bank} routes by prompt, and only chat tells prompts from answers; write data.format: chat, or choose a "
            "preset that routes by tokens",
        )


BANK_RULES: tuple[Callable[[View, str], Iterator[Finding]], ...] = (
    _empty,
    _faults,
    _idle,
    _targets,
    _overlap,
    _adapters,
    _nothing_trains,
    _tasks,
    _prompts,
)
