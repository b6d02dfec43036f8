"""Load-balance losses that reach the objective without touching the model's forward.

Shapes: T tokens, K experts per token, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe.context import current
from moe.stats import expert_counts


class _Inject(torch.autograd.Function):
    """Identity on ``y``; in backward the auxiliary loss receives a constant gradient."""

    @staticmethod
    def forward(ctx, y: Tensor, aux: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        ctx.aux_like = aux.new_ones(())
        return y.view_as(y)

    @staticmethod
    def backward(ctx, d_y: Tensor) -> tuple[Tensor, Tensor, None]:
        return d_y, ctx.aux_like * ctx.scale, None


def inject(y: Tensor, aux: Tensor) -> Tensor:
    """Return ``y`` unchanged, adding ``aux`` (a scalar, already times its coefficient) to the loss being minimised.

    The gradient of ``aux`` is the :class:`~moe.context.BatchContext`'s ``aux_scale``, because this path bypasses the
    division of the main loss by the number of accumulation steps.
    """
    return _Inject.apply(y, aux, current().aux_scale)


def switch_loss(probs_TE: Tensor, top_k_index_TK: Tensor) -> Tensor:
    """``E * sum_e f_e P_e`` with f the share of assignments and P the mean probability (Switch Transformer, eq. 4-6).

    f sums to K over experts, as in transformers' ``load_balancing_loss_func``; balanced routing gives K.
    """
    num_tokens, num_experts = probs_TE.shape
    counts_E = expert_counts(top_k_index_TK, num_experts).to(probs_TE.dtype)
    return num_experts * (counts_E / num_tokens * probs_TE.mean(0)).sum()
