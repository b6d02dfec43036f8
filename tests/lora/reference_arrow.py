"""Arrow from its formula (arXiv 2405.11157, section 3.2), and gates over frozen LoRAs: one token at a time, in fp64.

The direction of an adapter comes from the whole product B A by power iteration, which shares nothing with the product's
QR and small SVD.
"""

from __future__ import annotations

import torch
from torch import Tensor


def direction(a: Tensor, b: Tensor, rounds: int = 4000) -> Tensor:
    """What ``B A`` amplifies most, up to its sign."""
    square = (b.double() @ a.double()).T @ (b.double() @ a.double())
    v = torch.ones(a.shape[1], dtype=torch.float64)
    for _ in range(rounds):
        v = square @ v
        v = v / (v @ v).sqrt()
    return v


def arrow(
    weight: Tensor, adapters: list[tuple[Tensor, Tensor, float]], x: Tensor, top_k: int, temperature: float
) -> list[Tensor]:
    """``adapters``: A, B and the scale of each."""
    keys, rows = [direction(a, b) for a, b, _ in adapters], []
    for token in x:
        scores = [(key @ token).abs() for key in keys]
        chosen = sorted(range(len(scores)), key=lambda e: -scores[e].item())[:top_k]
        powers = {e: (scores[e] / temperature).exp() for e in chosen}
        y = weight @ token
        for e, power in powers.items():
            a, b, s = adapters[e]
            y = y + power / sum(powers.values()) * s * (b.double() @ (a.double() @ token))
        rows.append(y)
    return rows
