"""From a recipe to gates that route and balance as it says, and to a folder in which transformers does the same."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from moe.balance import BalanceLosses, BalanceSpec
from moe.bias import BiasBalance, biases
from moe.families import MoEBlock, find_moe_blocks
from moe.gates import OWN_BIAS, RoutingPolicy, observe_gates, replace_gate
from moe.routing import RouterSpec, RoutingError, config_fields, spec_of
from moe.stats import RoutingMeter
from trainer.rendezvous import Process
from trainer.schema import BalanceSection, Recipe, RoutingSection


def policy_of(section: RoutingSection, own: RouterSpec) -> RoutingPolicy:
    """The recipe's routing for a model whose router has the numbers ``own``. Raises RoutingError if it cannot be."""
    changes: dict[str, Any] = {
        "score": section.score,
        "top_k": section.top_k,
        "norm_topk": section.norm_topk_prob,
        "scale": section.routed_scaling_factor,
        "n_group": section.n_group,
        "topk_group": section.topk_group,
        "group_score": section.group_score,
    }
    if section.method == "switch":
        changes |= {"score": "softmax", "top_k": 1, "norm_topk": False}
    elif section.method == "gshard":
        changes |= {"score": "softmax", "top_k": 2, "norm_topk": True}
    elif section.method == "expert_choice":
        changes |= {"score": section.score or "softmax", "norm_topk": False, "n_group": 1, "topk_group": 1}
    changes = {name: value for name, value in changes.items() if value is not None}
    if changes.get("score", own.score) != own.score:
        # DeepSeek-V3's guard against scores that are all zero; a softmax has no such scores.
        changes["norm_eps"] = 1e-20 if changes["score"] == "sigmoid" else 0.0
    factor = section.capacity_factor
    if factor is not None or section.method == "gshard":
        changes["ordered"] = True  # what is dropped depends on which choice is the first
    return RoutingPolicy(
        replace(own, **changes),
        choice="expert" if section.method == "expert_choice" else "token",
        jitter=section.jitter,
        capacity_factor=1.0 if factor is None and section.method == "gshard" else factor,
        drop_by=section.drop_by or "position",
        random_second=section.method == "gshard",
    )


def balance_of(recipe: Recipe, spec: RouterSpec) -> BalanceSpec:
    """The recipe's losses. The devices of DeepSeek-V2's losses are the router's groups, or the expert-parallel ranks.

    Raises RoutingError if there is only one.
    """
    section = recipe.balance
    devices, limit = spec.n_group, spec.topk_group
    if devices == 1:
        devices = limit = recipe.parallel.ep
    if devices == 1 and (section.device_loss_coef or section.communication_loss_coef):
        raise RoutingError(
            "balance.device_loss_coef and balance.communication_loss_coef balance devices, and there is only one: give "
            "routing.n_group or parallel.ep, or remove them"
        )
    short = section.aux_loss == "none"
    return BalanceSpec(
        aux="micro_batch" if section.aux_loss == "none" else section.aux_loss,
        aux_coef=recipe.model.router_aux_loss_coef if short else section.aux_loss_coef,
        expert_coef=section.expert_loss_coef,
        device_coef=section.device_loss_coef,
        communication_coef=section.communication_loss_coef,
        z_coef=section.z_loss_coef,
        devices=devices,
        device_limit=limit,
    )


