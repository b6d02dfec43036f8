"""Gates that choose the best of a softmax, as one product and one launch where Triton runs.

transformers' own take six operations, which wait for each other on a GPU and do next to nothing.

Shapes: R rows, E experts, K choices.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe.kernels.probe import runs_triton

_SOFTMAX = ("Qwen2MoeTopKRouter", "Qwen3MoeTopKRouter", "OlmoeTopKRouter")


def hasten(gate: nn.Module, device: torch.device) -> None:
    """Has ``gate`` choose in fewer launches, if its kind is known and Triton runs on ``device``.

    The choice is the same up to ties, of which the first wins, and rounding.
    """
    known = type(gate).__name__ in _SOFTMAX and type(gate).__module__.startswith("transformers.")
    if known and runs_triton(device):
        gate.forward = _Hastened(gate)  # type: ignore[method-assign]


class _Hastened:
    def __init__(self, gate: Any) -> None:
        self._gate, self._choose = gate, importlib.import_module("inference.decode_kernels").choose

    def __call__(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(logits [R,E], scores [R,K], which [R,K])."""
        gate = self._gate
        logits_RE = F.linear(hidden_states.reshape(-1, gate.weight.shape[1]), gate.weight)
        return logits_RE, *self._choose(logits_RE, gate.top_k, shares=gate.norm_topk_prob)
