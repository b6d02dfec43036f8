"""Losses of adapter banks. They reach the objective through backward alone: no model and no loop knows of them.

A loss of one layer is injected where its router decides, by an identity whose backward adds the loss's gradient; when
activation checkpointing runs the layer again, the second run replaces the first. Padding counts nowhere.

Shapes: B rows of S positions, T tokens, E experts, K choices per token, R rank, O outputs, P pairs of a token and an
expert that it chose, X = E*R.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from lora.config import BankAt
from lora.errors import AdapterError
from moe.balance import inject, inject_late, z_loss
from moe.context import BatchContext, current

if TYPE_CHECKING:
    from lora.routers import Decision

_PAIRS = 1024  # the contrastive loss compares each with each
_TINY = 1e-12  # squared norm


def real_tokens(tokens: int) -> Tensor | None:
    """The batch's mask of real tokens; None if all are. Raises AdapterError if it is of other tokens."""
    mask_T = current().mask_T
    if mask_T is not None and mask_T.shape[0] != tokens:
        raise AdapterError(f"the batch's mask is of {mask_T.shape[0]} tokens, and a bank was given {tokens}")
    return mask_T


def inject_losses(decision: Decision, here: BankAt, path: str) -> Decision:
    """``decision``, through whose gates backward reaches the bank's balance loss and z-loss.

    Nothing is added outside of training batches (``BatchContext.balance``).

    Args:
        path: of the router; tells sites apart where a loss spans them.

    Raises AdapterError if the loss needs tasks or sequences that the batch does not name.
    """
    config, context, tokens = here.config, current(), decision.logits_TE.shape[0]
    coef = config.router_aux_loss_coef
    if not context.balance or not (coef or config.z_loss_coef) or not tokens:
        return decision
    mask_T, gate_TE, terms = real_tokens(tokens), decision.gate_TE, []
    if coef and config.balance in ("switch", "product") and config.balance_pooled:
        gate_TE = _inject_pooled(decision, here, path, mask_T, context)
    elif coef and config.balance == "switch":
        fixed = decision.index_TK.shape[1] if decision.index_TK is not None else 1
        terms.append(coef * switch_loss(decision.probs_TE, decision.chosen_TE, mask_T) / fixed)
    elif coef and config.balance == "product":
        terms.append(coef * product_loss(decision.probs_TE, mask_T))
    elif coef and config.balance == "localized_cv2":
        terms.append(coef * _localized(gate_TE, here, path, mask_T, context))
    if config.z_loss_coef:
        terms.append(config.z_loss_coef * z_loss(decision.logits_TE, mask_T))
    if terms and torch.is_grad_enabled():
        gate_TE = inject(gate_TE, sum(terms[1:], terms[0]))
    return replace(decision, gate_TE=gate_TE)


def switch_loss(probs_TE: Tensor, chosen_TE: Tensor, mask_T: Tensor | None = None) -> Tensor:
    """``E * sum_e f_e P_e``, f the choices of an expert per real token, P the mean of ``probs_TE`` over real tokens.

    Banks in which every token makes K choices divide it by K, so that f are shares of all choices, as published for
    MoLA (arXiv 2402.08562). AdaMoLE (arXiv 2405.00361) does not, and puts ``p - threshold`` for p, as here.
    """
    counts_E, sum_E, real = _sums(probs_TE, chosen_TE, mask_T)
    return probs_TE.shape[1] * (counts_E / real * sum_E / real).sum()


def product_loss(probs_TE: Tensor, mask_T: Tensor | None = None) -> Tensor:
    """``-log prod_e q_e``, q the mean of ``probs_TE`` over real tokens (MOLE, arXiv 2404.13628)."""
    _, sum_E, real = _sums(probs_TE, torch.ones_like(probs_TE, dtype=torch.bool), mask_T)
    return -(sum_E / real).clamp(min=_TINY).log().sum()


