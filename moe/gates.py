"""The gate seam for training: what observes a block's router, and a router of ours that can take its place.

Shapes: T tokens, H hidden, K experts per token, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe.balance import BalanceLosses, choice_counts
from moe.bias import BiasBalance
from moe.capacity import DropBy, capacity, expert_choice, random_second, within_capacity
from moe.context import current
from moe.families import MoEBlock
from moe.routing import RouterSpec, RoutingError, probabilities, route, scores, spec_of
from moe.stats import RoutingMeter

OWN_BIAS = "e_score_correction_bias"


@dataclass(frozen=True)
class RoutingPolicy:
    """How a run routes. All but ``spec`` and ``choice`` acts in training only: evaluation and export drop nothing.

    Attributes:
        choice: ``token``: each token its best experts; ``expert``: each expert its best tokens.
        jitter: the router's input is multiplied by numbers drawn from 1 - jitter to 1 + jitter (Switch, section 2.4).
        capacity_factor: see :func:`moe.capacity.capacity`; None: nothing is dropped. With choice ``expert`` it says
            how many tokens an expert takes, and is 1 if None.
        drop_by: what is dropped beyond the capacity.
        random_second: see :func:`moe.capacity.random_second`.
    """

    spec: RouterSpec
    choice: Literal["token", "expert"] = "token"
    jitter: float = 0.0
    capacity_factor: float | None = None
    drop_by: DropBy = "position"
    random_second: bool = False

    def __post_init__(self) -> None:
        if self.random_second and self.spec.top_k != 2:
            raise RoutingError(f"a random second choice needs top_k 2, not {self.spec.top_k}")
        if self.choice == "expert" and (self.spec.score == "topk_softmax" or self.spec.n_group > 1):
            raise RoutingError("expert choice needs scores of single experts: score softmax or sigmoid, without groups")


class Gate(nn.Module):
    """Takes over the parameters and buffers of ``source``, the very objects, so that names and exports stay.

    ``bias_E``, if set, stands for the family's own selection bias.
    """

    def __init__(self, source: nn.Module, policy: RoutingPolicy, layer: int) -> None:
        super().__init__()
        for name, parameter in source.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        for name, buffer in source.named_buffers(recurse=False):
            self.register_buffer(name, buffer)
        self.policy, self.layer = policy, layer
        self.bias_E: Tensor | None = None
        self.observer: Observer | None = None

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [T,E], weights [T,K] and experts [T,K]; with expert choice K is E."""
        x_TH, jitter = hidden_states.reshape(-1, hidden_states.shape[-1]), self.policy.jitter
        if self.training and jitter:
            x_TH = jittered(x_TH, jitter)
        logits_TE = self._logits(x_TH)
        if self.policy.choice == "expert":
            weights_TK, index_TK, kept_TK = self._chosen_by_experts(logits_TE)
        else:
            weights_TK, index_TK, kept_TK = self._chosen_by_tokens(logits_TE)
        if kept_TK is not None:
            weights_TK = weights_TK * kept_TK
        if self.observer is not None:
            weights_TK = self.observer(logits_TE, weights_TK, index_TK, kept_TK)
        return logits_TE, weights_TK, index_TK

    def _logits(self, x_TH: Tensor) -> Tensor:
        weight: Any = self.weight
        bias: Any = getattr(self, "bias", None)
        if self.policy.spec.fp32_linear:
            wide = torch.promote_types(weight.dtype, torch.float32)
            weight, bias = weight.to(wide), None if bias is None else bias.to(wide)
        return F.linear(x_TH.to(weight.dtype), weight, bias)

    def _chosen_by_tokens(self, logits_TE: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        policy, context = self.policy, current()
        bias_E = self.bias_E if self.bias_E is not None else getattr(self, OWN_BIAS, None)
        replay_TK = replayed(self.layer, logits_TE.shape[0], policy.spec.top_k)
        weights_TK, index_TK = route(logits_TE, policy.spec, bias_E, replay_TK)
        kept_TK = random_second(weights_TK) if self.training and policy.random_second else None
        if self.training and policy.capacity_factor is not None:
            wanted_TK = kept_TK
            if context.mask_T is not None:
                real_TK = context.mask_T[:, None].expand_as(index_TK)
                wanted_TK = real_TK if kept_TK is None else kept_TK & real_TK
            limit = capacity(index_TK.shape[0], policy.spec.num_experts, policy.spec.top_k, policy.capacity_factor)
            kept_TK = within_capacity(
                index_TK, weights_TK, policy.spec.num_experts, limit, policy.drop_by, wanted_TK
            )  # fmt: skip
        return weights_TK, index_TK, kept_TK

    def _chosen_by_experts(self, logits_TE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Every expert is listed for every token, with weight zero where it did not choose it: shapes stay fixed."""
        spec, context = self.policy.spec, current()
        scores_TE = scores(logits_TE, spec)
        limit = capacity(logits_TE.shape[0], spec.num_experts, spec.top_k, self.policy.capacity_factor or 1.0)
        taken_TE = expert_choice(scores_TE, limit, context.mask_T)
        index_TE = torch.arange(spec.num_experts, device=logits_TE.device).expand_as(logits_TE)
        weights_TE = scores_TE * spec.scale
        return (weights_TE.to(logits_TE.dtype) if spec.weights_like_logits else weights_TE), index_TE, taken_TE

    def extra_repr(self) -> str:
        return f"layer={self.layer}, {self.policy}"


def jittered(x: Tensor, jitter: float) -> Tensor:
    """``x`` times draws from ``[1 - jitter, 1 + jitter]``, in fp32 or wider: near 1, bf16 has steps of 1/128."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.to(wide) * torch.empty_like(x, dtype=wide).uniform_(1 - jitter, 1 + jitter)


def replayed(layer: int, tokens: int, top_k: int) -> Tensor | None:
    """The choices [T,K] that the context wants taken; asked for once per training pass, a recompute takes the same.

    Raises RoutingError if they are not of this batch's shape.
    """
    context = current()
    if context.replay is None:
        return None
    key = ("replay", layer)
    index_TK: Tensor | None = context.kept[key] if key in context.kept else context.replay(layer)
    if context.balance:
        context.kept[key] = index_TK
    if index_TK is not None and index_TK.shape != (tokens, top_k):
        raise RoutingError(
            f"layer {layer}: choices of shape {list(index_TK.shape)} are to be replayed for {tokens} tokens with "
            f"{top_k} choices each; replay them with the model and the batches they were recorded of"
        )
    return index_TK


def replace_gate(block: MoEBlock, policy: RoutingPolicy) -> MoEBlock:
    """Put a :class:`Gate` with this policy where the block's router is."""
    gate = Gate(block.gate, policy, block.layer)
    gate.train(block.gate.training)
    name = next(name for name, child in block.module.named_children() if child is block.gate)
    setattr(block.module, name, gate)
    return replace(block, gate=gate)


class Observer:
    """What a block's decisions go through in training: counted, balanced, recorded.

    Args:
        spec: of the router that is observed.
        by_experts: whether experts choose, so that every expert is listed for every token.
    """

    def __init__(
        self,
        layer: int,
        spec: RouterSpec,
        meter: RoutingMeter,
        losses: BalanceLosses,
        bias: BiasBalance | None = None,
        by_experts: bool = False,
    ) -> None:
        self.layer, self.spec, self.by_experts = layer, spec, by_experts
        self.meter, self.losses, self.bias = meter, losses, bias

    def __call__(
        self, logits_TE: Tensor, weights_TK: Tensor, index_TK: Tensor, kept_TK: Tensor | None,
        probs_TE: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Acts on counts and losses only inside a :func:`~moe.context.batch_context` with ``balance`` set.

        Args:
            probs_TE: the router's probabilities, if they are known.
        """
        context = current()
        first = context.first(self.layer) if context.balance else True
        if first and context.record is not None:
            context.record(self.layer, index_TK.detach(), weights_TK.detach())
        if not context.balance:
            return weights_TK
        counts_E = self._count(index_TK.detach(), kept_TK, context.mask_T) if first else None
        if not self.losses.spec.has_losses:
            return weights_TK
        if probs_TE is None:
            probs_TE = probabilities(logits_TE, self.spec)
        return self.losses.inject(weights_TK, self.layer, logits_TE, probs_TE, index_TK, first, counts_E)

    def _count(self, index_TK: Tensor, kept_TK: Tensor | None, mask_T: Tensor | None) -> Tensor | None:
        """How often real tokens chose each expert [E], if that was to be known."""
        experts, counts_E = self.spec.num_experts, None
        if kept_TK is None or self.bias is not None:
            counts_E = choice_counts(index_TK, experts, mask_T)
        if self.bias is not None:
            self.bias.add(self.layer, counts_E)
        if kept_TK is None:
            self.meter.add_counts(self.layer, counts_E)
        else:
            # In the meter's terms E is a choice that was dropped, and E + 1 one that nobody made.
            index_TK = index_TK.masked_fill(~kept_TK, experts + 1 if self.by_experts else experts)
            self.meter.add(self.layer, index_TK, experts, mask_T)
        return counts_E


def observe_gates(
    blocks: Sequence[MoEBlock],
    config: Any,
    meter: RoutingMeter,
    losses: BalanceLosses,
    bias: BiasBalance | None = None,
) -> None:
    """Have every block's router, transformers' or ours, report to ``meter``, inject ``losses`` and honour the context.

    Args:
        config: the model's transformers configuration.
        bias: moved by what the routers choose; all of them must be :class:`Gate`.
    """
    for block in blocks:
        if isinstance(block.gate, Gate):
            policy = block.gate.policy
            by_experts = policy.choice == "expert"
            if by_experts and (losses.spec.has_losses or bias is not None):
                raise RoutingError("where experts choose, all get equally many tokens: remove balance losses and bias")
            block.gate.observer = Observer(block.layer, policy.spec, meter, losses, bias, by_experts)
            block.gate.bias_E = bias.row(block.layer) if bias is not None else None
        else:
            assert bias is None, "only our own gates choose with a bias of ours"
            spec = spec_of(block.gate, config)
            block.gate.register_forward_hook(_hook(Observer(block.layer, spec, meter, losses)))


def _hook(observer: Observer) -> Any:
    def hook(gate: nn.Module, _args: tuple[Any, ...], output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        logits_TE, weights_TK, index_TK = output
        replay_TK, spec, scores_TE = replayed(observer.layer, *index_TK.shape), observer.spec, None
        if replay_TK is not None:
            weights_TK, index_TK = route(logits_TE, spec, None, replay_TK)
        elif weights_TK.is_cuda and weights_TK.requires_grad:  # the same weights, with a shorter way back
            scores_TE = scores(logits_TE, spec) if spec.score == "softmax" else None
            weights_TK, index_TK = route(logits_TE, spec, None, index_TK, scores_TE)
        return logits_TE, observer(logits_TE, weights_TK, index_TK, None, scores_TE), index_TK

    return hook
