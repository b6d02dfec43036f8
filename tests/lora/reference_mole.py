"""MOLE from its formula (arXiv 2404.13628), one token and one expert at a time, in fp64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def mole(p: dict[str, Tensor], x: Tensor, s: float) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and gates of one layer, by token. ``p``: the layer's parameters by name."""
    rows, gates = [], []
    for token in x:
        said = [s * (b @ (a @ token)) for a, b in zip(p["adapter.A"], p["adapter.B"], strict=True)]
        row = torch.cat(said)
        row = row / (sum(value * value for value in row) / len(row) + 1e-6).sqrt()
        scores = [(w * row).sum() / p["adapter.router.temperature"][0] for w in p["adapter.router.weight"]]
        powers = [score.exp() for score in scores]
        g = torch.stack([power / sum(powers) for power in powers])
        rows.append(p["weight"] @ token + p["bias"] + sum(g[e] * said[e] for e in range(len(said))))
        gates.append(g)
    return rows, gates


def product_loss(layers: Sequence[Sequence[Tensor]], real: Sequence[int]) -> Tensor:
    """``-log prod_e q_e``; q is the mean gate over the layers and their real tokens."""
    product = torch.ones((), dtype=torch.float64)
    for e in range(len(layers[0][0])):
        product = product * sum(gates[t][e] for gates in layers for t in real) / (len(layers) * len(real))
    return -product.log()
