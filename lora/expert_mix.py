"""A whole expert layer with low-rank pairs as one function that keeps little for its backward.

As :mod:`moe.kernels.minimal`: kept are x, the routing and the pre-activations (the fused pass keeps LoRA's part out of
them), of those as many as :func:`lora.fold.kept_rows` says, and ``A x``. The activation and the gathered rows are
computed again.
The score multiplies before the down projection, and before its pair, which is linear, too.

Shapes: R rows, K choices per row, L local experts, N sorted pairs, H hidden, I intermediate.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lora import expert_grouped, expert_loops
from lora.expert_pairs import Kept, PairFacts, PairGradients, Pairs
from lora.fold import kept_rows
from lora.fused import refuses_fused_experts
from moe.assignment import Assignment
from moe.kernels.minimal import graph_is_kept
from moe.kernels.probe import refuses_grouped
from moe.kernels.stack import Gradients, Stack


def adapted_mix(x_RH: Tensor, weights_RK: Tensor, stack: Stack, assignment: Assignment, pairs: Pairs) -> Tensor:
    """Each row's local experts with their pairs, weighted and summed: [R,H] in x's dtype.

    The stack's tensors get no gradient. Raises RuntimeError from a backward with ``create_graph=True``.
    """
    dtype = stack.up_L.dtype
    tensors = (x_RH.to(dtype), weights_RK, *(factor.to(dtype) for factor in pairs.factors))
    learns = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    experts, hidden, inner = stack.down_LHI.shape
    ranks = sum(a_LRM.shape[1] for a_LRM in pairs.factors[::2])
    # Settled without gradients, too: it decides which experts share a pass, and so the last bits.
    keep = kept_rows(assignment.pair_N.numel(), x_RH.shape[0], experts, hidden, inner, ranks)
    how = _how(stack)
    if how is expert_grouped and not _refuses_fused(stack, pairs):
        how = importlib.import_module("lora.expert_fused")
    return _AdaptedMix.apply(how, keep, learns, stack, assignment, pairs.facts, *tensors).to(x_RH.dtype)


def _how(stack: Stack) -> ModuleType:
    return _products(stack.up_L.device, stack.up_L.dtype, *stack.down_LHI.shape[1:])


@functools.cache
def _products(device: torch.device, dtype: torch.dtype, hidden: int, inner: int) -> ModuleType:
    return expert_loops if refuses_grouped(device, dtype, hidden, inner, 2 * inner) else expert_grouped


def _refuses_fused(stack: Stack, pairs: Pairs) -> str | None:
    there = [pair for pair in (pairs.up, pairs.down) if pair is not None]
    dropout, rank = max(pair.dropout for pair in there), max(pair.a_LRM.shape[1] for pair in there)
    weight, biased = stack.up_L, stack.up_bias_L2I is not None
    return refuses_fused_experts(weight.device, weight.dtype, stack.form, biased, pairs.way, dropout, rank)


class _AdaptedMix(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        how: ModuleType,
        keep: int,
        learns: bool,
        stack: Stack,
        assignment: Assignment,
        facts: PairFacts,
        x_RH: Tensor,
        weights_RK: Tensor,
        *factors: Tensor,
    ) -> Tensor:
        with torch.autocast(x_RH.device.type, enabled=False):
            if assignment.pair_N.numel():
                pairs = facts.pairs(factors)
                out_RH, kept = how.forward(x_RH, weights_RK, stack, assignment, pairs, keep, learns)
            else:
                out_RH, kept = torch.zeros_like(x_RH), Kept(*(x_RH.new_empty(0),) * 3)
        if learns:
            parts = (kept.h_P2I, kept.z_up_NQ, kept.z_down_NQ, kept.table_X)
            parts += (assignment.pair_N, assignment.slot_RK, assignment.counts_L)
            frozen = (stack.up_L, stack.down_L, stack.up_bias_L2I, stack.down_bias_LH)
            ctx.save_for_backward(x_RH, weights_RK, *parts, *frozen, *factors)
            ctx.known = how, keep, stack.form, assignment.complete, facts
        return out_RH

    @staticmethod
    def backward(ctx: Any, dout_RH: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "adapted experts have no second derivative, and backward was called with create_graph=True; choose "
                "model.experts_backend: grouped_mm, which has one"
            )
        how, keep, form, complete, facts = ctx.known
        x_RH, weights_RK, *rest = ctx.saved_tensors
        kept, assignment = Kept(*rest[:4]), Assignment(*rest[4:7], complete)
        stack, pairs = Stack(*rest[7:11], form), facts.pairs(rest[11:])
        needs_x = ctx.needs_input_grad[6]
        with torch.autocast(x_RH.device.type, enabled=False):
            if assignment.pair_N.numel():
                found, up, down = how.backward(
                    dout_RH.contiguous(), x_RH, weights_RK, kept, stack, assignment, pairs, keep, needs_x,
                    overwrite=not graph_is_kept(),
                )  # fmt: skip
            else:
                # Zero, not missing: ranks without pairs take part in the reduction of gradients.
                found = Gradients(x=torch.zeros_like(x_RH), weights=torch.zeros_like(weights_RK))
                up, down = PairGradients.zeros(pairs.up), PairGradients.zeros(pairs.down)
        gradients = [t for pair in (up, down) if pair is not None for t in (pair.a_LRM, pair.b_LOR)]
        return (*(None,) * 6, found.x if needs_x else None, found.weights, *gradients)
