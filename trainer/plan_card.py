"""The plan of a run as text for a person, before anything runs (no torch here)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from checkpointing.cost import BudgetError, size
from lora.presets import expansions
from moe.dispatch_choice import choose_dispatch
from trainer.admission import admitted
from trainer.mode_plan import basis_of, budget_of, mode_rows
from trainer.plan import Plan, PlanError, admission, auto_is_bf16, plan_run
from trainer.schema import DiskSection, Recipe


def card(
    recipe: Recipe,
    *,
    num_files: int,
    num_bytes: int,
    available: int | None = None,
    events: Sequence[Mapping[str, Any]] = (),
) -> str:
    """The plan as text for a person. Raises PlanError.

    Args:
        available: free memory of this machine in bytes, if the run is to be here.
        events: rows that an earlier attempt of the run wrote, for measured bandwidths and times.
    """
    plan, parallel, disk = plan_run(recipe), recipe.parallel, recipe.checkpoint.disk
    dtype: str = parallel.dtype
    if dtype == "auto":
        dtype = "auto, counted as bf16" if auto_is_bf16(recipe) else "auto, counted as fp32"
    memory, mode = recipe.checkpoint.memory, recipe.checkpoint.mode
    every = f"every {memory.every} steps"
    kept = f"{plan.generations} generations, {size(plan.snapshot_bytes)} per worker"
    without = f"off; {kept} to write from" if plan.generations else "off"
    rows = [
        ("run", f"{recipe.log.dir}/{recipe.log.run}"),
        ("model", recipe.model.path or f"new {recipe.model.family}"),
        ("layout", f"{parallel.workers} workers, ep {parallel.ep}, ZeRO-{parallel.zero}, {dtype}"),
        ("experts", _experts(plan)),
        *_exchange(recipe, plan),
        ("text", f"{num_files} files, {size(num_bytes)}"),
        ("step", f"{plan.tokens_per_step:,} tokens; {recipe.train.steps:,} steps"),
        *_parameters("parameters", plan.total),
        ("", f"{sum(plan.total.values()):>14,}  in all, {plan.active:,} used by a token"),
        *(("adapter" if i == 0 else "", text) for i, text in enumerate(expansions(recipe.adapter))),
        *(_parameters("trained", plan.trained) if plan.trained != plan.total else [("trained", "all of them")]),
        (
            "per worker",
            f"weights {size(plan.weight_bytes)}, gradients {size(plan.gradient_bytes)}, "
            f"optimizer {size(plan.optimizer_bytes)}",
        ),
        (
            "memory tier",
            (f"{every}, {kept}" if mode == "dense" else f"{every}, mode {mode}") if memory.enabled else without,
        ),
        ("disk tier", _disk_tier(disk)),
        *_tenants(recipe, available, events),
        *([("begins with", recipe.checkpoint.load_from)] if recipe.checkpoint.load_from else []),
        *(_modes(recipe, plan, available, events) if memory.enabled else []),
    ]
    return "\n".join(f"{name:<12} {text}" for name, text in rows)


def _experts(plan: Plan) -> str:
    if not plan.experts_per_worker:
        return f"none in the base, which is dense, {plan.num_layers} layers"
    return f"{plan.experts_per_worker} a layer on each worker, {plan.num_layers} layers"


def _exchange(recipe: Recipe, plan: Plan) -> list[tuple[str, str]]:
    """How tokens reach experts on other workers, if any are there."""
    parallel = recipe.parallel
    if parallel.ep == 1 or not plan.experts_per_worker:
        return []
    chosen = choose_dispatch(parallel.dispatch, plan.share.top_k, parallel.ep)
    return [("exchange", f"{chosen.name}: {chosen.reason}; overlap {parallel.overlap}")]


def _disk_tier(disk: DiskSection) -> str:
    where = f", in {disk.url}" if disk.url else ""
    if not disk.every:
        return f"not during the run{where}"
    always = f", multiples of {disk.permanent_every} for good" if disk.permanent_every else ""
    return f"every {disk.every} steps, the last {disk.keep_last}{always}{where}"


def _tenants(recipe: Recipe, available: int | None, events: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Raises AdmissionError, unless the run has begun. Of a GPU's memory nothing is known here."""
    on_gpu = recipe.parallel.device == "cuda"
    free = None if available is None or on_gpu else available // recipe.parallel.workers
    found = admission(recipe, free)
    if found is None:
        return []
    if not admitted(events):
        found.check()
    return list(found.rows())


def _modes(
    recipe: Recipe, plan: Plan, available: int | None, events: Iterable[Mapping[str, Any]]
) -> list[tuple[str, str]]:
    basis = basis_of(recipe, plan.share, events)
    try:
        return mode_rows(recipe, plan.share, basis, budget_of(recipe, available))
    except BudgetError as error:
        raise PlanError(str(error)) from None


def _parameters(title: str, counts: Mapping[str, int]) -> list[tuple[str, str]]:
    return [(title if i == 0 else "", f"{count:>14,}  {kind}") for i, (kind, count) in enumerate(counts.items())]
