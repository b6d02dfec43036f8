"""PERFT: low-rank experts beside a whole MoE block.

``y = MoE(x) + sum_j g_j s B_j A_j x`` (PERFT, arXiv 2411.08212, section 3; 2508.02587): bottlenecks from the block's
input to its output, not on its linear layers. Their inner activation is the identity, as in LoRA, which is what surveys
of the paper say it mostly uses. This, the number of adapters M, their width and whether weights are renormalised could
not be verified in the paper itself.

* ``perft-r``: M adapters and a top-K router of their own.
* ``perft-e``: one adapter per expert of the block, ``g`` being the choices and weights that the block's own router
  gives its experts in the same forward pass.
* ``perft-d``: M adapters, all used, with weight one.
* ``perft-s``: one adapter for all tokens.

With expert parallelism every rank holds all adapters, those of perft-e too. They read the block's input and the choices
of its router, and both are on the token's own rank: sharded adapters would send every token a second time for products
of rank R. They count as data-parallel: gradients are averaged over all ranks, and they train the same at any degree.

Shapes: T tokens, K choices of each, E adapters (for perft-e the block's experts), N pairs sorted by adapter, H hidden,
R rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lora.config import BankAt
from lora.errors import AdapterError
from lora.factors import aligned, stacked_init
from lora.linear import LinearBank
from lora.pairs import collect_rows, spread_rows
from moe.assignment import Assignment, assign
from moe.context import current
from moe.kernels.grouped import choose_backend, grouped_linear
from moe.refs import TensorAddress


class FollowingBank(nn.Module):
    """One adapter per expert of the block, weighted as its router weights the experts (perft-e).

    ``A`` [E,R,H], ``B`` [E,H,R]; B starts at zero.
    """

    def __init__(self, path: str, hidden: int, here: BankAt, *, seed: int = 0, device=None, dtype=None) -> None:
        super().__init__()
        self.here, self.path, place = here, path, {"device": device, "dtype": dtype}
        start = stacked_init(here.num_experts, 0, (here.r, hidden), f"{seed}/{path}/A", here.config.a_init or "kaiming")
        self.A = nn.Parameter(start.to(**place))
        self.B = nn.Parameter(torch.zeros(here.num_experts, hidden, here.r, **place))
        for name in ("A", "B"):
            parameter = getattr(self, name)
            parameter.address = TensorAddress(f"{path}.{name}", tuple(parameter.shape))
        self.observe: Callable[[Tensor], None] | None = None

    def probes(self) -> list[tuple[str, nn.Parameter]]:
        """What must get a gradient wherever a token with loss has passed: B, for A has none while it is 0."""
        return [("B", self.B)]

    def forward(self, x_TH: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """The delta [T,H]. A choice out of range, which stands for none, counts nothing."""
        experts = self.here.num_experts
        real_TK = (index_TK >= 0) & (index_TK < experts)
        index_TK, gate_TK = index_TK.masked_fill(~real_TK, 0), weights_TK.masked_fill(~real_TK, 0.0)
        if self.observe is not None:
            hit_TKE = index_TK[..., None] == torch.arange(experts, device=index_TK.device)
            self.observe((hit_TKE * gate_TK.detach()[..., None]).sum(1))
        seen_TH = F.dropout(x_TH, self.here.config.dropout or 0.0, self.training)
        factors = self.A.to(x_TH.dtype), self.B.to(x_TH.dtype)
        assignment = assign(index_TK, experts)
        # Only x and the gates are kept for backward: the products of all pairs are N x H, twice.
        return checkpoint(
            _delta, seen_TH, gate_TK, *factors, assignment, self.here.scale,
            use_reentrant=False, preserve_rng_state=False,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"{self.here.config.preset}, experts={self.here.num_experts}, r={self.here.r}, scale={self.here.scale:g}"


def _delta(x_TH: Tensor, gate_TK: Tensor, a_ERH: Tensor, b_EHR: Tensor, assignment: Assignment, scale: float) -> Tensor:
    backend = choose_backend(x_TH.device, x_TH.dtype, a_ERH.shape[2]).name
    if backend != "loop":
        a_ERH, b_EHR = aligned(a_ERH, 1), aligned(b_EHR, 2)
    z_NR = grouped_linear(spread_rows(x_TH, assignment), a_ERH, assignment.counts_L, backend)
    gate_N1 = (assignment.spread(gate_TK) * scale).to(z_NR.dtype)[:, None]
    return collect_rows(grouped_linear(z_NR * gate_N1, b_EHR, assignment.counts_L, backend), assignment)


def put_beside(
    block: nn.Module, experts: nn.Module, path: str, hidden: int, here: BankAt, *, seed: int, device=None, dtype=None
) -> nn.Module:
    """Make the bank ``block.adapter`` and add what it computes to the block's output; returns the bank.

    The block stays what it is, so that its parameters keep their paths and its class its other outputs.
    """
    place = {"seed": seed, "device": device, "dtype": dtype}
    if here.config.router != "base":
        block.adapter = LinearBank(f"{path}.adapter", hidden, hidden, here, **place)
        block.register_forward_hook(_add_own, with_kwargs=True)
        return block.adapter
    block.adapter = FollowingBank(f"{path}.adapter", hidden, here, **place)
    routing: list[tuple[Tensor, Tensor]] = []

    def see(_experts: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        routing[:] = [_choices(args, kwargs)]

    def add(block: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        if not routing:
            raise AdapterError(f"{path}: its experts were not called, so there are no choices to follow")
        index_TK, weights_TK = routing.pop()
        if not current().adapted:
            return output
        x = _input(args, kwargs)
        delta_TH = block.adapter(x.reshape(-1, hidden), index_TK, weights_TK)
        return _with(output, lambda y: y + delta_TH.view_as(y))

    experts.register_forward_pre_hook(see, with_kwargs=True)
    block.register_forward_hook(add, with_kwargs=True)
    return block.adapter


def _add_own(block: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
    if not current().adapted:
        return output
    x = _input(args, kwargs)
    x_TH = x.reshape(-1, x.shape[-1])
    # The bank adds in place, and the block's own output may be kept for its backward.
    return _with(output, lambda y: block.adapter(x_TH, y.reshape(x_TH.shape).clone()).view_as(y))


def _choices(args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    given = dict(zip(("hidden_states", "top_k_index", "top_k_weights"), args, strict=False)) | kwargs
    return given["top_k_index"], given["top_k_weights"]


def _input(args: tuple, kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]


def _with(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Blocks return their output, or a tuple that begins with it."""
    if isinstance(output, tuple):
        return (change(output[0]), *output[1:])
    return change(output)
