"""PERFT (arXiv 2411.08212) one token and one adapter at a time, from the paper's formula."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Weights = dict[int, Tensor]  # of one token, by adapter


def own_top_k(x_TH: Tensor, router_EH: Tensor, top_k: int) -> tuple[list[Weights], Tensor]:
    """perft-r: the best of the softmax, renormalised, and the balance loss over shares of choices."""
    weights, chosen, probabilities = [], [], []
    for x_H in x_TH:
        p_E = torch.stack([row_H @ x_H for row_H in router_EH]).exp()
        p_E = p_E / p_E.sum()
        best = sorted(range(len(p_E)), key=lambda e: -p_E[e].item())[:top_k]
        weights.append({e: p_E[e] / sum(p_E[i] for i in best) for e in best})
        chosen += best
        probabilities.append(p_E)
    mean_E = torch.stack(probabilities).mean(0)
    loss = len(router_EH) * sum(chosen.count(e) / len(chosen) * mean_E[e] for e in range(len(router_EH)))
    return weights, loss


def followed(index_TK: Tensor, weights_TK: Tensor) -> list[Weights]:
    """perft-e: what the block's router gave its experts."""
    return [
        dict(zip(index_K.tolist(), weights_K, strict=True))
        for index_K, weights_K in zip(index_TK, weights_TK, strict=True)
    ]


def everyone(tokens: int, adapters: int) -> list[Weights]:
    """perft-d, and perft-s with its one adapter."""
    return [dict.fromkeys(range(adapters), torch.ones((), dtype=torch.float64)) for _ in range(tokens)]


def delta(x_TH: Tensor, weights: Sequence[Weights], a_ERH: Tensor, b_EHR: Tensor, s: float) -> Tensor:
    rows = []
    for x_H, used in zip(x_TH, weights, strict=True):
        y_H = torch.zeros_like(x_H)
        for e, g in used.items():
            y_H = y_H + g * s * (b_EHR[e] @ (a_ERH[e] @ x_H))
        rows.append(y_H)
    return torch.stack(rows)
