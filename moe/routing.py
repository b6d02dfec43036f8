"""Which experts a token goes to, and with what weights: the routers of seven families as one function of their numbers.

Shapes: T tokens, E experts, K choices per token, G groups of E/G experts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from moe.families import FamilyError


class RoutingError(ValueError):
    """A router cannot work as it is asked to; the message says what does not fit."""


@dataclass(frozen=True)
class RouterSpec:
    """A router's numbers. Raises RoutingError if they contradict each other.

    Attributes:
        score: ``softmax`` or ``sigmoid`` of the logits, then top-k; ``topk_softmax``: top-k of the logits, then softmax
            over the chosen.
        norm_topk: divide the chosen scores by their sum plus ``norm_eps``.
        scale: the weights are multiplied by it at the end.
        n_group, topk_group: the experts form ``n_group`` equal groups of neighbours, of which a token may use the best
            ``topk_group``. With one group for each device this is DeepSeek-V2's device-limited routing.
        group_score: a group is as good as its best expert (``max``) or its two best together (``top2``).
        mask_fill: what the scores of experts in other groups are replaced by before the top-k.
        fp32_linear: logits are computed in fp32.
        weights_like_logits: weights are cast to the logits' type.
        ordered: choices come with the best first; otherwise in whatever order top-k finds them.
    """

    num_experts: int
    top_k: int
    score: Literal["softmax", "sigmoid", "topk_softmax"] = "softmax"
    norm_topk: bool = False
    norm_eps: float = 0.0
    scale: float = 1.0
    n_group: int = 1
    topk_group: int = 1
    group_score: Literal["max", "top2"] = "max"
    mask_fill: float = -math.inf
    fp32_linear: bool = False
    weights_like_logits: bool = False
    ordered: bool = True

    def __post_init__(self) -> None:
        experts, k, groups, best = self.num_experts, self.top_k, self.n_group, self.topk_group
        if not 1 <= k <= experts:
            raise RoutingError(f"a token cannot choose {k} of {experts} experts; choose top_k from 1 to {experts}")
        if groups < 1 or experts % groups or not 1 <= best <= groups:
            raise RoutingError(
                f"n_group={groups} must divide {experts} experts, and topk_group={best} be 1 to {groups}; change them"
            )
        if k > best * (experts // groups):
            raise RoutingError(
                f"topk_group={best} of {groups} groups have {best * (experts // groups)} experts, fewer than the "
                f"top_k={k} a token chooses; raise topk_group"
            )

    def differences(self, other: RouterSpec) -> list[str]:
        """Names of the numbers in which two specs differ. The order of choices changes no result, so it is none."""
        names = [f.name for f in fields(self) if f.name != "ordered"]
        return [name for name in names if getattr(self, name) != getattr(other, name)]


# -- the families' numbers -------------------------------------------------------------------------------------------

_PLAIN: dict[str, Any] = {"weights_like_logits": True}
_DEEPSEEK: dict[str, Any] = {"fp32_linear": True, "ordered": False}
FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "mixtral": {"norm_topk": True},
    "qwen2_moe": _PLAIN,
    "qwen3_moe": _PLAIN,
    "olmoe": _PLAIN,
    "deepseek_v2": {**_DEEPSEEK, "mask_fill": 0.0},
    "deepseek_v3": {**_DEEPSEEK, "score": "sigmoid", "norm_eps": 1e-20, "group_score": "top2"},
    "gpt_oss": {"score": "topk_softmax", "weights_like_logits": True},
}
# What else a family's configuration says, by our name for it: first looked for on the gate, then on the configuration.
_SETTINGS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "norm_topk": ("norm_topk_prob", ("qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3")),
    "scale": ("routed_scaling_factor", ("deepseek_v2", "deepseek_v3")),
    "n_group": ("n_group", ("deepseek_v2", "deepseek_v3")),
    "topk_group": ("topk_group", ("deepseek_v2", "deepseek_v3")),
}


def spec_of(gate: nn.Module, config: Any) -> RouterSpec:
    """The numbers of a transformers gate. Raises FamilyError if its family is not known or an attribute is missing."""
    family = str(getattr(config, "model_type", None))
    if family not in FAMILIES:
        raise FamilyError(
            f"the router {type(gate).__name__} is of family {family!r}, whose numbers are not known; known are "
            f"{', '.join(FAMILIES)}"
        )
    weight = getattr(gate, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        raise FamilyError(f"the router {type(gate).__name__} has no weight [E,H]; found {sorted(vars(gate))}")
    numbers = dict(FAMILIES[family])
    for ours, (theirs, families) in _SETTINGS.items():
        if family in families:
            numbers[ours] = _setting(gate, config, theirs)
    if family == "deepseek_v2" and _setting(gate, config, "topk_method") == "greedy":
        numbers |= {"n_group": 1, "topk_group": 1}
    top_k = _setting(gate, config, "top_k", "num_experts_per_tok")
    return RouterSpec(weight.shape[0], top_k, **{name: value for name, value in numbers.items() if value is not None})


def _setting(gate: nn.Module, config: Any, name: str, in_config: str | None = None) -> Any:
    if hasattr(gate, name):
        return getattr(gate, name)
    name = in_config or name
    if not hasattr(config, name):
        raise FamilyError(f"neither the router {type(gate).__name__} nor {type(config).__name__} has {name}")
    return getattr(config, name)


def config_fields(family: str, spec: RouterSpec) -> dict[str, Any]:
    """The configuration fields with which transformers' ``family`` routes as ``spec`` says, as far as it has such."""
    found: dict[str, Any] = {"num_experts_per_tok": spec.top_k}
    found |= {theirs: getattr(spec, ours) for ours, (theirs, families) in _SETTINGS.items() if family in families}
    if family == "deepseek_v2":
        found["topk_method"] = "greedy" if spec.n_group == 1 else "group_limited_greedy"
    return found


