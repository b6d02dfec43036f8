"""Routing counts of the steps since they were last read.

Shapes: M MoE layers, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def expert_counts(index: Tensor, num_experts: int) -> Tensor:
    """How often each expert occurs in ``index`` (any shape): [E] int64, on its device, without waiting for it.

    ``bincount`` reads its result's size back to the host, so on a GPU indices are compared instead.
    """
    index_S = index.flatten()
    if not index_S.is_cuda:
        return torch.bincount(index_S, minlength=num_experts)
    return (index_S[:, None] == torch.arange(num_experts, device=index_S.device)).sum(0)


@dataclass(frozen=True)
class RoutingStats:
    """``counts_ME``: token copies sent to each expert of each MoE layer."""

    layers: tuple[int, ...]
    counts_ME: Tensor

    @property
    def max_load(self) -> float:
        """Largest share of any expert over the balanced share, over all layers (1.0 is balanced)."""
        total_M1 = self.counts_ME.sum(1, keepdim=True).clamp(min=1)
        return float((self.counts_ME / total_M1).max() * self.counts_ME.shape[1])

    @property
    def dead(self) -> int:
        """Number of (layer, expert) pairs that no token reached."""
        return int((self.counts_ME == 0).sum())


class RoutingMeter:
    """Accumulates the counts a gate reports, one tensor per MoE layer."""

    def __init__(self) -> None:
        self._counts: dict[int, Tensor] = {}

    def add(self, layer: int, top_k_index_TK: Tensor, num_experts: int) -> None:
        counts_E = expert_counts(top_k_index_TK, num_experts)
        self._counts[layer] = self._counts[layer] + counts_E if layer in self._counts else counts_E

    def take(self) -> RoutingStats | None:
        """The counts so far, which start again from zero; None if nothing was routed."""
        if not self._counts:
            return None
        layers = tuple(sorted(self._counts))
        stats = RoutingStats(layers, torch.stack([self._counts[i] for i in layers]))
        self._counts = {}
        return stats
