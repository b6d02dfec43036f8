"""An expert layer that keeps for its backward only x, the pre-activations h, the scores and who went where.

The score multiplies the activation *before* the down projection. That is linear, ``s * (W2 a) = W2 (s * a)``, so its
output is not needed for the gradient of s, and nothing of N x H is kept. The gathered rows, the activation and its
derivative are computed again. A bias after the down projection adds ``s * bias``. Kept, in elements:
``R*H + N*2I`` instead of the ``N*(2H + 4I)`` of a composition of differentiable pieces (SonicMoE keeps the same).

Shapes: R rows, K choices per row, L local experts, N sorted pairs, H hidden, I intermediate.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from moe.assignment import Assignment
from moe.form import ExpertForm
from moe.kernels.stack import Needs, Stack


def minimal_mix(how: ModuleType, x_RH: Tensor, weights_RK: Tensor, stack: Stack, assignment: Assignment) -> Tensor:
    """Each row's local experts, weighted and summed: [R,H] in x's dtype.

    Args:
        how: the module whose products are used, a :class:`~moe.kernels.stack.Pass`.

    Its backward cannot be differentiated again: ``create_graph=True`` raises RuntimeError.
    """
    tensors = (x_RH.to(stack.up_L.dtype), weights_RK, stack.up_L, stack.down_L, stack.up_bias_L2I, stack.down_bias_LH)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    parts = (assignment.pair_N, assignment.slot_RK, assignment.counts_L, assignment.ends_L)
    return _Mix.apply(how, keep, assignment.complete, stack.form, *parts, *tensors).to(x_RH.dtype)


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        how: ModuleType,
        keep: bool,
        complete: bool,
        form: ExpertForm,
        pair_N: Tensor,
        slot_RK: Tensor,
        counts_L: Tensor,
        ends_L: Tensor,
        x_RH: Tensor,
        weights_RK: Tensor,
        *stacked: Tensor | None,
    ) -> Tensor:
        up_L, down_L, up_bias, down_bias = stacked
        assert up_L is not None
        assert down_L is not None
        assignment = Assignment(pair_N, slot_RK, counts_L, complete, ends_L)
        stack = Stack(up_L, down_L, up_bias, down_bias, form)
        with without_autocast(x_RH.device.type):
            if pair_N.numel():
                out_RH, h_N2I = how.forward(x_RH, weights_RK, stack, assignment, keep)
            else:
                out_RH, h_N2I = torch.zeros_like(x_RH), None
        if keep:
            ctx.save_for_backward(x_RH, weights_RK, h_N2I, pair_N, slot_RK, counts_L, ends_L, *stacked)
            ctx.how, ctx.complete, ctx.form = how, complete, form
        return out_RH

    @staticmethod
    def backward(ctx: Any, dout_RH: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        x_RH, weights_RK, h_N2I, pair_N, slot_RK, counts_L, ends_L, *stacked = ctx.saved_tensors
        needs = Needs(*ctx.needs_input_grad[8:])
        with without_autocast(x_RH.device.type):
            if pair_N.numel():
                assignment = Assignment(pair_N, slot_RK, counts_L, ctx.complete, ends_L)
                found = ctx.how.backward(
                    dout_RH.contiguous(), x_RH, weights_RK, h_N2I, Stack(*stacked, ctx.form), assignment, needs,
                    overwrite=not graph_is_kept(),
                )  # fmt: skip
            else:
                found = needs.zeros(x_RH, weights_RK, stacked)
        gradients = (found.x, found.weights, found.up, found.down, found.up_bias, found.down_bias)
        return (*(None,) * 8, *gradients)


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Nothing where it is off: entering it is Python, in every layer and pass."""
    on = torch.is_autocast_enabled(device_type)
    return torch.autocast(device_type, enabled=False) if on else nullcontext()


def refuse_second_derivative() -> None:
    """Raises RuntimeError in a backward pass that is to be differentiated."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "these experts have no second derivative, and backward was called with create_graph=True; choose "
            "model.experts_backend: grouped_mm, which has one"
        )


def graph_is_kept() -> bool:
    """Whether this graph may be walked again (``retain_graph``), and what is saved must stay as it is."""
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if ask is None else bool(ask())
