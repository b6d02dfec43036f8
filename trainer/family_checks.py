"""Rules for the shape of a new model: which keys its family has and needs, and which values fit together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from moe.family_table import FAMILIES, Family
from trainer.recipe_view import Finding, Unknown, View

# Why a family lacks a key that others have, where that is not plain.
_WHY = {
    ("mixtral", "norm_topk_prob"): "it always renormalises",
    ("deepseek_v2", "norm_topk_prob"): "it never renormalises",
    ("gpt_oss", "norm_topk_prob"): "its softmax is over the chosen experts",
    ("deepseek_v2", "num_key_value_heads"): "latent attention has one key per head",
    ("deepseek_v3", "num_key_value_heads"): "latent attention has one key per head",
    ("mixtral", "intermediate_size"): "the width of an expert is moe_intermediate_size",
    ("olmoe", "intermediate_size"): "the width of an expert is moe_intermediate_size",
    ("gpt_oss", "intermediate_size"): "the width of an expert is moe_intermediate_size",
    ("olmoe", "head_dim"): "it is hidden_size / num_attention_heads",
}


def family_of(view: View) -> Family:
    """The table's entry for the recipe's family. Raises Unknown if it names none."""
    name = view("model.family")
    if name not in FAMILIES or view.given("model.path"):
        raise Unknown
    return FAMILIES[name]


def _keys(view: View) -> Iterator[Finding]:
    family, name = family_of(view), view("model.family")
    for key in view("model"):
        if family.lacks(key) and not view.reported(f"model.{key}"):
            others = [other for other, theirs in FAMILIES.items() if key in theirs.fields]
            why = _WHY.get((name, key), f"only {', '.join(others)} ha{'s' if len(others) == 1 else 've'} it")
            yield f"model.{key}", f"model.{key}: {name} has no such key, {why}; remove it"
    for key in family.required:
        if not view.given(f"model.{key}") and not view.reported(f"model.{key}"):
            yield f"model.{key}", f"missing key model.{key}; with model.family the shape must be given"


def _value(view: View, family: Family, key: str) -> Any:
    """The key's value or the family's default. Raises Unknown if the family lacks it."""
    if key not in family.fields:
        raise Unknown
    value = view(f"model.{key}")
    return family.defaults.get(key) if value is None else value


def _groups(view: View) -> Iterator[Finding]:
    family = family_of(view)
    groups, chosen = (_value(view, family, key) for key in ("n_group", "topk_group"))
    experts, top_k = view("model.num_experts"), view("model.num_experts_per_tok")
    if chosen > groups:
        yield "model.topk_group", f"model.topk_group={chosen} is more than model.n_group={groups}; choose at most that"
    if not experts:
        return
    if experts % groups:
        yield (
            "model.n_group",
            f"model.n_group={groups} does not divide model.num_experts={experts}; choose a divisor",
        )
    elif experts // groups < family.group_scores:
        yield (
            "model.n_group",
            (
                f"model.n_group={groups} leaves {experts // groups} of {experts} experts in a group, which "
                f"{view('model.family')} ranks by its best {family.group_scores}; choose fewer groups"
            ),
        )
    elif chosen <= groups and top_k > chosen * (experts // groups):
        yield (
            "model.num_experts_per_tok",
            (
                f"model.num_experts_per_tok={top_k} is more than the {chosen * (experts // groups)} experts of "
                f"model.topk_group={chosen} groups; choose fewer, or more groups"
            ),
        )


def _dense_layers(view: View) -> Iterator[Finding]:
    family = family_of(view)
    dense, layers = _value(view, family, "first_k_dense_replace"), view("model.num_hidden_layers")
    if layers and dense >= layers:
        yield (
            "model.first_k_dense_replace",
            (
                f"model.first_k_dense_replace={dense} leaves none of model.num_hidden_layers={layers} layers with "
                "experts; choose fewer"
            ),
        )
    if dense and not view.given("model.intermediate_size"):
        yield (
            "model.first_k_dense_replace",
            f"model.first_k_dense_replace={dense} needs model.intermediate_size, the width of those layers; add it",
        )
    if not dense and view.given("model.intermediate_size"):
        yield (
            "model.intermediate_size",
            (
                "model.intermediate_size is the width of dense layers, of which there are none; remove it, or set "
                "model.first_k_dense_replace (the width of an expert is moe_intermediate_size)"
            ),
        )


def _latent(view: View) -> Iterator[Finding]:
    family = family_of(view)
    rotary = _value(view, family, "qk_rope_head_dim")
    if rotary % 2:
        yield (
            "model.qk_rope_head_dim",
            f"model.qk_rope_head_dim={rotary} is odd, but rotary positions pair it up; choose an even one",
        )
    heads, hidden = view("model.num_attention_heads"), view("model.hidden_size")
    if view("model.family") == "deepseek_v2" and heads and hidden and hidden % heads:
        yield (
            "model.hidden_size",
            (f"model.num_attention_heads={heads} does not divide model.hidden_size={hidden}; choose a multiple"),
        )


FAMILY_RULES: tuple[Callable[[View], Iterator[Finding]], ...] = (_keys, _groups, _dense_layers, _latent)
