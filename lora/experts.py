"""LoRA on every routed expert, factored and stacked.

Shapes: L local experts, N rows sorted by local expert, H hidden, I intermediate, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora.config import BankAt
from lora.errors import AdapterError
from lora.factors import factored_delta, stacked_init
from moe.refs import TensorAddress


@dataclass(frozen=True)
class ExpertSlice:
    """Which experts an adapter serves: ``local`` of them from global ``first`` on, out of ``total``."""

    layer: int
    total: int
    first: int
    local: int
    ep: int = 1


class StackedFactors(nn.Module):
    """A [L, R, in] and B [L, out, R] of one stacked expert tensor; the delta is ``scale * B A x``."""

    def __init__(
        self,
        name: str,
        path: str,
        experts: ExpertSlice,
        in_features: int,
        out_features: int,
        *,
        r: int,
        scale: float,
        seed: int,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        self.scale = scale
        key = f"{seed}/layer {experts.layer}/{name}/A"
        a_LRM = stacked_init(experts.local, experts.first, (r, in_features), key)
        self.A = nn.Parameter(a_LRM.to(device=device, dtype=dtype))
        self.B = nn.Parameter(torch.zeros(experts.local, out_features, r, device=device, dtype=dtype))
        for factor in ("A", "B"):
            parameter = getattr(self, factor)
            parameter.address = TensorAddress(
                f"{path}.{factor}",
                tuple(parameter.shape),
                experts.layer,
                f"adapter.{name}.{factor}",
                experts.first,
                experts.total,
            )
            if experts.ep > 1:  # DeepSpeed reduces these over the ranks that hold the same experts
                parameter.allreduce = False
                parameter.group_name = f"ep_size_{experts.ep}"

    def delta(self, x_NM: Tensor, counts_L: Tensor) -> Tensor:
        return factored_delta(x_NM, self.A, self.B, counts_L, self.scale)


class ExpertLoRA(nn.Module):
    """The ``adapter`` of an experts module: LoRA (arXiv 2106.09685) per expert and tensor.

    ``gate_up_proj`` has one factor pair over both halves of its [2I] outputs (gate rows first), the
    layout in which PEFT adapts the same parameter. A starts kaiming-uniform from a stream of its own
    per (seed, layer, tensor, global expert), B starts at zero: the same values at any EP degree.

    Args:
        path: path of this module in the model, e.g. ``model.layers.3.mlp.experts.adapter``.
        experts: which experts it serves.
    """

    def __init__(self, path: str, experts: ExpertSlice, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.path, self.slice = path, experts
        self.layer, self.hidden, self.intermediate = experts.layer, hidden, intermediate
        self.num_experts, self.first_expert, self.ep_size = experts.total, experts.first, experts.ep

    def add(self, name: str, bank: BankAt, *, seed: int = 0, device=None, dtype=None) -> None:
        """Adapt the tensor ``name``. Raises AdapterError if it already is."""
        if hasattr(self, name):
            raise AdapterError(f"{self.path}.{name} is adapted already; give each tensor to one bank")
        sizes = {"gate_up_proj": (self.hidden, 2 * self.intermediate), "down_proj": (self.intermediate, self.hidden)}
        factors = StackedFactors(
            name,
            f"{self.path}.{name}",
            self.slice,
            *sizes[name],
            r=bank.r,
            scale=bank.scale,
            seed=seed,
            device=device,
            dtype=dtype,
        )
        self.add_module(name, factors)

    def probes(self) -> list[tuple[str, nn.Parameter]]:
        return [(f"{name}.B", factors.B) for name, factors in self.named_children()]

    def gate_up_delta(self, x_NH: Tensor, counts_L: Tensor) -> Tensor:
        """[N, 2I], scaled. ``counts_L``: int64 rows per local expert; the rows of x are in that order."""
        return self._delta("gate_up_proj", x_NH, counts_L, 2 * self.intermediate)

    def down_delta(self, a_NI: Tensor, counts_L: Tensor) -> Tensor:
        """[N, H], scaled; ``a_NI`` is the activated product of gate and up."""
        return self._delta("down_proj", a_NI, counts_L, self.hidden)

    def _delta(self, name: str, x: Tensor, counts_L: Tensor, out_features: int) -> Tensor:
        factors = getattr(self, name, None)
        if factors is None:
            return x.new_zeros(1, 1).expand(x.shape[0], out_features)
        return factors.delta(x, counts_L)

    def extra_repr(self) -> str:
        return f"layer={self.layer}, experts={self.num_experts}, first={self.first_expert}"