def _sums(probs_TE: Tensor, chosen_TE: Tensor, mask_T: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Choices of each expert, sum of its probabilities, and the number of tokens (at least 1), of real tokens."""
    if mask_T is None:
        real = probs_TE.new_full((), max(1, probs_TE.shape[0]))
        return chosen_TE.sum(0).to(probs_TE.dtype), probs_TE.sum(0), real
    real = mask_T.sum().clamp(min=1).to(probs_TE.dtype)
    # Filled, not multiplied: padding may hold anything, and nothing times NaN is NaN.
    sum_E = probs_TE.masked_fill(~mask_T[:, None], 0.0).sum(0)
    return (chosen_TE & mask_T[:, None]).sum(0).to(probs_TE.dtype), sum_E, real


def _inject_pooled(decision: Decision, here: BankAt, path: str, mask_T: Tensor | None, context: BatchContext) -> Tensor:
    """The gates, with a balance loss over the tokens of all layers.

    MixLoRA's (arXiv 2404.15159, eq. 6-7) is ``E * sum_e f_e P_e`` with f the choices per token, which sum to K; MOLE's
    is :func:`product_loss`. Their gradients need sums over all layers, which are there in backward. They are kept by
    site, so that a layer that is run again counts once.
    """
    counts_E, sum_E, real = _sums(decision.probs_TE, decision.chosen_TE, mask_T)
    sites = context.kept.setdefault(("bank balance", here.config), {})
    switch = here.config.balance == "switch"
    sites[path] = torch.cat([(counts_E if switch else sum_E).detach(), real.view(1)]).double()
    if not torch.is_grad_enabled():
        return decision.gate_TE

    def gradient() -> Tensor:
        total_X = torch.stack(list(sites.values())).sum(0)
        if not switch:
            return -1 / total_X[:-1].clamp(min=_TINY)
        return here.num_experts * total_X[:-1] / total_X[-1].square()

    return inject_late(decision.gate_TE, sum_E, gradient, here.config.router_aux_loss_coef)


def _localized(gate_TE: Tensor, here: BankAt, path: str, mask_T: Tensor | None, context: BatchContext) -> Tensor:
    if context.task_T is None:
        raise AdapterError(
            f"{path}: balance localized_cv2 needs the task of every sample, and the batch names none; "
            "give the data tasks, or set router_aux_loss_coef to 0"
        )
    tokens, shape = gate_TE.shape[0], context.shape
    if shape is None or shape[0] * shape[1] != tokens:
        raise AdapterError(f"{path}: balance localized_cv2 needs the batch's (B, S); got {shape} for {tokens} tokens")
    return localized_cv2(gate_TE, context.task_T, shape, here.config.localized_delta, context.segment_T, mask_T)


def localized_cv2(
    gate_TE: Tensor,
    task_T: Tensor,
    shape: tuple[int, int],
    delta: float,
    segment_T: Tensor | None = None,
    mask_T: Tensor | None = None,
) -> Tensor:
    """LoRAMoE's localized balancing constraint (arXiv 2312.09979, section 3.2), as its code has it.

    ``Q[m, e]`` is the sum of gate e over the real tokens of sample m. ``Z[m, e] = Q[m, e] * (1 + delta)`` where the
    expert is of the sample's type, ``* (1 - delta)`` where it is of the other. Experts up to the middle (the middle one
    too) are of type 0, the rest of type 1; samples of task 0 are of type 0, those of all other tasks of type 1. The
    loss is the squared coefficient of variation over all entries of Z: the unbiased variance by the squared mean. The
    paper prints variance by mean instead; its values of delta and of the coefficient could not be verified.

    A sample is a row, or with ``segment_T`` a row's run of equal segments. Samples without real tokens do not count.
    """
    experts = gate_TE.shape[1]
    second_E = torch.arange(experts, device=gate_TE.device) >= (experts + 1) // 2
    same_TE = (task_T > 0)[:, None] == second_E
    z_TE = gate_TE * (1 - delta + 2 * delta * same_TE.to(gate_TE.dtype))
    real_T = torch.ones_like(task_T, dtype=torch.bool) if mask_T is None else mask_T
    z_TE = z_TE.masked_fill(~real_T[:, None], 0.0)
    z_BSX = torch.cat([z_TE, real_T[:, None].to(z_TE.dtype)], 1).view(*shape, -1)
    if segment_T is None:
        z_QX, last_Q = z_BSX.sum(1), True
    else:
        z_QX, last_Q = _run_sums(z_BSX, segment_T.view(shape))
    used_Q1 = (z_QX[:, -1:].detach() > 0.5) & last_Q
    entries = (used_Q1.sum() * experts).to(z_QX.dtype)
    z_QE = z_QX[:, :-1]
    mean = z_QE.masked_fill(~used_Q1, 0.0).sum() / entries.clamp(min=1)
    off_QE = (z_QE - mean).masked_fill(~used_Q1, 0.0)
    return off_QE.square().sum() / (entries - 1).clamp(min=1) / (mean.square() + 1e-10)


def _run_sums(z_BSX: Tensor, segment_BS: Tensor) -> tuple[Tensor, Tensor]:
    """For every position, flattened, the sum over its run of equal segments up to it, and [Q,1] whether it ends there.

    Sums over 1, 2, 4, ... positions back: how many samples there are need not be known, which a GPU would have to be
    asked; torch's running sums it refuses in deterministic mode. A row's runs have different segments.
    """
    change_BS = segment_BS[:, 1:] != segment_BS[:, :-1]
    edge_B1 = torch.ones_like(segment_BS[:, :1], dtype=torch.bool)
    sum_BSX, back = z_BSX, 1
    while back < segment_BS.shape[1]:
        same_BS1 = (segment_BS[:, back:] == segment_BS[:, :-back]).unsqueeze(-1)
        earlier_BSX = sum_BSX[:, :-back].masked_fill(~same_BS1, 0.0)
        sum_BSX = sum_BSX + F.pad(earlier_BSX, (0, 0, back, 0))
        back *= 2
    return sum_BSX.flatten(0, 1), torch.cat([change_BS, edge_B1], 1).view(-1, 1)


def contrastive_loss(
    x_TM: Tensor,
    index_TK: Tensor,
    a_FRM: Tensor,
    c_ERR: Tensor | None,
    b_EOR: Tensor,
    temperature: float,
    mask_T: Tensor | None = None,
) -> Tensor:
    """MoELoRA's expert contrastive loss (arXiv 2402.12851): outputs of one expert attract, of different ones repel.

    Every output ``B_e C_e A_e x`` of a chosen expert is an anchor, before gates and without dropout; the other outputs
    of its expert are its positives. The loss is InfoNCE with several positives (arXiv 2004.11362, eq. 2) over cosines,
    divided by the temperature, and the mean over anchors that have a positive. The paper's exact form, its temperature
    and its coefficient could not be verified.

    Outputs that are nothing take no part: B starts at zero, and a zero has no direction. At most 1024 outputs are
    compared, those of evenly spaced tokens. They are never built: their products are ``z' (B_e' B_f) z``.
    """
    choices, experts = index_TK.shape[1], b_EOR.shape[0]
    step = max(1, -(-index_TK.shape[0] * choices // _PAIRS))
    dtype = torch.promote_types(x_TM.dtype, torch.float32)
    index_TK, b_XO = index_TK[::step], b_EOR.to(dtype).transpose(1, 2).flatten(0, 1)
    z_TER = (x_TM[::step].to(dtype) @ a_FRM.to(dtype).flatten(0, 1).T).unflatten(1, a_FRM.shape[:2])
    z_TER = z_TER.expand(-1, experts, -1)
    if c_ERR is not None:
        z_TER = torch.einsum("ter,esr->tes", z_TER, c_ERR.to(dtype))
    expert_P, real_P = index_TK.flatten(), torch.ones_like(index_TK.flatten(), dtype=torch.bool)
    if mask_T is not None:
        real_P = mask_T[::step].repeat_interleave(choices, output_size=len(expert_P))
    is_PE = expert_P[:, None] == torch.arange(experts, device=expert_P.device)
    z_PER = z_TER.repeat_interleave(choices, 0, output_size=len(expert_P)).masked_fill(~is_PE[..., None], 0.0)
    z_PX = z_PER.flatten(1)
    dot_PP = z_PX @ (b_XO @ b_XO.T) @ z_PX.T
    return _info_nce(dot_PP, expert_P, real_P, temperature)


def _info_nce(dot_PP: Tensor, expert_P: Tensor, real_P: Tensor, temperature: float) -> Tensor:
    square_P = dot_PP.diagonal()
    real_P = real_P & (square_P.detach() > _TINY)
    norm_P = square_P.clamp(min=_TINY).sqrt()
    score_PP = dot_PP / (norm_P[:, None] * norm_P) / temperature
    other_PP = real_P & ~torch.eye(len(real_P), dtype=torch.bool, device=real_P.device)
    same_PP = other_PP & (expert_P[:, None] == expert_P) & real_P[:, None]
    log_PP = score_PP - score_PP.masked_fill(~other_PP, -1e30).logsumexp(1, keepdim=True)
    positives_P = same_PP.sum(1)
    anchor_P = log_PP.masked_fill(~same_PP, 0.0).sum(1) / positives_P.clamp(min=1)
    return -anchor_P.sum() / (positives_P > 0).sum().clamp(min=1)
