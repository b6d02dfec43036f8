"""Rules about optional parts of the model: multi-token prediction, soft blocks, frozen or chosen experts, and how the
experts run under an adapter."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from trainer.bank_rules import expanded
from trainer.recipe_view import Finding, View
from trainer.schema import KEYS, schema_path


def _mtp(view: View) -> Iterator[Finding]:
    depth = view("train.mtp.depth")
    if not depth:
        if view("train.mtp.weight") != KEYS["train", "mtp", "weight"].default:
            yield "train.mtp.weight", "train.mtp.weight without train.mtp.depth does nothing; give a depth or remove it"
        return
    if view.values.get("adapter"):
        yield "train.mtp", "train.mtp trains new modules, but with 'adapter' all but adapters is frozen; remove one"
    length = view("data.sequence_length")
    if depth > length - 2:
        yield (
            "train.mtp.depth",
            f"train.mtp.depth={depth} looks {depth + 1} tokens ahead in data.sequence_length={length}; choose less",
        )


def _soft(view: View) -> Iterator[Finding]:
    kind = view("model.soft.kind")
    for name, owner in (("slots", "soft_moe"), ("segment", "merging"), ("force", "soft_moe or merging")):
        key = f"model.soft.{name}"
        if kind not in owner.split(" or ") and view(key) != KEYS[schema_path(tuple(key.split(".")))].default:
            yield key, f"{key} belongs to model.soft.kind {owner}; remove it or change the kind"
    if kind == "none":
        return
    if (kind == "soft_moe" or not view("model.soft.segment")) and not view("model.soft.force"):
        mixed = "slots average over all tokens" if kind == "soft_moe" else "experts are merged by all tokens"
        other = "" if kind == "soft_moe" else ", give model.soft.segment"
        yield (
            "model.soft.kind",
            f"model.soft.kind={kind} lets a token see those after it ({mixed} of a sequence), so a causal language "
            f"model learns to copy and its loss means nothing; use top-k routing{other} or set model.soft.force: true",
        )
    if view("parallel.ep") > 1:
        yield "parallel.ep", f"parallel.ep={view('parallel.ep')}: soft blocks keep all experts together; set it to 1"
    if view("model.router_aux_loss_coef"):
        yield "model.router_aux_loss_coef", "a soft block chooses no experts, so there is nothing to balance; remove it"
    if view("model.experts_backend") != "auto":
        yield "model.experts_backend", "a soft block has its own computation; remove it"
    for section in ("routing", "balance"):
        if view.values.get(section):
            yield section, f"a soft block chooses no experts, so {section} has nothing to act on; remove it"
    for key in ("train.replay_trace", "log.routing_trace"):
        if view(key):
            yield key, f"{key}: a soft block chooses no experts, so there is no routing to record or follow; remove it"
    if view("checkpoint.mode") == "pec":
        yield "checkpoint.mode", "mode pec counts routed tokens, and a soft block routes none; use wal or dense"
    if view.values.get("adapter"):
        yield "adapter", "adapters hang on routed experts; remove 'adapter' or model.soft"
    if view("train.mtp.depth"):
        yield "train.mtp", "prediction modules have routed experts of their own; remove train.mtp or model.soft"


def _frozen_experts(view: View) -> Iterator[Finding]:
    if not view("model.frozen_experts"):
        return
    if not view.given("model.path"):
        yield "model.frozen_experts", "model.frozen_experts freezes experts that know something; give model.path"
    if view("parallel.ep") > 1:
        yield (
            "parallel.ep",
            f"parallel.ep={view('parallel.ep')} with model.frozen_experts: some workers would hold frozen experts "
            "only; set it to 1",
        )
    if view("checkpoint.mode") == "pec":
        yield "checkpoint.mode", "mode pec shares out all experts, and frozen ones have no state; use wal or dense"
    for key, given in (
        ("adapter", view.values.get("adapter")),
        ("train.mtp", view("train.mtp.depth")),
        ("model.soft", view("model.soft.kind") != "none"),
    ):
        if given:
            yield key, f"{key} and model.frozen_experts each say what trains; remove one"


def _trainable_experts(view: View) -> Iterator[Finding]:
    if not view("model.trainable_experts"):
        return
    if not view.given("model.path"):
        yield "model.trainable_experts", "model.trainable_experts are of a trained model; give model.path"
    if view("checkpoint.mode") == "pec":
        yield "checkpoint.mode", "mode pec shares out all experts, and frozen ones have no state; use wal or dense"
    for key, given in (
        ("adapter", view.values.get("adapter")),
        ("train.mtp", view("train.mtp.depth")),
        ("model.soft", view("model.soft.kind") != "none"),
        ("model.frozen_experts", view("model.frozen_experts")),
    ):
        if given:
            yield key, f"{key} and model.trainable_experts each say what trains; remove one"


def _adapted_backend(view: View) -> Iterator[Finding]:
    banks, backend = view.values.get("adapter"), view("model.experts_backend")
    # Only grouped_mm computes experts in pieces, as the adapters of several tenants need.
    whose, able = (
        ("the adapters of tenants", ("auto", "grouped_mm"))
        if view.values.get("tenants")
        else ("an adapter", ("auto", "minimal", "grouped_mm"))
    )
    if not isinstance(banks, dict) or backend in able:
        return
    if any(expanded(view, f"adapter.{name}").site == "experts" for name in banks):
        choices = f"{', '.join(able[:-1])} or {able[-1]}"
        yield (
            "model.experts_backend",
            f"model.experts_backend={backend} has no room for {whose} on the experts; choose {choices}",
        )


VARIANT_RULES: tuple[Callable[[View], Iterator[Finding]], ...] = (
    _mtp,
    _soft,
    _frozen_experts,
    _trainable_experts,
    _adapted_backend,
)
