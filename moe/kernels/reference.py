"""The naive expert layer: one token, one choice at a time. Slow on purpose; every fast path is compared to it.

Shapes: T tokens, K experts per token, E experts, H hidden, I expert intermediate.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe.assignment import Assignment
from moe.form import PLAIN, ExpertForm
from moe.kernels.activation import between
from moe.kernels.stack import Stack


def moe_reference(
    x_TH: Tensor,
    top_k_index_TK: Tensor,
    top_k_weights_TK: Tensor,
    gate_up_proj_E: Tensor,
    down_proj_E: Tensor,
    form: ExpertForm = PLAIN,
    gate_up_bias_E2I: Tensor | None = None,
    down_bias_EH: Tensor | None = None,
) -> Tensor:
    """``out[t] = sum_k w[t,k] * W2[e] between(W13[e] x[t])``, ``e = index[t,k]`` (GShard eq. 2, SwiGLU).

    A choice whose index is E has no expert here, and adds nothing.
    """
    rows = []
    for t in range(x_TH.shape[0]):
        out_H = torch.zeros_like(x_TH[t])
        for k in range(top_k_index_TK.shape[1]):
            e = int(top_k_index_TK[t, k])
            if e == gate_up_proj_E.shape[0]:
                continue
            w13_2IH, w2_HI = gate_up_proj_E[e], down_proj_E[e]
            if form.transposed:
                w13_2IH, w2_HI = w13_2IH.T, w2_HI.T
            h_2I = w13_2IH @ x_TH[t]
            if gate_up_bias_E2I is not None:
                h_2I = h_2I + gate_up_bias_E2I[e]
            y_H = w2_HI @ between(h_2I, form)
            if down_bias_EH is not None:
                y_H = y_H + down_bias_EH[e]
            out_H = out_H + top_k_weights_TK[t, k] * y_H
        rows.append(out_H)
    return torch.stack(rows) if rows else x_TH.clone()


def reference_mix(x_RH: Tensor, weights_RK: Tensor, stack: Stack, assignment: Assignment) -> Tensor:
    """:func:`moe_reference` of rows whose choices were sorted."""
    ends_L = assignment.counts_L.cumsum(0)
    index_RK = torch.searchsorted(ends_L, assignment.slot_RK, right=True)
    biases = (stack.up_bias_L2I, stack.down_bias_LH)
    out_RH = moe_reference(x_RH, index_RK, weights_RK, stack.up_L, stack.down_L, stack.form, *biases)
    # Nothing of everything: a rank without pairs must take part in the backward exchanges, with gradients of zero.
    inputs = (x_RH, weights_RK, stack.up_L, stack.down_L, *biases)
    for tensor in inputs:
        if tensor is not None:
            out_RH = out_RH + tensor[:0].sum().to(out_RH.dtype)
    return out_RH
