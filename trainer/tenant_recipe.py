"""What the recipe's ``tenants`` say once defaults are filled in, and what they must not say (no torch here)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from lora.tenant_rules import refused
from trainer.bank_rules import expanded
from trainer.recipe_view import Finding, Unknown, View
from trainer.routing_rules import LOSSES
from trainer.schema import DataSection, Recipe, TenantData, TenantSection

# Keys that a tenant takes from ``train`` unless it has its own.
INHERITED = (
    "steps",
    "lr",
    "min_lr_ratio",
    "warmup_steps",
    "schedule",
    "weight_decay",
    "max_grad_norm",
    "seed",
    "micro_batch_size",
)


def resolved(recipe: Recipe, folder: Path) -> dict[str, TenantSection]:
    """The tenants of ``recipe``, whose other sections are resolved, with every key filled in.

    Args:
        folder: what relative globs of files start from.
    """
    found = {}
    for name, tenant in recipe.tenants.items():
        taken = {key: getattr(recipe.train, key) for key in INHERITED if getattr(tenant, key) is None}
        found[name] = replace(tenant, data=_data(recipe.data, tenant.data, folder), **taken)
    return found


def _data(common: DataSection, own: TenantData, folder: Path) -> TenantData:
    source = own.source or common.source
    include = own.include
    if include is None:
        include = common.include
    elif source == "files":
        include = tuple(str(folder / pattern) for pattern in include)
    kind = own.format or common.format
    text_key = own.text_key or common.text_key or "text" if kind == "jsonl" else None
    fraction = own.heldout_fraction or common.heldout_fraction
    return TenantData(source=source, include=include, format=kind, text_key=text_key, heldout_fraction=fraction)


def data_of(recipe: Recipe, name: str) -> DataSection:
    """What one tenant of a resolved recipe reads, as a run of its own would say it."""
    own = recipe.tenants[name].data
    return replace(recipe.data, **{field.name: getattr(own, field.name) for field in fields(own)})


def alone(recipe: Recipe, name: str) -> Recipe:
    """The run of its own that a tenant of a resolved recipe should equal."""
    tenant = recipe.tenants[name]
    own = {key: getattr(tenant, key) for key in INHERITED}
    size = recipe.accumulation * recipe.parallel.workers * (tenant.micro_batch_size or 0)
    train = replace(recipe.train, **own, global_batch_size=size)
    return replace(recipe, data=data_of(recipe, name), train=train, tenants={})


def data_sections(recipe: Recipe) -> list[DataSection]:
    """What a run reads: each tenant's data, or the recipe's own where there are none."""
    return [data_of(recipe, name) for name in recipe.tenants] or [recipe.data]


def batch_sizes(recipe: Recipe) -> list[int]:
    """Sequences of each tenant in one optimizer step, over all workers; without tenants those of the run."""
    if not recipe.tenants:
        return [recipe.train.global_batch_size]
    passes = recipe.accumulation * recipe.parallel.workers
    return [passes * (tenant.micro_batch_size or 0) for tenant in recipe.tenants.values()]


def plain(tenants: dict[str, Any]) -> dict[str, Any]:
    """``dataclasses.asdict`` of the tenants as YAML has them: lists for tuples, no key without a value."""
    found = {}
    for name, tenant in tenants.items():
        data = {key: list(v) if isinstance(v, tuple) else v for key, v in tenant["data"].items() if v is not None}
        found[name] = {key: value for key, value in tenant.items() if value is not None} | {"data": data}
    return found


def tenant_findings(view: View) -> Iterator[Finding]:
    """Every broken rule of the section, if the recipe has one."""
    names = view.values.get("tenants")
    if not isinstance(names, dict) or not names:
        return
    for rule in _RULES:
        try:
            yield from rule(view)
        except Unknown:
            continue
    for name in names:
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", name):
            yield ("tenants", name), f"tenant {name!r}: use letters, digits, '_' and '-', a letter first"
            continue
        for tenant_rule in (_steps, _reads):
            try:
                yield from tenant_rule(view, f"tenants.{name}")
            except Unknown:
                continue


def _banks(view: View) -> Iterator[Finding]:
    banks = view.values.get("adapter")
    if not isinstance(banks, dict) or not banks:
        yield (
            "tenants",
            "tenants train adapters, and there is no 'adapter' section; add one, e.g. {preset: expert-lora}",
        )
        return
    for name in banks:
        if reason := refused(expanded(view, f"adapter.{name}")):
            yield f"adapter.{name}", f"adapter.{name}: {reason}"


def _base(view: View) -> Iterator[Finding]:
    if not view.given("model.path"):
        yield "tenants", "tenants share a trained base, and model.path names none; give a Hugging Face folder"
    for key, why in _SHARED.items():
        value = view(key)
        if value not in (0, None, "none", False):
            yield key, f"{key}={value} {why}; remove it, or train without tenants"


_BALANCED = "moves tokens by what all tenants' tokens do, and their common base is frozen"
_SHARED = {
    "model.attention_dropout": "draws from one stream for all tenants, so that none would train as it does alone",
    "model.router_aux_loss_coef": _BALANCED,
    **{f"balance.{name}": _BALANCED for name in LOSSES},
    "routing.capacity_factor": "lets one tenant's tokens push out another's",
    "routing.jitter": "draws from one stream for all tenants, so that none would train as it does alone",
    "train.replay_trace": "is of a run with other batches",
    "log.routing_trace": "does not say whose a token is",
    "model.trainable_experts": "trains weights of the base, which tenants share",
    "checkpoint.load_from": "would begin with another run's adapters",
}


def _last_step(view: View) -> Iterator[Finding]:
    most = view("train.steps")
    steps = [view(f"tenants.{name}.steps") or most for name in view.values["tenants"] if "." not in name]
    if steps and max(steps) < most:
        yield "train.steps", f"train.steps={most}, and every tenant has finished after {max(steps)}; write {max(steps)}"


def _modes(view: View) -> Iterator[Finding]:
    if view("parallel.ep") != 1:
        yield (
            "parallel.ep",
            f"parallel.ep={view('parallel.ep')}: tokens do not yet carry their tenant to other workers; with tenants "
            "write ep: 1, and workers share the batch",
        )
    if view("checkpoint.mode") == "pec":
        yield "checkpoint.mode", "mode pec captures some experts at a time, of all tenants at once; write wal or dense"
    if view("routing.method") not in ("model", "top_k"):
        yield (
            "routing.method",
            f"routing.method={view('routing.method')} lets one tenant's tokens push out another's; write model",
        )


def _steps(view: View, tenant: str) -> Iterator[Finding]:
    most = view("train.steps")
    steps = view(f"{tenant}.steps") or most
    warmup = view("train.warmup_steps") if view(f"{tenant}.warmup_steps") is None else view(f"{tenant}.warmup_steps")
    if steps > most:
        yield f"{tenant}.steps", f"{tenant}.steps={steps} is more than train.steps={most}; raise the latter"
    if warmup >= steps:
        key = f"{tenant}.warmup_steps" if view.given(f"{tenant}.warmup_steps") else tenant
        yield key, f"{tenant}: warmup_steps={warmup} leaves nothing of its {steps} steps; choose fewer"


def _reads(view: View, tenant: str) -> Iterator[Finding]:
    source = view(f"{tenant}.data.source") or view("data.source")
    kind = view(f"{tenant}.data.format") or view("data.format")
    common = view("data.format")
    if (kind == "chat") != (common == "chat"):
        key = f"{tenant}.data.format"
        yield key, f"{key}={kind}, and data.format={common}: all tenants read chat, or none does; change one of them"
    if source == "stdlib" and kind != "text":
        yield f"{tenant}.data", f"{tenant}.data: source stdlib is Python text, not {kind}; write format: text"
    if view(f"{tenant}.data.text_key") and kind == "text":
        yield f"{tenant}.data.text_key", f"{tenant}.data.text_key belongs to format: jsonl; remove it"
    if source != view("data.source") and not view.given(f"{tenant}.data.include"):
        yield f"{tenant}.data", f"{tenant}.data: source {source} needs an include of its own; add one"
    for i, pattern in enumerate(view(f"{tenant}.data.include") or ()):
        if source == "stdlib" and (pattern.startswith("/") or ".." in pattern.split("/")):
            yield (
                f"{tenant}.data.include.{i}",
                f"pattern {pattern!r} leaves the standard library; use source: files for it",
            )


_RULES: tuple[Callable[[View], Iterator[Finding]], ...] = (_banks, _base, _last_step, _modes)
