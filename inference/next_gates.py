"""What is computed on the device, from a layer's input, to say which experts the next layers will want.

Shapes: T tokens, H hidden, E experts, D layer calls ahead; L MoE layers, counted from 0 by *row*.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

DevicePart = Callable[[int, Tensor], Tensor]


def next_gates(gates: Sequence[nn.Module], lead: int = 1) -> DevicePart:
    """Scores [D,E] of the layers behind row ``row``: their gates applied to that layer's own input.

    The residual stream changes little from layer to layer, so most choices come out the same (FATE, arXiv 2502.12224,
    and Mixtral-offloading's speculative loading). A gate's limits to groups of experts are left out: what is wanted is
    an order, not a choice. NaN where there is no such layer in this pass.

    Args:
        gates: the model's own, by row.
    """

    def part(row: int, x_TH: Tensor) -> Tensor:
        ahead = gates[row + 1 : row + 1 + lead]
        known = [gate_scores(gate, x_TH) for gate in ahead]
        experts = gates[0].weight.shape[0]
        known += [x_TH.new_full((experts,), float("nan"), dtype=torch.float32)] * (lead - len(ahead))
        return torch.stack(known)

    return part


def gate_scores(gate: nn.Module, x_TH: Tensor) -> Tensor:
    """How much the tokens together lean to each expert, [E] in fp32."""
    return token_scores(gate, x_TH).sum(0)


def token_scores(gate: nn.Module, x_TH: Tensor) -> Tensor:
    """How much each token leans to each expert, [T,E] in fp32."""
    weight = gate.weight
    bias = gate.bias if isinstance(getattr(gate, "bias", None), Tensor) else None
    logits_TE = nn.functional.linear(x_TH.to(weight.dtype), weight, bias).float()
    correction = getattr(gate, "e_score_correction_bias", None)
    if correction is not None:  # DeepSeek-V3 chooses by corrected sigmoids
        return logits_TE.sigmoid() + correction.float()
    return logits_TE.softmax(-1)
