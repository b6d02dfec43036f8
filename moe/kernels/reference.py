"""The naive expert layer: one token, one choice at a time. Slow on purpose; every fast path is compared to it.

Shapes: T tokens, K experts per token, E experts, H hidden, I expert intermediate.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def moe_reference(
    x_TH: Tensor,
    top_k_index_TK: Tensor,
    top_k_weights_TK: Tensor,
    gate_up_proj_E2IH: Tensor,
    down_proj_EHI: Tensor,
    act: Callable[[Tensor], Tensor] = torch.nn.functional.silu,
) -> Tensor:
    """``out[t] = sum_k w[t,k] * W2[e] (act(Wg[e] x[t]) * Wu[e] x[t])``, ``e = index[t,k]`` (GShard eq. 2, SwiGLU)."""
    rows = []
    for t in range(x_TH.shape[0]):
        out_H = torch.zeros_like(x_TH[t])
        for k in range(top_k_index_TK.shape[1]):
            e = int(top_k_index_TK[t, k])
            gate_I, up_I = (gate_up_proj_E2IH[e] @ x_TH[t]).chunk(2)
            out_H = out_H + top_k_weights_TK[t, k] * (down_proj_EHI[e] @ (act(gate_I) * up_I))
        rows.append(out_H)
    return torch.stack(rows) if rows else x_TH.clone()
