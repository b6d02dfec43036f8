"""The experts seam for training: stacked weights, a dispatcher, and room for an adapter.

Shapes: T tokens, K experts per token, E experts, L local experts, N rows sorted by local expert, H hidden,
I intermediate.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from moe.dispatch import AllToAllDispatch, LocalDispatch
from moe.kernels.grouped import Backend, choose_backend, grouped_linear


class Experts(nn.Module):
    """SwiGLU-like experts in the layout of transformers: gate rows first, then up rows.

    Args:
        gate_up_proj_L2IH, down_proj_LHI: the local experts' weights; the Parameter objects are kept, not copied.
        act: activation between the projections.
        layer: global layer index.
        first_expert: global index of local expert 0.
        num_experts: global number of experts.

    ``adapter``, if set, adds ``gate_up_delta(x_NH, counts_L)`` and ``down_delta(a_NI, counts_L)`` to the products.
    """

    def __init__(
        self,
        gate_up_proj_L2IH: nn.Parameter,
        down_proj_LHI: nn.Parameter,
        act: Callable[[Tensor], Tensor],
        *,
        layer: int,
        first_expert: int = 0,
        num_experts: int | None = None,
    ) -> None:
        # Not super(): the DeepSpeed subclass must skip DeepSpeed's own constructor.
        nn.Module.__init__(self)
        self.gate_up_proj = gate_up_proj_L2IH
        self.down_proj = down_proj_LHI
        self.act_fn = act
        self.layer = layer
        self.first_expert = first_expert
        self.num_local_experts = gate_up_proj_L2IH.shape[0]
        self.num_experts = num_experts or self.num_local_experts
        self.ep_size = self.num_experts // self.num_local_experts
        self.ep_group: torch.distributed.ProcessGroup | None = None
        self.adapter: nn.Module | None = None
        self._backend: Backend | None = None

    @property
    def backend(self) -> Backend:
        if self._backend is None:
            weight = self.gate_up_proj
            self._backend = choose_backend(weight.device, weight.dtype, *weight.shape[1:], self.down_proj.shape[-1])
        return self._backend

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """``hidden_states`` [T,H], ``top_k_index`` [T,K] (global ids), ``top_k_weights`` [T,K] -> [T,H]."""
        if self.ep_size == 1:
            dispatch = LocalDispatch(self.num_experts)
        else:
            assert self.ep_group is not None, "expert-parallel experts were not bound to a process group"
            dispatch = AllToAllDispatch(self.num_experts, self.ep_group)
        rows_NH, counts_L, plan = dispatch.scatter(hidden_states, top_k_index)
        return dispatch.gather(self.compute(rows_NH, counts_L), top_k_weights, plan)

    def compute(self, x_NH: Tensor, counts_L: Tensor) -> Tensor:
        """Every row through its local expert, unweighted."""
        backend = self.backend.name
        h_N2I = grouped_linear(x_NH, self.gate_up_proj, counts_L, backend)
        if self.adapter is not None:
            h_N2I = h_N2I + self.adapter.gate_up_delta(x_NH, counts_L)
        gate_NI, up_NI = h_N2I.chunk(2, dim=-1)
        a_NI = self.act_fn(gate_NI) * up_NI
        y_NH = grouped_linear(a_NI, self.down_proj, counts_L, backend)
        if self.adapter is not None:
            y_NH = y_NH + self.adapter.down_delta(a_NI, counts_L)
        return y_NH

    def extra_repr(self) -> str:
        last = self.first_expert + self.num_local_experts - 1
        return f"layer={self.layer}, experts={self.first_expert}..{last} of {self.num_experts}, ep={self.ep_size}"
