"""LoRA on every routed expert, factored and stacked.

Shapes: L local experts, R rows, N pairs of a row and a local expert, sorted by expert, H hidden, I intermediate,
Q rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora.config import BankAt
from lora.errors import AdapterError
from lora.expert_mix import adapted_mix
from lora.expert_pairs import Pair, Pairs
from lora.factors import factored_delta, stacked_init, start_init
from lora.fold import Way, reason
from lora.fused import refuses_fused_experts
from lora.methods import EXPERT_TENSORS
from moe.assignment import Assignment
from moe.kernels.backend import Site
from moe.kernels.stack import Stack
from moe.refs import TensorAddress


@dataclass(frozen=True)
class ExpertSlice:
    """Which experts an adapter serves: ``local`` of them from global ``first`` on, out of ``total``."""

    layer: int
    total: int
    first: int
    local: int
    ep: int = 1


# share -> whose factors all experts of a layer have in common, by tensor; "outer" are the sides that face the
# hidden states, so that one product serves all experts of a token.
_SHARED: dict[str, dict[str, str]] = {
    "none": {"gate_up_proj": "", "down_proj": ""},
    "all": {"gate_up_proj": "AB", "down_proj": "AB"},
    "outer": {"gate_up_proj": "A", "down_proj": "B"},
}


class StackedFactors(nn.Module):
    """A [L, Q, in] and B [L, out, Q] of one stacked expert tensor; the delta is ``scale * B A dropout(x)``.

    A factor that all experts share has one entry in place of L. It is an ordinary parameter that every rank holds;
    the others belong to their experts, and DeepSpeed reduces them over the ranks that hold the same ones.
    """

    def __init__(
        self,
        name: str,
        path: str,
        experts: ExpertSlice,
        in_features: int,
        out_features: int,
        bank: BankAt,
        *,
        seed: int,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        self.scale, self.dropout, r = bank.scale, bank.config.dropout or 0.0, bank.r
        self.in_features, self.out_features = in_features, out_features
        self.shared = _SHARED[str(bank.config.share)][name]
        key, how = f"{seed}/layer {experts.layer}/{name}/A", bank.config.a_init or "kaiming"
        if "A" in self.shared:
            a_LQM = start_init((r, in_features), how, f"{key}/shared")[None]
        else:
            a_LQM = stacked_init(experts.local, experts.first, (r, in_features), key, how)
        self.A = nn.Parameter(a_LQM.to(device=device, dtype=dtype))
        stacked = 1 if "B" in self.shared else experts.local
        self.B = nn.Parameter(torch.zeros(stacked, out_features, r, device=device, dtype=dtype))
        for factor in ("A", "B"):
            self._address(factor, name, path, experts)

    def _address(self, factor: str, name: str, path: str, experts: ExpertSlice) -> None:
        parameter = getattr(self, factor)
        if factor in self.shared:
            parameter.address = TensorAddress(f"{path}.{factor}", tuple(parameter.shape))
            return
        parameter.address = TensorAddress(
            f"{path}.{factor}",
            tuple(parameter.shape),
            experts.layer,
            f"adapter.{name}.{factor}",
            experts.first,
            experts.total,
        )
        if experts.ep > 1:
            parameter.allreduce = False
            parameter.group_name = f"ep_size_{experts.ep}"

    @property
    def pair(self) -> Pair:
        return Pair(self.A, self.B, self.scale, self.dropout if self.training else 0.0)

    def delta(self, x_NM: Tensor, counts_L: Tensor) -> Tensor:
        if self.dropout and self.training:
            x_NM = F.dropout(x_NM, self.dropout)
        return factored_delta(x_NM, self.A, self.B, counts_L, self.scale)


class ExpertLoRA(nn.Module):
    """The ``adapter`` of an experts module: LoRA (arXiv 2106.09685) per expert and tensor.

    ``gate_up_proj`` has one factor pair over both halves of its [2I] outputs, in the family's own order (gate rows
    first, or alternating in gpt_oss): the layout in which PEFT adapts the same parameter. Whether the weight is stored
    transposed does not matter: A is always [.., in], B [out, ..].

    A starts kaiming-uniform (or as ``a_init`` says) from a stream of its own per (seed, layer, tensor, global expert),
    or per (seed, layer, tensor) where experts share it; B starts at zero: the same values at any EP degree.

    Args:
        path: path of this module in the model, e.g. ``model.layers.3.mlp.experts.adapter``.
        experts: which experts it serves.

    ``way`` settles how pairs are computed (see :mod:`lora.fold`); ``auto`` is by their rows.
    """

    def __init__(self, path: str, experts: ExpertSlice, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.path, self.slice = path, experts
        self.layer, self.hidden, self.intermediate = experts.layer, hidden, intermediate
        self.num_experts, self.first_expert, self.ep_size = experts.total, experts.first, experts.ep
        self.way: Way = "auto"

    def add(self, name: str, bank: BankAt, *, seed: int = 0, device=None, dtype=None) -> None:
        """Adapt the tensor ``name``. Raises AdapterError if it already is."""
        if hasattr(self, name):
            raise AdapterError(f"{self.path}.{name} is adapted already; give each tensor to one bank")
        sizes = {"gate_up_proj": (self.hidden, 2 * self.intermediate), "down_proj": (self.intermediate, self.hidden)}
        path, place = f"{self.path}.{name}", {"device": device, "dtype": dtype}
        self.add_module(name, StackedFactors(name, path, self.slice, *sizes[name], bank, seed=seed, **place))

    def mix(self, x_RH: Tensor, weights_RK: Tensor, stack: Stack, assignment: Assignment) -> Tensor:
        """Each row's local experts, adapted, weighted and summed: [R,H]. The stack's weights are taken as frozen."""
        up, down = (self._factors(name) for name in EXPERT_TENSORS)
        pairs = Pairs(up and up.pair, down and down.pair, self.way, self._seed())
        return adapted_mix(x_RH, weights_RK, stack, assignment, pairs)

    def _seed(self) -> int:
        """Of this pass's dropout. From the CPU's stream, whatever the device: nothing waits, and a recompute under
        activation checkpointing, which restores that stream, draws the same."""
        if not (self.training and any(factors.dropout for factors in self.children())):
            return 0
        return int(torch.randint(1 << 62, (), device="cpu"))

    def _factors(self, name: str) -> StackedFactors | None:
        return getattr(self, name, None)

    def reason(self, site: Site) -> str:
        """How the pairs of experts at ``site`` run, and why."""
        each = {name: factors for name, factors in self.named_children() if isinstance(factors, StackedFactors)}
        dropout, rank = max(f.dropout for f in each.values()), max(f.A.shape[1] for f in each.values())
        refused = refuses_fused_experts(site.device, site.dtype, site.form, site.biased, self.way, dropout, rank)
        if not refused:
            return f"{', '.join(each)} split, in Triton kernels that do what stands beside the products"
        ways = (f"{name} {reason(self.way, f.in_features, f.out_features, f.dropout)}" for name, f in each.items())
        return f"{', '.join(ways)}; {refused}"

    def probes(self) -> list[tuple[str, nn.Parameter]]:
        """What starts at zero and must get a gradient, by name in this module."""
        return [(f"{name}.B", factors.B) for name, factors in self.named_children()]

    def gate_up_delta(self, x_NH: Tensor, counts_L: Tensor) -> Tensor:
        """[N, 2I], scaled. ``counts_L``: int64 rows per local expert; the rows of x are in that order."""
        return self._delta("gate_up_proj", x_NH, counts_L, 2 * self.intermediate)

    def down_delta(self, a_NI: Tensor, counts_L: Tensor) -> Tensor:
        """[N, H], scaled; ``a_NI`` is the activated product of gate and up."""
        return self._delta("down_proj", a_NI, counts_L, self.hidden)

    def _delta(self, name: str, x: Tensor, counts_L: Tensor, out_features: int) -> Tensor:
        factors = self._factors(name)
        if factors is None:
            return x.new_zeros(1, 1).expand(x.shape[0], out_features)
        return factors.delta(x, counts_L)

    def extra_repr(self) -> str:
        return f"layer={self.layer}, experts={self.num_experts}, first={self.first_expert}"
