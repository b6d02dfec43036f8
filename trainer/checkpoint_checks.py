"""Rules that tie the keys of ``checkpoint`` to each other and to the rest of a recipe."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from trainer.bank_rules import expanded
from trainer.recipe_view import Finding, View


def _sections_of_modes(view: View) -> Iterator[Finding]:
    mode = view("checkpoint.mode")
    if view.given("checkpoint.pec") and mode != "pec":
        yield (
            "checkpoint.pec",
            f"checkpoint.pec belongs to mode: pec, and checkpoint.mode is {mode}; remove it or write mode: pec",
        )
    if not view.given("checkpoint.wal") or mode == "wal":
        return
    if mode == "pec" and view("checkpoint.pec.fallback") != "wal":
        yield (
            "checkpoint.wal",
            "checkpoint.wal has no use: mode pec falls back to dense here; remove it or write pec.fallback: wal",
        )
    elif mode == "dense":
        yield (
            "checkpoint.wal",
            "checkpoint.wal belongs to mode: wal, and checkpoint.mode is dense; remove it or write mode: wal",
        )


def _every_step(view: View) -> Iterator[Finding]:
    mode, every = view("checkpoint.mode"), view("checkpoint.memory.every")
    if mode == "wal" and every != 1 and view("checkpoint.memory.enabled"):
        yield (
            "checkpoint.memory.every",
            f"checkpoint.memory.every={every}, but mode wal logs every step; remove it or write mode: dense",
        )


def _memory_of_pec(view: View) -> Iterator[Finding]:
    if view("checkpoint.mode") == "pec" and not view("checkpoint.memory.enabled"):
        yield (
            "checkpoint.memory.enabled",
            "mode pec assembles its checkpoints in memory; remove memory.enabled: false or write mode: dense",
        )


def _experts_of_pec(view: View) -> Iterator[Finding]:
    if view("checkpoint.mode") != "pec":
        return
    banks = view("adapter")
    if banks and not any(expanded(view, f"adapter.{name}").site == "experts" for name in banks):
        yield (
            "checkpoint.mode",
            "mode pec captures some experts at a time, but no bank of this run is an expert's "
            f"({', '.join(f'adapter.{name}' for name in banks)}); write mode: wal",
        )
    if not view.given("model.path") and view("model.num_experts") == 1:
        yield "checkpoint.mode", "mode pec needs several experts, and model.num_experts is 1; write mode: wal"


def _counts_of_pec(view: View) -> Iterator[Finding]:
    if view("checkpoint.mode") != "pec":
        return
    snapshot, persist = view("checkpoint.pec.k_snapshot"), view("checkpoint.pec.k_persist")
    if snapshot != "auto" and persist > snapshot:
        yield (
            "checkpoint.pec.k_persist",
            f"checkpoint.pec.k_persist={persist} is more than checkpoint.pec.k_snapshot={snapshot}: the disk gets "
            "some of what memory holds; choose at most that",
        )
    if view.given("model.path"):
        return  # how many experts there are is in the folder, see trainer.plan
    experts = view("model.num_experts")
    for name, count in (("k_snapshot", snapshot), ("k_persist", persist)):
        if count != "auto" and count > experts:
            yield (
                f"checkpoint.pec.{name}",
                f"checkpoint.pec.{name}={count} is more than model.num_experts={experts}; choose at most that",
            )


CHECKPOINT_RULES: tuple[Callable[[View], Iterator[Finding]], ...] = (
    _sections_of_modes,
    _every_step,
    _memory_of_pec,
    _experts_of_pec,
    _counts_of_pec,
)
