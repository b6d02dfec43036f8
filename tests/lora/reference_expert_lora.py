"""LoRA on routed experts (arXiv 2106.09685 per expert and tensor), one token and one choice at a time.

``out[t] = sum_k w[t,k] * (W2 + s2 B2 A2) act((W13 + s1 B1 A1) x[t])`` with the matrices of expert ``index[t,k]``, or of
all experts where a factor is shared; biases as gpt_oss has them. Dropout is of the adapter's input: ``B A (mask * x)``.
Written from the formula, with nothing of the fast path's.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def act(h: Tensor, interleaved_and_clamped: bool) -> Tensor:
    inner = h.shape[0] // 2
    if not interleaved_and_clamped:
        return h[:inner] / (1 + torch.exp(-h[:inner])) * h[inner:]
    gate, up = h[0::2].clamp(max=7.0), h[1::2].clamp(-7.0, 7.0)
    return (up + 1) * gate / (1 + torch.exp(-1.702 * gate))


def reference(
    x: Tensor,
    index: Tensor,
    weights: Tensor,
    up: Tensor,
    down: Tensor,
    factors: dict[str, Tensor],
    scales: tuple[float, float],
    *,
    gpt_oss: bool = False,
    biases: tuple[Tensor, Tensor] | None = None,
    masks: Callable[[int, int], tuple[Tensor, Tensor]] | None = None,
) -> Tensor:
    """``up`` [E,2I,H] and ``down`` [E,H,I]; ``factors`` by name (``gate_up_proj.A``), [E or 1,..]; masks(t, k)."""

    def factor(name: str, expert: int) -> Tensor:
        stacked = factors[name]
        return stacked[expert] if stacked.shape[0] > 1 else stacked[0]

    out = []
    for t in range(x.shape[0]):
        total = torch.zeros_like(x[t])
        for k in range(index.shape[1]):
            e = int(index[t, k])
            mask_x, mask_a = masks(t, k) if masks else (1.0, 1.0)
            h = up[e] @ x[t]
            if "gate_up_proj.A" in factors:
                delta = factor("gate_up_proj.B", e) @ factor("gate_up_proj.A", e)
                h = h + scales[0] * delta @ (mask_x * x[t])
            if biases:
                h = h + biases[0][e]
            a = act(h, gpt_oss)
            y = down[e] @ a
            if "down_proj.A" in factors:
                y = y + scales[1] * (factor("down_proj.B", e) @ factor("down_proj.A", e)) @ (mask_a * a)
            if biases:
                y = y + biases[1][e]
            total = total + weights[t, k] * y
        out.append(total)
    return torch.stack(out) if out else x.clone()
