"""Soft merging of experts: one expert's worth of compute, with weights averaged by the router's probabilities.

SMEAR (Muqeeth et al. 2023, "Soft Merging of Experts with Adaptive Routing") merges once per sequence, from the mean of
the block's input over it: **a token's output depends on later tokens**. Lory (Zhong et al. 2024) is its causal form:
the sequence is cut into segments, and a segment's experts are merged by the mean of the segment before. Lory routes
the first segment by itself, which lets it see what it is to predict; here a vector that is learned stands before it,
at first zero, which merges all experts equally.

Shapes: B sequences, S positions, G segments of a sequence, H hidden, I intermediate, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe.families import MoEBlock
from moe.kernels.activation import between
from moe.soft import stacked_experts


class MergedExperts(nn.Module):
    """Replaces an MoE block: [B,S,H] -> [B,S,H].

    Args:
        segment: positions merged for at once, by those before; 0 merges for whole sequences, by themselves.
    """

    def __init__(self, block: MoEBlock, segment: int = 0) -> None:
        super().__init__()
        self.experts = stacked_experts(block)
        self.router = nn.Parameter(block.gate.weight.detach().clone())
        self.segment = segment
        if segment:
            self.before = nn.Parameter(torch.zeros_like(self.router[0]))

    def forward(self, x_BSH: Tensor) -> Tensor:
        length = x_BSH.shape[1]
        if not self.segment:
            return self._through(x_BSH[:, None], x_BSH.mean(1, keepdim=True))[:, 0]
        # Positions that fill up the last segment come after all others, and no segment is routed by the last one.
        x_BGSH = F.pad(x_BSH, (0, 0, 0, -length % self.segment)).unflatten(1, (-1, self.segment))
        means_BGH = torch.cat([self.before.expand(len(x_BSH), 1, -1), x_BGSH[:, :-1].mean(2)], 1)
        return self._through(x_BGSH, means_BGH).flatten(1, 2)[:, :length]

    def _through(self, x_BGSH: Tensor, routed_by_BGH: Tensor) -> Tensor:
        """Each segment through the expert that is merged for it."""
        logits_BGE = (routed_by_BGH @ self.router.T).float()
        probs_BGE = logits_BGE.softmax(-1).to(x_BGSH.dtype)
        gate_up = torch.einsum("bge,eih->bgih", probs_BGE, self.experts.gate_up_proj)
        down = torch.einsum("bge,ehi->bghi", probs_BGE, self.experts.down_proj)
        a_BGSI = between(x_BGSH @ gate_up.transpose(-1, -2), self.experts.form)
        return a_BGSI @ down.transpose(-1, -2)
