"""What stands between an expert's two projections, for every family.

Shapes: N rows, I intermediate.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.activations import ACT2FN

from moe.form import ExpertForm


def between(h_N2I: Tensor, form: ExpertForm) -> Tensor:
    """The up projection's output [N,2I] to the down projection's input [N,I]."""
    gate_NI, up_NI = (h_N2I[..., ::2], h_N2I[..., 1::2]) if form.interleaved else h_N2I.chunk(2, dim=-1)
    if form.limit is None:
        return ACT2FN[form.act](gate_NI) * up_NI
    gate_NI = gate_NI.clamp(max=form.limit)
    up_NI = up_NI.clamp(min=-form.limit, max=form.limit)
    return (up_NI + 1) * (gate_NI * torch.sigmoid(gate_NI * form.alpha))
