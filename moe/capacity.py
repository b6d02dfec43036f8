"""Routing that does not send every choice on: capacity, a random second choice, and experts that choose tokens.

Dropped choices keep their place and get weight zero, so shapes do not depend on the data.

Shapes: T tokens, E experts, K choices per token, C capacity of an expert, S = K*T choices, the first ones of all
tokens before all second ones.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from moe.stats import expert_counts

DropBy = Literal["position", "probability"]


def capacity(num_tokens: int, num_experts: int, top_k: int, factor: float) -> int:
    """How many of ``num_tokens * top_k`` choices one expert takes: ``factor`` times the balanced share, at least 1."""
    return max(1, math.ceil(factor * top_k * num_tokens / num_experts))


def within_capacity(
    index_TK: Tensor,
    weights_TK: Tensor,
    num_experts: int,
    limit: int,
    by: DropBy = "position",
    wanted_TK: Tensor | None = None,
) -> Tensor:
    """Which choices find room, [T,K] bool: each expert takes ``limit``, and the rest are dropped.

    Args:
        index_TK: a token's best choice first (:attr:`moe.routing.RouterSpec.ordered`).
        by: ``position``: first choices before second ones, earlier tokens first (GShard, algorithm 1; Switch);
            ``probability``: the largest weights first, ties by position.
        wanted_TK: false for choices that take no room, such as padding's; they are not kept.
    """
    index_S = index_TK.t().flatten()
    if wanted_TK is not None:
        index_S = index_S.masked_fill(~wanted_TK.t().flatten(), num_experts)
    order_S = None
    if by == "probability":
        order_S = torch.argsort(weights_TK.detach().t().flatten(), descending=True, stable=True)
        index_S = index_S[order_S]
    by_expert_S = torch.argsort(index_S, stable=True)
    place_S = torch.argsort(by_expert_S)  # where each choice stands among all, sorted by expert
    counts_X = expert_counts(index_S, num_experts + 1)
    begin_X = counts_X.cumsum(0) - counts_X
    kept_S = (place_S - begin_X[index_S] < limit) & (index_S < num_experts)
    if order_S is not None:
        kept_S = kept_S[torch.argsort(order_S)]
    return kept_S.view(index_TK.shape[1], index_TK.shape[0]).t()


def random_second(weights_TK: Tensor) -> Tensor:
    """Which of two choices are made, [T,2] bool: the second with twice its share of the weight as its probability.

    GShard (arXiv 2006.16668), algorithm 1. Draws from the device's default generator, which checkpoints restore.
    """
    share_T = (weights_TK[:, 1] / weights_TK.sum(-1)).detach()
    made_T = 2 * share_T > torch.rand_like(share_T)
    return torch.stack([torch.ones_like(made_T), made_T], dim=1)


def expert_choice(scores_TE: Tensor, limit: int, valid_T: Tensor | None = None) -> Tensor:
    """Which experts chose which tokens, [T,E] bool: each takes the ``limit`` tokens with the highest score for it.

    Expert Choice (arXiv 2202.09368), section 3.2. A choice depends on all tokens of the batch, later ones too.
    """
    by_TE = scores_TE.detach()
    if valid_T is not None:
        by_TE = by_TE.masked_fill(~valid_T[:, None], -math.inf)
    chosen_CE = by_TE.topk(min(limit, by_TE.shape[0]), dim=0).indices
    taken_TE = torch.zeros_like(by_TE, dtype=torch.bool).scatter(0, chosen_CE, True)
    return taken_TE if valid_T is None else taken_TE & valid_T[:, None]
