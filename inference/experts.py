"""The experts seam for inference: same call, same arithmetic, weights borrowed from a cache.

Shapes: T tokens, K experts per token, E experts, N = T*K rows sorted by expert, H hidden, I intermediate.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from inference.cache import ExpertCache


class OffloadedExperts(nn.Module):
    """Computes ``experts(hidden_states [T,H], top_k_index [T,K], top_k_weights [T,K]) -> [T,H]`` with borrowed weights.

    The rows of each expert are multiplied as transformers' eager loop does it, and a token's partial results are
    added in ascending order of expert. Neither depends on what is resident, so the bits do not either.
    It holds no weight of its own; ``adapter`` adds its scaled deltas to the frozen products.
    """

    first_expert = 0
    ep_size = 1

    def __init__(self, cache: ExpertCache, layer: int, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.cache = cache
        self.layer = layer
        self.num_experts = self.num_local_experts = cache.store.shape.num_experts
        self.hidden_size = cache.store.shape.hidden
        self.intermediate_size = cache.store.shape.intermediate
        self.act_fn = act
        self.adapter: nn.Module | None = None

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        T, K = top_k_index.shape
        # Rows in the order (expert, k, token), the one in which the eager loop gathers them.
        order_N = top_k_index.t().reshape(-1).argsort(stable=True)
        counts_E = torch.bincount(top_k_index.reshape(-1), minlength=self.num_experts)
        x_NH = hidden_states[order_N % T]
        y_NH = self._rows(x_NH, counts_E)
        y_NH = y_NH * top_k_weights.t().reshape(-1)[order_N, None]
        y_NH = y_NH.to(hidden_states.dtype)
        row_TK = torch.empty_like(order_N)
        row_TK[order_N] = torch.arange(T * K, device=order_N.device)
        row_TK = row_TK.view(K, T).t()
        # Rows are sorted by expert, so a token's row numbers sorted are its experts in ascending order.
        row_TK = row_TK.sort(dim=1).values
        out_TH = torch.zeros_like(hidden_states)
        for k in range(K):
            out_TH += y_NH[row_TK[:, k]]
        return out_TH

    def _rows(self, x_NH: Tensor, counts_E: Tensor) -> Tensor:
        """Every row through its expert, unweighted."""
        counts = counts_E.tolist()
        assert len(counts) == self.num_experts, f"layer {self.layer}: expert ids beyond {self.num_experts - 1}"
        ends = torch.tensor(counts).cumsum(0).tolist()
        a_NI = x_NH.new_empty(x_NH.shape[0], self.intermediate_size)
        y_NH = torch.empty_like(x_NH)
        delta_N2I = None if self.adapter is None else self.adapter.gate_up_delta(x_NH, counts_E)
        for group in self.cache.lend(self.layer, [e for e, n in enumerate(counts) if n]):
            for loan in group:
                rows = slice(ends[loan.expert] - counts[loan.expert], ends[loan.expert])
                gate_up = nn.functional.linear(x_NH[rows], loan.gate_up_2IH)
                if delta_N2I is not None:
                    gate_up = gate_up + delta_N2I[rows]
                gate, up = gate_up.chunk(2, dim=-1)
                a_NI[rows] = self.act_fn(gate) * up
                y_NH[rows] = nn.functional.linear(a_NI[rows], loan.down_HI)
        if self.adapter is not None:
            y_NH = y_NH + self.adapter.down_delta(a_NI, counts_E)
        return y_NH

    def extra_repr(self) -> str:
        return f"layer={self.layer}, experts={self.num_experts}, slots={self.cache.slots}"
