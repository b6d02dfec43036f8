"""A routed bank of low-rank experts on a plain linear layer (MoLA, arXiv 2402.08562).

Shapes: T tokens, M inputs, O outputs, E experts of the bank, K of them per token, R rank.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora.config import BankAt
from lora.factors import stacked_init, uniform_init
from moe.balance import inject, switch_loss
from moe.context import current
from moe.refs import TensorAddress


class LinearBank(nn.Module):
    """E low-rank experts and their token router; see :class:`RoutedLinear`."""

    def __init__(
        self,
        path: str,
        in_features: int,
        out_features: int,
        bank: BankAt,
        *,
        seed: int = 0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        self.top_k, self.scale = bank.config.top_k, bank.scale
        self.balance_coef = bank.config.router_aux_loss_coef
        key, place = f"{seed}/{path}", {"device": device, "dtype": dtype}
        a_ERM = stacked_init(bank.num_experts, 0, (bank.r, in_features), f"{key}/A")
        router_EM = uniform_init((bank.num_experts, in_features), f"{key}/router")
        self.A = nn.Parameter(a_ERM.to(**place))
        self.B = nn.Parameter(torch.zeros(bank.num_experts, out_features, bank.r, **place))
        self.router = nn.Parameter(router_EM.to(**place))
        for name in ("A", "B", "router"):
            parameter = getattr(self, name)
            parameter.address = TensorAddress(f"{path}.{name}", tuple(parameter.shape))
        self.observe: Callable[[Tensor], None] | None = None

    def probes(self) -> list[tuple[str, nn.Parameter]]:
        return [("B", self.B)]

    def gates(self, x_TM: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Dense gates [T, E], zero outside the K chosen; router logits [T, E]; choices [T, K]. fp32 or wider."""
        dtype = torch.promote_types(x_TM.dtype, torch.float32)
        logits_TE = F.linear(x_TM.to(dtype), self.router.to(dtype))
        top_TK, index_TK = logits_TE.topk(self.top_k, dim=-1)
        # Softmax over the chosen logits is softmax over all, renormalised over the chosen; but the rest
        # get a gradient of exactly zero, where the quotient leaves rounding noise that Adam would scale up.
        gate_TE = torch.zeros_like(logits_TE).scatter(1, index_TK, top_TK.softmax(dim=-1))
        return gate_TE, logits_TE, index_TK

    def forward(self, x_TM: Tensor) -> Tensor:
        """The scaled delta [T, O].

        The gates multiply in rank space, between A and B. That is exact because the sum over experts
        is linear, and it keeps [T, E*R] instead of E products [T, O].
        """
        experts, rank, _ = self.A.shape
        gate_TE, logits_TE, index_TK = self.gates(x_TM)
        if self.observe is not None:
            self.observe(gate_TE)
        z_TX = F.linear(x_TM, self.A.to(x_TM.dtype).flatten(0, 1))
        scaled_TE = (gate_TE * self.scale).to(x_TM.dtype)
        z_TX = (z_TX.unflatten(1, (experts, rank)) * scaled_TE.unsqueeze(-1)).flatten(1)
        b_OX = self.B.to(x_TM.dtype).permute(1, 0, 2).flatten(1)
        delta_TO = F.linear(z_TX, b_OX)
        if self.balance_coef and current().balance and torch.is_grad_enabled():
            # Divided by K: the published bank loss counts shares of choices, which sum to one.
            loss = switch_loss(logits_TE.softmax(dim=-1), index_TK)
            delta_TO = inject(delta_TO, self.balance_coef / self.top_k * loss)
        return delta_TO


class RoutedLinear(nn.Linear):
    """``y = W x + b + s * sum_{e in top-K} g_e B_e A_e x``, with ``g`` chosen per token by a router.

    Takes over the weight and bias of ``base``, the very parameters: their paths in the model, and
    with them their names in checkpoints and exports, stay as they were.
    """

    def __init__(self, base: nn.Linear, bank: BankAt, path: str, *, seed: int = 0) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight = base.weight
        self.register_parameter("bias", base.bias)
        self.adapter = LinearBank(
            f"{path}.adapter",
            base.in_features,
            base.out_features,
            bank,
            seed=seed,
            device=base.weight.device,
            dtype=base.weight.dtype,
        )

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y + self.adapter(x.reshape(-1, self.in_features)).view_as(y)
