"""Load-balance losses that reach the objective without touching the model's forward.

All but the z-loss have the form ``sum_e c_e P_e``: P are mean probabilities, through which gradients flow, and c comes
from counts of choices, through which none do. Padding counts nowhere.

Shapes: B sequences, S positions, T tokens, K experts per token, E experts, D devices (groups of neighbouring experts).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from moe.context import BatchContext, current
from moe.routing import RoutingError
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


class _InjectLate(torch.autograd.Function):
    """Identity on ``y``; in backward ``p_E`` receives a gradient that is not known before."""

    @staticmethod
    def forward(ctx, y: Tensor, p_E: Tensor, gradient: Callable[[], Tensor], scale: float) -> Tensor:
        ctx.gradient, ctx.scale, ctx.dtype = gradient, scale, p_E.dtype
        return y.view_as(y)

    @staticmethod
    def backward(ctx, d_y: Tensor) -> tuple[Tensor, Tensor, None, None]:
        return d_y, ctx.gradient().to(ctx.dtype) * ctx.scale, None, None


def inject(y: Tensor, aux: Tensor) -> Tensor:
    """Return ``y`` unchanged, adding ``aux`` (a scalar, already times its coefficient) to the loss being minimised.

    The gradient of ``aux`` is the :class:`~moe.context.BatchContext`'s ``aux_scale``, because this path bypasses the
    division of the main loss by the number of accumulation steps.
    """
    return _Inject.apply(y, aux, current().aux_scale)


def inject_late(y: Tensor, p_E: Tensor, gradient: Callable[[], Tensor], coef: float) -> Tensor:
    """Return ``y`` unchanged; ``p_E`` receives ``coef`` times a gradient that is asked for in backward only.

    For losses that are linear in ``p_E`` with coefficients that later layers still change.
    """
    return _InjectLate.apply(y, p_E, gradient, current().aux_scale * coef)


# -- single losses, one layer each -----------------------------------------------------------------------------------


def switch_loss(probs_TE: Tensor, top_k_index_TK: Tensor, mask_T: Tensor | None = None) -> Tensor:
    """``E * sum_e f_e P_e`` with f the share of assignments and P the mean probability (Switch Transformer, eq. 4-6).

    f sums to K over experts, as in transformers' ``load_balancing_loss_func``; balanced routing gives K.
    """
    num_tokens, num_experts = probs_TE.shape
    counts_E = choice_counts(top_k_index_TK, num_experts, mask_T).to(probs_TE.dtype)
    if mask_T is None:
        return num_experts * (counts_E / num_tokens * probs_TE.mean(0)).sum()
    real = mask_T.sum().clamp(min=1)
    return num_experts * (counts_E / real * (probs_TE * mask_T[:, None]).sum(0) / real).sum()


def _switch_gradient(counts_E: Tensor, real: Tensor | int) -> Tensor:
    """Of :func:`switch_loss` for the summed probabilities of so many real tokens, in fp64."""
    tokens = max(real, 1) if isinstance(real, int) else real.clamp(min=1)
    return counts_E.double() * len(counts_E) / tokens / tokens


def z_loss(logits_TE: Tensor, mask_T: Tensor | None = None) -> Tensor:
    """Mean over tokens of ``logsumexp(logits)^2`` (ST-MoE, arXiv 2202.08906, eq. 5)."""
    square_T = logits_TE.to(torch.promote_types(logits_TE.dtype, torch.float32)).logsumexp(-1).square()
    return square_T.mean() if mask_T is None else (square_T * mask_T).sum() / mask_T.sum().clamp(min=1)


def choice_counts(index_TK: Tensor, num_experts: int, mask_T: Tensor | None = None) -> Tensor:
    """How often real tokens chose each expert, [E] int64."""
    if mask_T is None:
        return expert_counts(index_TK, num_experts)
    return expert_counts(index_TK.masked_fill(~mask_T[:, None], num_experts), num_experts + 1)[:num_experts]


@dataclass(frozen=True)
class SequenceLoads:
    """What the losses of DeepSeek-V2 (arXiv 2405.04434, section 2.2.3) are made of, each sequence on its own.

    Attributes:
        f_BE: times each expert was chosen, in units of the balanced share.
        p_BE: mean probability of each expert.
        sent_BD: share of the sequence's tokens that at least one expert of a device gets.
        top_k: K.
    """

    f_BE: Tensor
    p_BE: Tensor
    sent_BD: Tensor
    top_k: int

    @classmethod
    def of(
        cls, probs_TE: Tensor, index_TK: Tensor, shape: tuple[int, int], devices: int, mask_T: Tensor | None
    ) -> SequenceLoads:
        (batch, length), experts, k = shape, probs_TE.shape[1], index_TK.shape[1]
        real_BS = torch.ones(batch, length, device=probs_TE.device, dtype=torch.bool)
        if mask_T is not None:
            real_BS = mask_T.view(batch, length)
        n_B1 = real_BS.sum(1, keepdim=True).clamp(min=1)
        index_BSK = index_TK.view(batch, length, k)
        counts_BE = torch.stack([choice_counts(i, experts, m) for i, m in zip(index_BSK, real_BS, strict=True)])
        device_D = torch.arange(devices, device=probs_TE.device)
        on_BSD = (index_BSK[..., None] // (experts // devices) == device_D).any(2) & real_BS[..., None]
        return cls(
            f_BE=counts_BE.to(probs_TE.dtype) * experts / (k * n_B1),
            p_BE=(probs_TE.view(batch, length, experts) * real_BS[..., None]).sum(1) / n_B1,
            sent_BD=on_BSD.sum(1).to(probs_TE.dtype) / n_B1,
            top_k=k,
        )

    def expert_loss(self) -> Tensor:
        """Eq. 23 to 25, the mean over sequences."""
        return (self.f_BE * self.p_BE).sum(1).mean()

    def switch_loss(self) -> Tensor:
        """:func:`switch_loss` of each sequence, the mean over them."""
        return self.top_k * self.expert_loss()

    def device_loss(self) -> Tensor:
        """Eq. 26 to 28."""
        by_device_BDX = self.f_BE.unflatten(1, (self.sent_BD.shape[1], -1))
        return (by_device_BDX.mean(2) * self._p_BD()).sum(1).mean()

    def communication_loss(self, device_limit: int) -> Tensor:
        """Eq. 29 to 31. ``device_limit``: M, the most devices a token may be sent to."""
        return (self.sent_BD * self.sent_BD.shape[1] / device_limit * self._p_BD()).sum(1).mean()

    def _p_BD(self) -> Tensor:
        return self.p_BE.unflatten(1, (self.sent_BD.shape[1], -1)).sum(2)


# -- all losses of a model -------------------------------------------------------------------------------------------

Scope = Literal["micro_batch", "sequence", "global_batch", "hf"]


@dataclass(frozen=True)
class BalanceSpec:
    """Which losses a run adds, with their coefficients. Each is a sum over layers, but for ``hf``.

    Attributes:
        aux: over what the Switch loss counts: a ``micro_batch`` of one rank; each ``sequence``; the ``global_batch``;
            ``hf``: a micro-batch, all layers together, as transformers' ``load_balancing_loss_func``.
        expert_coef, device_coef, communication_coef: DeepSeek-V2's alpha 1 to 3.
        z_coef: of the z-loss.
        devices: D of DeepSeek-V2's losses.
        device_limit: M of the communication loss.
    """

    aux: Scope = "micro_batch"
    aux_coef: float = 0.0
    expert_coef: float = 0.0
    device_coef: float = 0.0
    communication_coef: float = 0.0
    z_coef: float = 0.0
    devices: int = 1
    device_limit: int = 1

    @property
    def has_losses(self) -> bool:
        return any((self.aux_coef, self.z_coef, *self._by_sequence))

    @property
    def _by_sequence(self) -> tuple[float, float, float]:
        return self.expert_coef, self.device_coef, self.communication_coef


@dataclass
class _Running:
    """Counts of an optimizer step so far over all ranks, [E + 1]: choices of each expert, then real tokens."""

    counts_X: Tensor
    passes: int


class BalanceLosses:
    """The losses of a run, injected where the gates are.

    Args:
        total: sums a tensor over the data-parallel ranks, in place; None for one rank.
        ranks: how many they are.
    """

    def __init__(self, spec: BalanceSpec, total: Callable[[Tensor], Any] | None = None, ranks: int = 1) -> None:
        self.spec = spec
        self._total, self._ranks = total, ranks
        self._running: dict[int, _Running] = {}

    def inject(
        self, weights_TK: Tensor, layer: int, logits_TE: Tensor, probs_TE: Tensor, index_TK: Tensor, first: bool,
        counts_E: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """``weights_TK``, through which backward reaches every loss of this layer.

        Args:
            first: whether this is no recompute: what is counted over ranks or layers is counted then, and kept.
            counts_E: how often real tokens chose each expert, if that is known.
        """
        spec, context = self.spec, current()
        if not spec.has_losses:
            return weights_TK
        if spec.aux_coef and counts_E is None and (spec.aux == "micro_batch" or (first and spec.aux != "sequence")):
            counts_E = choice_counts(index_TK, probs_TE.shape[1], context.mask_T)
        if first and spec.aux_coef and spec.aux in ("global_batch", "hf"):
            assert counts_E is not None
            self._count(layer, counts_E, probs_TE.shape[0], context)
        if not torch.is_grad_enabled():
            return weights_TK
        loss = self._own(layer, logits_TE, probs_TE, index_TK, context)
        if loss is not None:
            weights_TK = inject(weights_TK, loss)
        if spec.aux in ("hf", "micro_batch") and spec.aux_coef:
            mask_T = context.mask_T
            sum_E = (probs_TE if mask_T is None else probs_TE * mask_T[:, None]).sum(0)
            # The gradient alone: the loss itself is nobody's, and a step has this in each layer.
            if spec.aux == "hf":
                gradient = partial(self._all_layers, context)
            else:
                assert counts_E is not None
                gradient = partial(_switch_gradient, counts_E, probs_TE.shape[0] if mask_T is None else mask_T.sum())
            weights_TK = inject_late(weights_TK, sum_E, gradient, spec.aux_coef)
        return weights_TK

    def _own(
        self, layer: int, logits_TE: Tensor, probs_TE: Tensor, index_TK: Tensor, context: BatchContext
    ) -> Tensor | None:
        """The losses that need nothing of other layers."""
        spec, mask_T, terms = self.spec, context.mask_T, []
        if spec.aux_coef and spec.aux == "global_batch":
            terms.append(spec.aux_coef * self._global(layer, probs_TE, context))
        if spec.z_coef:
            terms.append(spec.z_coef * z_loss(logits_TE, mask_T))
        if any(spec._by_sequence) or (spec.aux_coef and spec.aux == "sequence"):
            loads = SequenceLoads.of(probs_TE, index_TK, _shape(context, index_TK), spec.devices, mask_T)
            if spec.aux_coef and spec.aux == "sequence":
                terms.append(spec.aux_coef * loads.switch_loss())
            terms += [
                coef * loss
                for coef, loss in (
                    (spec.expert_coef, loads.expert_loss()),
                    (spec.device_coef, loads.device_loss()),
                    (spec.communication_coef, loads.communication_loss(spec.device_limit)),
                )
                if coef
            ]
        return sum(terms[1:], terms[0]) if terms else None

    def _count(self, layer: int, counts_E: Tensor, tokens: int, context: BatchContext) -> None:
        real = counts_E.new_full((1,), tokens) if context.mask_T is None else context.mask_T.sum().view(1)
        counts_X = torch.cat([counts_E, real])
        if self.spec.aux == "hf":
            context.kept.setdefault("hf", []).append(counts_X)
            return
        if self._total is not None:
            self._total(counts_X)
        before = self._running.get(layer)
        if before is not None and context.micro_step > 0:
            counts_X = counts_X + before.counts_X
        passes = 1 if before is None or context.micro_step == 0 else before.passes + 1
        self._running[layer] = context.kept["global", layer] = _Running(counts_X, passes)

    def _global(self, layer: int, probs_TE: Tensor, context: BatchContext) -> Tensor:
        """The Switch loss with f over all ranks and the micro-steps so far (arXiv 2501.11873, section 3).

        P is in units of the mean number of tokens, so that averaging gradients over ranks gives the loss of all tokens.
        """
        running: _Running = context.kept["global", layer]
        counts_X = running.counts_X.to(probs_TE.dtype)
        tokens = counts_X[-1].clamp(min=1)
        each = tokens / (self._ranks * running.passes)
        sum_E = (probs_TE if context.mask_T is None else probs_TE * context.mask_T[:, None]).sum(0)
        return probs_TE.shape[1] * (counts_X[:-1] / tokens * sum_E / each).sum()

    def _all_layers(self, context: BatchContext) -> Tensor:
        """Gradient of transformers' loss for any layer's summed probabilities. Called when all have been passed."""
        counts_X = torch.stack(context.kept["hf"]).sum(0).double()
        tokens = counts_X[-1].clamp(min=1)
        return (len(counts_X) - 1) * counts_X[:-1] / tokens / tokens


def _shape(context: BatchContext, index_TK: Tensor) -> tuple[int, int]:
    """(B, S) of the batch; the context must know it. Raises RoutingError if it does not or if it does not fit."""
    tokens = index_TK.shape[0]
    if context.shape is None or context.shape[0] * context.shape[1] != tokens:
        raise RoutingError(f"a loss over sequences needs the batch's (B, S); got {context.shape} for {tokens} tokens")
    return context.shape