# -- routing ---------------------------------------------------------------------------------------------------------


def route(
    logits_TE: Tensor, spec: RouterSpec, bias_E: Tensor | None = None, index_TK: Tensor | None = None,
    scores_TE: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Weights [T,K] and experts [T,K] of each token.

    Args:
        bias_E: added to the scores when experts are chosen, never to the weights (DeepSeek-V3, section 2.1.2).
        index_TK: choices to take instead of the router's own (routing replay).
        scores_TE: :func:`scores` of the logits, if they are known.
    """
    if spec.score == "topk_softmax":
        chosen_by_TE = logits_TE.detach() if bias_E is None else logits_TE.detach().float() + bias_E
        scores_TE = logits_TE
    else:
        scores_TE = scores(logits_TE, spec) if scores_TE is None else scores_TE
        chosen_by_TE = scores_TE.detach() if bias_E is None else scores_TE.detach() + bias_E
    if index_TK is None:
        if spec.topk_group < spec.n_group:
            chosen_by_TE = _within_groups(chosen_by_TE, spec)
        index_TK = torch.topk(chosen_by_TE, spec.top_k, dim=-1, sorted=spec.ordered).indices
    weights_TK = picked(scores_TE, index_TK)
    if spec.score == "topk_softmax":
        weights_TK = weights_TK.softmax(-1)
    if spec.norm_topk:
        weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + spec.norm_eps)
    if spec.scale != 1.0:
        weights_TK = weights_TK * spec.scale
    return (weights_TK.to(logits_TE.dtype) if spec.weights_like_logits else weights_TK), index_TK


def picked(scores_TE: Tensor, index_TK: Tensor) -> Tensor:
    """The scores [T,K] of a token's choices, which are different experts."""
    if scores_TE.is_cuda and scores_TE.requires_grad:
        return cast(Tensor, _Picked.apply(scores_TE, index_TK))
    return scores_TE.gather(1, index_TK)


class _Picked(torch.autograd.Function):
    """torch's deterministic way back on a GPU sorts all choices, in 34 kernels. Choices that differ need only a sum, of
    which at most one term is not zero. It is made of [T,K,E] numbers, which are gone behind it.
    """

    @staticmethod
    def forward(ctx: Any, scores_TE: Tensor, index_TK: Tensor) -> Tensor:
        ctx.save_for_backward(index_TK)
        ctx.experts = scores_TE.shape[1]
        return scores_TE.gather(1, index_TK)

    @staticmethod
    def backward(ctx: Any, grad_TK: Tensor) -> tuple[Tensor, None]:
        (index_TK,) = ctx.saved_tensors
        chosen_TKE = index_TK[:, :, None] == torch.arange(ctx.experts, device=index_TK.device)
        return torch.where(chosen_TKE, grad_TK[:, :, None], 0).sum(1), None


def scores(logits_TE: Tensor, spec: RouterSpec) -> Tensor:
    """Each expert's score [T,E], in fp32 or wider."""
    wide_TE = logits_TE.to(torch.promote_types(logits_TE.dtype, torch.float32))
    return wide_TE.sigmoid() if spec.score == "sigmoid" else wide_TE.softmax(-1)


def probabilities(logits_TE: Tensor, spec: RouterSpec) -> Tensor:
    """Scores that sum to one over the experts, as balance losses want them (DeepSeek-V3, eq. 19, for sigmoid)."""
    scores_TE = scores(logits_TE, spec)
    return scores_TE / scores_TE.sum(-1, keepdim=True) if spec.score == "sigmoid" else scores_TE


def _within_groups(chosen_by_TE: Tensor, spec: RouterSpec) -> Tensor:
    size = spec.num_experts // spec.n_group
    grouped_TGX = chosen_by_TE.view(-1, spec.n_group, size)
    if spec.group_score == "max":
        value_TG = grouped_TGX.amax(-1)
    else:
        value_TG = grouped_TGX.topk(min(2, size), dim=-1).values.sum(-1)
    best_TB = torch.topk(value_TG, spec.topk_group, dim=-1, sorted=False).indices
    allowed_TG = torch.zeros_like(value_TG, dtype=torch.bool).scatter(1, best_TB, True)
    return grouped_TGX.masked_fill(~allowed_TG.unsqueeze(-1), spec.mask_fill).flatten(1)
