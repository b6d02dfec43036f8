"""Rules that tie the keys of the sections ``routing`` and ``balance`` together."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from moe.family_table import FAMILIES
from trainer.recipe_view import Finding, View
from trainer.schema import children

LOSSES = ("aux_loss_coef", "expert_loss_coef", "device_loss_coef", "communication_loss_coef", "z_loss_coef")
# What a method decides itself.
_DECIDED = {
    "switch": ("score", "top_k", "norm_topk_prob"),
    "gshard": ("score", "top_k", "norm_topk_prob"),
    "expert_choice": ("norm_topk_prob", "n_group", "topk_group", "group_score", "drop_by"),
}


def _method_keys(view: View) -> Iterator[Finding]:
    method = view("routing.method")
    for name in children(("routing",)):
        if name == "method" or not view.given(f"routing.{name}"):
            continue
        if method == "model":
            yield (
                f"routing.{name}",
                f"routing.{name} needs a routing.method: top_k starts from the model's own routing; or remove the key",
            )
        elif name in _DECIDED.get(method, ()):
            yield f"routing.{name}", f"routing.{name} is decided by routing.method={method}; remove the key"


def _expert_choice(view: View) -> Iterator[Finding]:
    method, force = view("routing.method"), view("routing.force")
    if method == "expert_choice" and not force:
        yield (
            "routing.method",
            "routing.method=expert_choice lets an expert compare a token with later ones, so a causal language model "
            "sees its own future and cannot generate; choose top_k, or add routing.force=true to do it all the same",
        )
    elif force and method not in ("model", "expert_choice"):
        yield "routing.force", "routing.force is for routing.method=expert_choice; remove it"


def _traces(view: View) -> Iterator[Finding]:
    """A trace holds each token's choices, of which there are none."""
    for key in ("train.replay_trace", "log.routing_trace"):
        if view(key) and view("routing.method") == "expert_choice":
            yield key, f"{key} is of tokens that choose experts, with expert_choice none does; remove it"


def _groups(view: View) -> Iterator[Finding]:
    if view.given("routing.topk_group") and not view.given("routing.n_group"):
        yield "routing.topk_group", "routing.topk_group chooses among groups; give routing.n_group, too"
    n_group, topk_group = view("routing.n_group"), view("routing.topk_group")
    family = FAMILIES.get(view("model.family") or "")
    if view.given("routing.group_score") and not n_group and family is not None and family.lacks("n_group"):
        yield "routing.group_score", "routing.group_score compares groups, and there are none; give routing.n_group"
    if n_group and n_group > 1 and not topk_group:
        yield "routing.n_group", f"routing.n_group={n_group} limits nothing; give routing.topk_group, too"
    elif n_group and topk_group and topk_group > n_group:
        yield (
            "routing.topk_group",
            f"routing.topk_group={topk_group} is more than routing.n_group={n_group}; choose at most that",
        )


def _group_sizes(view: View) -> Iterator[Finding]:
    n_group, experts = view("routing.n_group"), view("model.num_experts")
    if n_group and experts and experts % n_group:
        yield (
            "routing.n_group",
            f"routing.n_group={n_group} does not divide model.num_experts={experts}; choose a divisor",
        )


def _top_k_of_groups(view: View) -> Iterator[Finding]:
    n_group, topk_group, experts = view("routing.n_group"), view("routing.topk_group"), view("model.num_experts")
    if not (n_group and topk_group and experts) or experts % n_group or view("routing.method") == "switch":
        return
    top_k = 2 if view("routing.method") == "gshard" else view("routing.top_k") or view("model.num_experts_per_tok")
    there = min(topk_group, n_group) * (experts // n_group)
    if top_k > there:
        yield (
            "routing.topk_group",
            f"routing.topk_group={topk_group} of {n_group} groups have {there} experts, and a token chooses {top_k}; "
            "raise it",
        )


def _top_k(view: View) -> Iterator[Finding]:
    top_k, experts = view("routing.top_k"), view("model.num_experts")
    if top_k and experts and top_k > experts:
        yield "routing.top_k", f"routing.top_k={top_k} is more than model.num_experts={experts}; choose at most that"


def _dropping(view: View) -> Iterator[Finding]:
    drops = view("routing.capacity_factor") is not None or view("routing.method") == "gshard"
    if view("routing.drop_by") is not None and not drops:
        yield "routing.drop_by", "routing.drop_by drops nothing without routing.capacity_factor; give that, too"


def _aux_loss(view: View) -> Iterator[Finding]:
    scope, coef, short = view("balance.aux_loss"), view("balance.aux_loss_coef"), view("model.router_aux_loss_coef")
    if scope != "none" and short:
        yield (
            "model.router_aux_loss_coef",
            "model.router_aux_loss_coef is short for balance.aux_loss=micro_batch with that balance.aux_loss_coef; "
            "keep one of them",
        )
    if scope != "none" and not coef:
        yield "balance.aux_loss", f"balance.aux_loss={scope} has no weight; give balance.aux_loss_coef, too"
    if scope == "none" and coef:
        yield "balance.aux_loss_coef", "balance.aux_loss_coef weighs nothing; give balance.aux_loss, too"


def _chosen_by_experts(view: View) -> Iterator[Finding]:
    if view("routing.method") != "expert_choice":
        return
    for name in (*LOSSES, "bias_update_rate"):
        if view(f"balance.{name}"):
            yield f"balance.{name}", f"balance.{name}: experts that choose have equally many tokens; remove it"
    if view("model.router_aux_loss_coef"):
        yield (
            "model.router_aux_loss_coef",
            "model.router_aux_loss_coef: experts that choose have equally many tokens; remove it",
        )


def _kept_router(view: View) -> Iterator[Finding]:
    """Adapters and the training of chosen experts leave the base's routers as they are."""
    if view.given("adapter") and view("adapter"):
        what = "changes the base model, which an adapter leaves as it is"
    elif view.given("model.trainable_experts") and view("model.trainable_experts"):
        what = "changes the routers, which model.trainable_experts leaves as they are"
    else:
        return
    if view("routing.method") != "model":
        yield "routing.method", f"routing.method {what}; remove one"
    if view("balance.bias_update_rate"):
        yield "balance.bias_update_rate", f"balance.bias_update_rate {what}; remove one"


ROUTING_RULES: tuple[Callable[[View], Iterator[Finding]], ...] = (
    _method_keys,
    _expert_choice,
    _traces,
    _groups,
    _group_sizes,
    _top_k_of_groups,
    _top_k,
    _dropping,
    _aux_loss,
    _chosen_by_experts,
    _kept_router,
)
