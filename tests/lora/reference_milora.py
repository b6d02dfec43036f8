"""MiLoRA from its formula (arXiv 2410.18035), one sample, one token and one module at a time, in fp64."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def gates(rows: Sequence[Tensor], x: Tensor, prompts: Sequence[Sequence[int]], top_k: int, renormalise: bool):
    """By sample: (weights, probabilities, chosen) of the modules.

    Args:
        rows: the router's row of each module.
        x: what the layer is given, by token.
        prompts: the prompt's tokens of each sample.
    """
    found = []
    for prompt in prompts:
        mean = sum((x[t] for t in prompt), torch.zeros_like(x[0])) / max(1, len(prompt))
        active = 0.5 * mean * (1 + torch.erf(mean / math.sqrt(2)))
        powers = [(row * active).sum().exp() for row in rows]
        p = [power / sum(powers) for power in powers]
        chosen = sorted(range(len(p)), key=lambda m: -p[m].item())[:top_k]
        share = sum(p[m] for m in chosen) if renormalise else 1
        found.append(([p[m] / share if m in chosen else 0 * p[m] for m in range(len(p))], p, chosen))
    return found


def balance_loss(found: Sequence[tuple], top_k: int) -> Tensor:
    """``M / k sum_m f_m P_m`` of one layer over its samples."""
    samples, modules = len(found), len(found[0][1])
    total = torch.zeros((), dtype=torch.float64)
    for m in range(modules):
        f = sum(m in chosen for _, _, chosen in found) / samples
        total = total + f * sum(p[m] for _, p, _ in found) / samples
    return modules / top_k * total


def module(w: Tensor, a: Tensor, b: Tensor, s: float, gate: Tensor, token: Tensor) -> Tensor:
    return w @ token + gate * s * (b @ (a @ token))