def prepare_gates(
    recipe: Recipe, process: Process, model: nn.Module, blocks: Sequence[MoEBlock], meter: RoutingMeter
) -> BiasBalance | None:
    """Put the recipe's routing and balance where the model's gates are. Returns the biases, if it balances by them.

    A model's own gate stays in place unless it is to route differently or with a bias of ours.
    """
    if not blocks:
        if recipe.routing != RoutingSection() or recipe.balance != BalanceSection():
            raise RoutingError("no layer of this model has a router: remove the sections routing and balance")
        return None
    config: Any = model.config
    own = {block.layer: spec_of(block.gate, config) for block in blocks}
    rate = recipe.balance.bias_update_rate
    total = _total if process.world > 1 else None
    bias = None
    if rate:
        begin = {block.layer: _own_bias(block.gate, own[block.layer]) for block in blocks}
        bias = BiasBalance(begin, rate, process.device, total)
    policies = {layer: policy_of(recipe.routing, spec) for layer, spec in own.items()}
    if rate or recipe.routing.method != "model":
        blocks = [replace_gate(block, policies[block.layer]) for block in blocks]
    losses = BalanceLosses(balance_of(recipe, policies[blocks[0].layer].spec), total, process.world)
    observe_gates(blocks, config, meter, losses, bias)
    if process.rank == 0:
        for problem in inexpressible(recipe, config):
            print(f"this run cannot be exported exactly: {problem}", flush=True)
    return bias


def _own_bias(gate: nn.Module, spec: RouterSpec) -> Tensor:
    bias_E = getattr(gate, OWN_BIAS, None)
    return bias_E if bias_E is not None else torch.zeros(spec.num_experts)


def _total(tensor: Tensor) -> None:
    dist.all_reduce(tensor)


# -- what transformers can do ----------------------------------------------------------------------------------------


def inexpressible(recipe: Recipe, config: Any) -> list[str]:
    """What of the recipe's routing a transformers model of this configuration's family cannot do, a sentence each."""
    if recipe.routing.method == "model" and not recipe.balance.bias_update_rate:
        return []
    family = config.model_type
    block, _ = _built(config)
    policy = policy_of(recipe.routing, spec_of(block.gate, config))
    theirs, gate = _rebuilt(config, policy.spec)
    problems = []
    if policy.choice == "expert":
        problems.append(f"{family} in transformers has no expert choice")
    elif differing := policy.spec.differences(theirs):
        fixed, ours = _in_keys(theirs, differing), _in_keys(policy.spec, differing)
        problems.append(f"{family} in transformers routes with {fixed} where this run has {ours}")
    if recipe.balance.bias_update_rate and not hasattr(gate, OWN_BIAS):
        problems.append(f"{family} in transformers has no selection bias, and this run has trained one")
    return problems


def set_routing(recipe: Recipe, model: nn.Module, blob: bytes | None) -> None:
    """Have a transformers model route as the recipe says, as far as its family can: its configuration, and its biases.

    Args:
        blob: the trained biases (:meth:`~moe.bias.BiasBalance.dump`), if there are any. Rows beyond the model's own
            layers belong to modules that only training has.
    """
    config: Any = model.config
    blocks = find_moe_blocks(model)
    spec = spec_of(blocks[0].gate, config)
    if recipe.routing.method != "model":
        for name, value in config_fields(config.model_type, policy_of(recipe.routing, spec).spec).items():
            setattr(config, name, value)
    if blob is not None and hasattr(blocks[0].gate, OWN_BIAS):
        rows_ME = biases(blob, spec.num_experts)
        for block, row_E in zip(blocks, rows_ME[: len(blocks)], strict=True):
            setattr(block.gate, OWN_BIAS, row_E.clone())


def _in_keys(spec: RouterSpec, names: Sequence[str]) -> str:
    """A router's numbers as a recipe writes them; those that no key of a recipe stands for follow from ``score``."""
    keys = {"norm_topk": "norm_topk_prob", "scale": "routed_scaling_factor"}
    words = {keys.get(name, name): getattr(spec, name) for name in names if name != "norm_eps"}
    return ", ".join(f"routing.{key}={str(v).lower() if isinstance(v, bool) else v}" for key, v in words.items())


def _built(config: Any) -> tuple[MoEBlock, nn.Module]:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return find_moe_blocks(model)[0], model


def _rebuilt(config: Any, spec: RouterSpec) -> tuple[RouterSpec, nn.Module]:
    """The router that transformers makes of the configuration once ``spec`` is written to it, its numbers first."""
    config = copy.deepcopy(config)
    for name, value in config_fields(config.model_type, spec).items():
        setattr(config, name, value)
    block, _ = _built(config)
    return spec_of(block.gate, config), block.gate
