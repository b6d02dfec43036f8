"""Which recipes can train a dense base: only adapters do, and nothing that needs routed experts (no torch here)."""

from __future__ import annotations

from lora.presets import expand
from moe.family_table import DENSE
from trainer.schema import BalanceSection, Recipe, RoutingSection


def is_dense(kind: str | None) -> bool:
    """Whether a folder's ``model_type`` is one of the dense families that adapters train on."""
    return kind in DENSE


def dense_problem(recipe: Recipe, kind: str) -> str | None:
    """Why this recipe cannot train the dense base of its ``model.path``, and what to do; None if it can."""
    model, what = recipe.model, f"{recipe.model.path} is a dense {kind} model"
    if not recipe.adapter:
        return (
            f"model.path: {what}, and planaria trains mixtures of experts: add an adapter section to train adapters "
            "on it (e.g. 'adapter: {ffn: {preset: mixlora}}'), or make a mixture of it first (planaria upcycle)"
        )
    for name, bank in recipe.adapter.items():
        full = expand(bank)
        if full.site in ("experts", "parallel") or full.router == "base":
            return (
                f"adapter.{name}: preset {bank.preset} belongs to routed experts, and {what}; use preset mixlora, or "
                "one for linear layers"
            )
    needs_experts = {
        "parallel.ep": recipe.parallel.ep > 1,
        "routing": recipe.routing != RoutingSection(),
        "balance": recipe.balance != BalanceSection(),
        "model.soft": model.soft.kind != "none",
        "model.frozen_experts": bool(model.frozen_experts),
        "model.trainable_experts": model.trainable_experts is not None,
        "model.router_aux_loss_coef": bool(model.router_aux_loss_coef),
        "model.experts_backend": model.experts_backend != "auto",
        "train.mtp": bool(recipe.train.mtp.depth),
        "train.replay_trace": bool(recipe.train.replay_trace),
        "log.routing_trace": bool(recipe.log.routing_trace),
        "checkpoint.mode": recipe.checkpoint.mode == "pec",
    }
    instead = {"parallel.ep": "set it to 1", "checkpoint.mode": "use wal or dense"}
    found = [key for key, given in needs_experts.items() if given]
    return f"{found[0]}: {what}, without routed experts; {instead.get(found[0], 'remove it')}" if found else None
