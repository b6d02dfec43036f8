"""The experts seam for training: stacked weights, a dispatcher, and room for an adapter.

Shapes: T tokens, K experts per token, E experts, L local experts, R rows (tokens that are here, own or received),
N pairs of a row and a local expert, sorted by expert, H hidden, I intermediate.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from moe.assignment import Assignment
from moe.context import current
from moe.dispatch import EXCHANGES, Local, Routed, mix_everywhere
from moe.dispatch_choice import choose_dispatch
from moe.form import PLAIN, ExpertForm
from moe.guests import mix_with_guests
from moe.kernels.activation import between
from moe.kernels.backend import Adapted, Site, choose, passes
from moe.kernels.grouped import Backend, choose_backend, grouped_linear
from moe.kernels.minimal import minimal_mix
from moe.kernels.reference import reference_mix
from moe.kernels.stack import Stack
from moe.traffic import traffic_of


class Experts(nn.Module):
    """Gated experts in the layout of transformers.

    Args:
        gate_up_proj, down_proj: the local experts' weights, laid out as ``form`` says; the Parameter objects are kept,
            not copied.
        form: layout and activation.
        gate_up_bias, down_bias: [L,2I] and [L,H], for families that have them.
        layer: global layer index.
        first_expert: global index of local expert 0.
        num_experts: global number of experts.

    ``adapter``, if set, adds ``gate_up_delta(x_NH, counts_L)`` and ``down_delta(a_NI, counts_L)`` to the products. One
    that also has ``mix(x_RH, weights_RK, stack, assignment)`` computes the whole of frozen experts itself; one that
    holds several adapters has ``compute(experts, x_NH, assignment)`` in place of :meth:`compute`.

    With other ranks, ``dispatch`` is how tokens reach them (``auto``, ``all_to_all`` or ``deduplicated``), and
    ``meanwhile``, if set, is called in each forward pass while tokens are on their way.
    """

    def __init__(
        self,
        gate_up_proj: nn.Parameter,
        down_proj: nn.Parameter,
        form: ExpertForm = PLAIN,
        *,
        layer: int,
        gate_up_bias: nn.Parameter | None = None,
        down_bias: nn.Parameter | None = None,
        first_expert: int = 0,
        num_experts: int | None = None,
    ) -> None:
        # Not super(): the DeepSpeed subclass must skip DeepSpeed's own constructor.
        nn.Module.__init__(self)
        # Under transformers' names and in its order, so that state dicts and parameter lists fit.
        self.gate_up_proj = gate_up_proj
        if gate_up_bias is not None:
            self.gate_up_proj_bias = gate_up_bias
        self.down_proj = down_proj
        if down_bias is not None:
            self.down_proj_bias = down_bias
        self.form = form
        self.layer = layer
        self.first_expert = first_expert
        self.num_local_experts = gate_up_proj.shape[0]
        self.num_experts = num_experts or self.num_local_experts
        self.ep_size = self.num_experts // self.num_local_experts
        self.ep_group: torch.distributed.ProcessGroup | None = None
        self.dispatch = "auto"
        self.meanwhile: Callable[[], None] | None = None
        self.adapter: nn.Module | None = None
        self.wanted_backend = "auto"

    @property
    def hidden_size(self) -> int:
        return self.gate_up_proj.shape[1 if self.form.transposed else 2]

    @property
    def intermediate_size(self) -> int:
        return self.down_proj.shape[1 if self.form.transposed else 2]

    @property
    def biases(self) -> tuple[Tensor | None, Tensor | None]:
        """Of the two projections, [L,2I] and [L,H]."""
        return getattr(self, "gate_up_proj_bias", None), getattr(self, "down_proj_bias", None)

    @property
    def site(self) -> Site:
        weight, biased = self.gate_up_proj, self.biases[0] is not None
        sizes = (self.hidden_size, self.intermediate_size)
        return Site(weight.device, weight.dtype, *sizes, self.form, biased, self._adapted)

    @property
    def _added(self) -> nn.Module | None:
        """The adapter, but for passes that are the base model's alone."""
        return self.adapter if current().adapted else None

    @property
    def _adapted(self) -> Adapted:
        if self._added is None:
            return "no"
        trains = any(parameter.requires_grad for parameter in self._parameters.values() if parameter is not None)
        return "whole" if hasattr(self._added, "mix") and not trains else "pieces"

    @property
    def backend(self) -> Backend:
        """How these experts run and why: what ``wanted_backend`` names, or for ``auto`` what a probe finds.

        Raises BackendError if it cannot run here.
        """
        found = choose(self.site, self.wanted_backend)
        how = getattr(self.adapter, "reason", None)
        if how is None or found.name != "minimal":
            return found
        return Backend(found.name, f"{found.reason}; adapter: {how(self.site)}")

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """``hidden_states`` [T,H], ``top_k_index`` [T,K] (global ids), ``top_k_weights`` [T,K] -> [T,H]."""
        routed = Routed(hidden_states, top_k_index, top_k_weights)
        if self.ep_size == 1:
            return mix_everywhere(Local(self.num_experts), self.mix, routed)
        assert self.ep_group is not None, "expert-parallel experts were not bound to a process group"
        method = choose_dispatch(self.dispatch, top_k_index.shape[1], self.ep_size).name
        site = self.site
        backend = choose(site, self.wanted_backend).name
        if method == "deduplicated" and backend == "minimal" and self._added is None:
            inputs, traffic = (hidden_states, top_k_index, top_k_weights), traffic_of(self.ep_group, self.layer)
            return mix_with_guests(passes(site, backend), self._stack, *inputs, traffic, self.meanwhile)
        dispatcher = EXCHANGES[method](self.num_experts, self.ep_group)
        return mix_everywhere(dispatcher, self.mix, routed, self.meanwhile)

    @property
    def _stack(self) -> Stack:
        return Stack(self.gate_up_proj, self.down_proj, *self.biases, self.form)

    def mix(self, x_RH: Tensor, weights_RK: Tensor, assignment: Assignment) -> Tensor:
        """Each row's local experts, weighted and summed: [R,H]. A row none of whose choices is local gives zeros."""
        site = self.site
        name = choose(site, self.wanted_backend).name
        if name == "grouped_mm":
            x_NH, many = x_RH[assignment.row_N], getattr(self._added, "compute", None)
            y_NH = many(self, x_NH, assignment) if many else self.compute(x_NH, assignment.counts_L)
            weights_N = assignment.spread(weights_RK)
            return assignment.combine(y_NH * weights_N.unsqueeze(-1).to(y_NH.dtype))
        stack = self._stack
        if name == "reference":
            return reference_mix(x_RH, weights_RK, stack, assignment)
        if self._added is not None:
            return self.adapter.mix(x_RH, weights_RK, stack, assignment)
        return minimal_mix(passes(site, name), x_RH, weights_RK, stack, assignment)

    def compute(self, x_NH: Tensor, counts_L: Tensor) -> Tensor:
        """Every row through its local expert, unweighted, in differentiable pieces between which an adapter fits."""
        gate_up_bias, down_bias = self.biases
        h_N2I = self._product(x_NH, self.gate_up_proj, gate_up_bias, counts_L)
        if self._added is not None:
            h_N2I = h_N2I + self.adapter.gate_up_delta(x_NH, counts_L)
        a_NI = between(h_N2I, self.form)
        y_NH = self._product(a_NI, self.down_proj, down_bias, counts_L)
        if self._added is not None:
            y_NH = y_NH + self.adapter.down_delta(a_NI, counts_L)
        return y_NH

    def _product(self, x_NM: Tensor, weight_L: Tensor, bias_LO: Tensor | None, counts_L: Tensor) -> Tensor:
        weight_LOM = weight_L.transpose(1, 2) if self.form.transposed else weight_L
        products = choose_backend(x_NM.device, weight_L.dtype, *self.site.widths).name
        y_NO = grouped_linear(x_NM, weight_LOM, counts_L, products)
        if bias_LO is None:
            return y_NO
        return y_NO + bias_LO.repeat_interleave(counts_L, 0, output_size=y_NO.shape[0])

    def extra_repr(self) -> str:
        last = self.first_expert + self.num_local_experts - 1
        return f"layer={self.layer}, experts={self.first_expert}..{last} of {self.num_experts}, ep={self.ep_size}"
