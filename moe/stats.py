"""Routing counts of the steps since they were last read.

Shapes: M MoE layers, E experts, T tokens, K choices per token, S choices of all tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe.refs import ExpertRef


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
    """How some tokens were spread over the experts. Everything here reads ``counts_ME``: on a GPU that waits.

    Attributes:
        layers: global layer indices.
        counts_ME: token copies sent to each expert of each MoE layer.
        dropped_M: copies of each layer that no expert took.
    """

    layers: tuple[int, ...]
    counts_ME: Tensor
    dropped_M: Tensor

    @property
    def share_ME(self) -> Tensor:
        """Each expert's share of its layer's copies, fp64; zero in a layer without any."""
        return self.counts_ME.double() / self.counts_ME.sum(1, keepdim=True).clamp(min=1)

    @property
    def max_load(self) -> float:
        """Largest share of any expert over the balanced share, over all layers (1.0 is balanced)."""
        return float(self.share_ME.max() * self.counts_ME.shape[1])

    @property
    def dead_experts(self) -> tuple[ExpertRef, ...]:
        """The experts that no token reached."""
        return tuple(ExpertRef(self.layers[m], e) for m, e in (self.counts_ME == 0).nonzero().tolist())

    @property
    def dead(self) -> int:
        """Number of (layer, expert) pairs that no token reached."""
        return int((self.counts_ME == 0).sum())

    @property
    def entropy_M(self) -> Tensor:
        """Entropy of each layer's load in units of log E: 1.0 is balanced, 0.0 is all tokens to one expert."""
        num_experts = self.counts_ME.shape[1]
        if num_experts == 1:
            return torch.ones(len(self.layers), dtype=torch.float64)
        return torch.special.entr(self.share_ME).sum(1) / math.log(num_experts)

    @property
    def cv_M(self) -> Tensor:
        """Coefficient of variation of each layer's load: the standard deviation over experts over their mean."""
        return self.share_ME.std(1, correction=0) * self.counts_ME.shape[1]

    @property
    def dropped(self) -> int:
        return int(self.dropped_M.sum())

    def figures(self) -> dict[str, Any]:
        """For the events: plain numbers, a list entry for each layer."""
        return {
            "layers": list(self.layers),
            "tokens": self.counts_ME.tolist(),
            "entropy": [round(x, 6) for x in self.entropy_M.tolist()],
            "load_cv": [round(x, 6) for x in self.cv_M.tolist()],
            "dead": [str(ref) for ref in self.dead_experts],
            "dropped": self.dropped_M.tolist(),
            "max_load": round(self.max_load, 6),
        }

    def brief(self) -> str:
        """For a line of the log: the worst layer of each figure."""
        words = [f"busiest expert {self.max_load:.1f}x", f"load CV {float(self.cv_M.max()):.2f}"]
        if self.dead:
            words.append(f"{self.dead} dead")
        if self.dropped:
            words.append(f"{self.dropped / (self.dropped + int(self.counts_ME.sum())):.1%} dropped")
        return ", ".join(words)


class RoutingMeter:
    """Accumulates the counts a gate reports, one tensor per MoE layer. Adding waits for no device.

    Args:
        drained: whether there is a second reader, who calls :meth:`drain` and is independent of the first.
    """

    def __init__(self, drained: bool = False) -> None:
        self._drained = drained
        self._counts: dict[int, Tensor] = {}
        self._undrained: dict[int, Tensor] = {}

    def add_counts(self, layer: int, counts_E: Tensor) -> None:
        """Count one forward pass of one layer in which nothing was dropped: how often each expert was chosen."""
        for kept in self._keepers:
            if layer not in kept:
                kept[layer] = counts_E.new_zeros(counts_E.numel() + 1)
            kept[layer][:-1].add_(counts_E)

    def add(self, layer: int, top_k_index_TK: Tensor, num_experts: int, valid_T: Tensor | None = None) -> None:
        """Count one forward pass of one layer, as :meth:`add_counts` does, of which some choices may be dropped.

        Args:
            top_k_index_TK: global experts; ``num_experts`` for a choice that was dropped.
            valid_T: false for padding, which is not counted; None if all tokens are real.
        """
        if valid_T is not None:
            top_k_index_TK = top_k_index_TK.masked_fill(~valid_T.bool().view(-1, 1), num_experts + 1)
        # Behind the experts' own counts: dropped choices, and padding if there is any.
        counts = expert_counts(top_k_index_TK, num_experts + 2)[: num_experts + 1]
        for kept in self._keepers:
            kept[layer] = kept[layer] + counts if layer in kept else counts.clone()

    @property
    def _keepers(self) -> tuple[dict[int, Tensor], ...]:
        """Each with tensors of its own."""
        return (self._counts, self._undrained) if self._drained else (self._counts,)

    def drain(self, layers: Sequence[int], num_experts: int) -> Tensor:
        """Counts [M,E] since the last drain, zero for layers in which nothing was routed."""
        assert self._drained, "nothing was kept for a second reader"
        none = torch.zeros(num_experts + 1, dtype=torch.int64)
        counts = torch.stack([self._undrained[i].cpu().long() if i in self._undrained else none for i in layers])
        self._undrained = {}
        return counts[:, :num_experts].contiguous()  # collectives take the memory from the start as it is

    def take(self, total: Callable[[Tensor], Tensor] | None = None) -> RoutingStats | None:
        """The counts so far, on the CPU, which start again from zero; None if nothing was routed.

        Args:
            total: sums a tensor over all ranks, in place or not; every rank must then call this at the same step.
        """
        if not self._counts:
            return None
        layers = tuple(sorted(self._counts))
        counts = torch.stack([self._counts[i] for i in layers])
        self._counts = {}
        if total is not None:
            counts = total(counts)
        counts = counts.cpu()
        return RoutingStats(layers, counts[:, :-1], counts[:, -1])
