"""A bank of low-rank experts on a plain linear layer: every method whose delta is linear in what a router weighs.

Shapes: T tokens, M inputs, O outputs, E experts of the bank, R rank, F experts with an A of their own (E, or 1 where
they share it), X = E*R.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora.config import BankAt
from lora.factors import stacked_init
from lora.fused import refuses_fused
from lora.objectives import contrastive_loss, real_tokens
from lora.output_scores import output_scores
from lora.prompt_router import PromptRow
from lora.rank_space import RankSpace, ScaledOutput, add_low_rank
from lora.routers import BankRouter, Decision
from moe.balance import inject
from moe.context import current
from moe.refs import TensorAddress


class LinearBank(nn.Module):
    """E low-rank experts of one linear layer, and what weighs them; see :class:`RoutedLinear`.

    Parameters, as far as the bank has them: ``A`` [F, R, M], ``C`` [E, R, R], ``B`` [E, O, R], and those of
    ``router``. B starts at zero. Banks of kind ``scale`` have only B, [E, O, 1]. Those whose experts are trained
    adapters do not train A and B; :func:`lora.trained.fill` loads them.

    With ``router: prompt`` the router is one row of the layer's, and what it is worth comes from there.

    Which banks there are :mod:`lora.combinations` says.
    """

    def __init__(
        self,
        path: str,
        in_features: int,
        out_features: int,
        bank: BankAt,
        *,
        hidden: int = 0,
        seed: int = 0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        self.here, self.path = bank, path
        config, experts, rank = bank.config, bank.num_experts, bank.r
        key, place = f"{seed}/{path}", {"device": device, "dtype": dtype}
        scales = config.kind == "scale"
        self.A = self.C = None
        if not scales:
            own = 1 if config.share == "A" else experts
            self.A = nn.Parameter(stacked_init(own, 0, (rank, in_features), f"{key}/A", config.a_init).to(**place))
        if config.mixer:
            self.C = nn.Parameter(stacked_init(experts, 0, (rank, rank), f"{key}/C").to(**place))
        self.B = nn.Parameter(torch.zeros(experts, out_features, 1 if scales else rank, **place))
        if config.adapters:  # loaded by lora.trained; until then not a number, which cannot pass for a trained one
            for factor in (self.A, self.B):
                factor.requires_grad_(False).data.fill_(torch.nan)
        for name, parameter in self.named_parameters():
            parameter.address = TensorAddress(f"{path}.{name}", tuple(parameter.shape))
        self.router = None
        if config.router == "prompt":
            self.router = PromptRow(f"{path}.router", hidden, config, seed=seed, **place)
        elif config.router != "none":
            seen = {"outputs": experts * out_features, "states": hidden}.get(str(config.score), in_features)
            self.router = BankRouter(f"{path}.router", seen, bank, seed=seed, **place)
        self.plain = config.router == "none" and not scales and not config.mixer and experts == 1
        self.observe: Callable[[Tensor], None] | None = None

    def probes(self) -> list[tuple[str, nn.Parameter]]:
        """What must get a gradient wherever a token with loss has passed: B, for the others have none while it is 0.

        Where B is a trained adapter's, what weighs it must."""
        if self.B.requires_grad:
            return [("B", self.B)]
        weight = self.router.weight
        return [("router.weight", weight)] if weight.requires_grad else []

    def forward(self, x_TM: Tensor, y_TO: Tensor) -> Tensor:
        """``y_TO``, the frozen layer's output, plus the delta. It is changed in place: nobody else may hold it."""
        if self.plain and not (self.training and self.here.config.dropout):
            return add_low_rank(y_TO, x_TM, self.A.to(x_TM.dtype), self.B.to(x_TM.dtype), self.here.scale)
        if not self._refuses_fused(x_TM):
            soft = importlib.import_module("lora.soft_fused").SoftSpace
            y_TO, gate_TE = soft.apply(y_TO, x_TM, self.A, self.B, self.router.weight, self.here.scale)
            if self.observe is not None:
                self.observe(gate_TE)
            return y_TO
        decision = self._decision(x_TM)
        gate_TE = None if decision is None else decision.gate_TE
        if self.here.config.router == "prompt":
            gate_TE = self.router(len(x_TM))
        if self.observe is not None and gate_TE is not None:
            self.observe(gate_TE)
        b_EOR = self.B.to(x_TM.dtype)
        if self.A is None:
            return ScaledOutput.apply(y_TO, b_EOR.squeeze(-1), gate_TE)
        a_FRM = self.A.to(x_TM.dtype)
        c_ERR = None if self.C is None else self.C.to(x_TM.dtype)
        y_TO = RankSpace.apply(y_TO, x_TM, a_FRM, c_ERR, b_EOR, gate_TE, self.here.scale, self._dropout())
        return y_TO if decision is None else self._contrasted(y_TO, x_TM, decision)

    def _refuses_fused(self, x_TM: Tensor) -> str | None:
        """Why :mod:`lora.soft_fused` cannot run for these tokens; None if it can."""
        config = self.here.config
        if config.router != "token" or config.combine != "soft" or config.score != "linear" or config.kind == "scale":
            return "the fused kernels know soft banks with a router of tokens only"
        if config.mixer or (self.training and (config.dropout or config.jitter)):
            return "the fused kernels know no mixer, dropout or jitter"
        if (config.router_aux_loss_coef or config.z_loss_coef) and current().balance:
            return "the router's gates have a loss of their own"
        dtype = x_TM.dtype
        if not x_TM.shape[0] or self.B.dtype != dtype or self.router.weight.dtype != dtype:
            return "there is nothing to compute, or the bank has another dtype than its input"
        return refuses_fused(x_TM.device, dtype, self.here.r, self.here.num_experts * self.here.r)

    def _decision(self, x_TM: Tensor) -> Decision | None:
        if self.router is None or self.here.config.router == "prompt":
            return None
        if self.here.config.score != "outputs":
            return self.router(x_TM)
        scores_TE = output_scores(x_TM, self.A, self.B, self.here.scale, self.router.weight)
        return self.router.weigh(scores_TE, x_TM)

    def _dropout(self) -> tuple[float, int] | None:
        """Share of the input to drop, and the seed of which, drawn from the generator that checkpoints hold."""
        if not (self.training and self.here.config.dropout):
            return None
        return self.here.config.dropout, int(torch.randint(1 << 62, ()))

    def _contrasted(self, y_TO: Tensor, x_TM: Tensor, decision: Decision) -> Tensor:
        config, index_TK = self.here.config, decision.index_TK
        wanted = config.contrastive_coef and current().balance and torch.is_grad_enabled() and len(x_TM)
        if not wanted or index_TK is None:
            return y_TO
        factors = self.A, self.C, self.B
        loss = contrastive_loss(x_TM, index_TK, *factors, config.contrastive_temperature, real_tokens(len(x_TM)))
        return inject(y_TO, config.contrastive_coef * loss)

    def extra_repr(self) -> str:
        return f"{self.here.config.preset}, experts={self.here.num_experts}, r={self.here.r}, scale={self.here.scale:g}"


class RoutedLinear(nn.Linear):
    """``y = W x + b + s * sum_e g_e B_e C_e A_e x``, with g from the bank's router, or 1.

    Banks of kind ``scale`` compute ``y = (1 + sum_e g_e B_e) * (W x + b)``, elementwise.

    Takes over the weight and bias of ``base``, the very parameters: their paths in the model, and
    with them their names in checkpoints and exports, stay as they were.
    """

    def __init__(self, base: nn.Linear, bank: BankAt, path: str, *, hidden: int = 0, seed: int = 0) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight = base.weight
        self.register_parameter("bias", base.bias)
        self.adapter = LinearBank(
            f"{path}.adapter",
            base.in_features,
            base.out_features,
            bank,
            hidden=hidden,
            seed=seed,
            device=base.weight.device,
            dtype=base.weight.dtype,
        )

    def forward(self, x: Tensor) -> Tensor:
        if not current().adapted:
            return F.linear(x, self.weight, self.bias)
        x_TM = x.reshape(-1, self.in_features)
        y_TO = self.adapter(x_TM, F.linear(x_TM, self.weight, self.bias))
        return y_TO.view(*x.shape[:-1], self.out_features)
