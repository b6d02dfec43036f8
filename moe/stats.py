"""Routing counts of the steps since they were last read.

Shapes: M MoE layers, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    """Accumulates the counts a gate reports, one tensor per MoE layer.

    Args:
        drained: whether there is a second reader, who calls :meth:`drain` and is independent of the first.
    """

    def __init__(self, drained: bool = False) -> None:
        self._drained = drained
        self._counts: dict[int, Tensor] = {}
        self._undrained: dict[int, Tensor] = {}

    def add(self, layer: int, top_k_index_TK: Tensor, num_experts: int, valid_T: Tensor | None = None) -> None:
        """Count one forward pass of one layer.

        Args:
            top_k_index_TK: global experts; ``num_experts`` for a choice that was dropped.
            valid_T: false for padding, which is not counted; None if all tokens are real.
        """
        if valid_T is not None:
            top_k_index_TK = top_k_index_TK.masked_fill(~valid_T.bool().view(-1, 1), num_experts + 1)
        counts_E = expert_counts(top_k_index_TK, num_experts + 2)[:num_experts]
        for counts in (self._counts, self._undrained) if self._drained else (self._counts,):
            counts[layer] = counts[layer] + counts_E if layer in counts else counts_E

    def drain(self, layers: Sequence[int], num_experts: int) -> Tensor:
        """Counts [M,E] since the last drain, zero for layers in which nothing was routed."""
        assert self._drained, "nothing was kept for a second reader"
        none = torch.zeros(num_experts, dtype=torch.int64)
        counts_ME = torch.stack([self._undrained[i].cpu().long() if i in self._undrained else none for i in layers])
        self._undrained = {}
        return counts_ME

    def take(self) -> RoutingStats | None:
        """The counts so far, which start again from zero; None if nothing was routed."""
        if not self._counts:
            return None
        layers = tuple(sorted(self._counts))
        stats = RoutingStats(layers, torch.stack([self._counts[i] for i in layers]))
        self._counts = {}
        return stats
