"""MixLoRA: a dense feed-forward block as a mixture of experts that share its frozen weights.

Shapes: T tokens, H hidden, I intermediate, E experts of the bank, K choices per token, N pairs of a token and an expert
it chose, sorted by expert, R rank.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from lora.config import BankAt
from lora.errors import AdapterError
from lora.factors import stacked_init
from lora.routers import BankRouter, Decision
from lora.shared_ffn import Scales, Stacks, mix
from moe.assignment import Assignment, assign
from moe.context import current
from moe.form import ExpertForm
from moe.kernels.activation import has_derivative
from moe.refs import TensorAddress

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


class Factors(nn.Module):
    """``A`` [E,R,in] and ``B`` [E,out,R] of one projection. B starts at zero."""

    def __init__(self, path: str, outs: int, ins: int, here: BankAt, *, seed: int, device=None, dtype=None) -> None:
        super().__init__()
        place = {"device": device, "dtype": dtype}
        start = stacked_init(here.num_experts, 0, (here.r, ins), f"{seed}/{path}/A", here.config.a_init or "kaiming")
        self.A = nn.Parameter(start.to(**place))
        self.B = nn.Parameter(torch.zeros(here.num_experts, outs, here.r, **place))
        for name in ("A", "B"):
            parameter = getattr(self, name)
            parameter.address = TensorAddress(f"{path}.{name}", tuple(parameter.shape))


class FfnBank(nn.Module):
    """E experts of low-rank terms for the three projections of one block, and their router; see :class:`MixedFfn`."""

    def __init__(
        self, path: str, hidden: int, inner: int, here: BankAt, *, seed: int = 0, device=None, dtype=None
    ) -> None:
        super().__init__()
        self.here, self.path = here, path
        place = {"seed": seed, "device": device, "dtype": dtype}
        for name in PROJECTIONS:
            outs, ins = (hidden, inner) if name == "down_proj" else (inner, hidden)
            self.add_module(name, Factors(f"{path}.{name}", outs, ins, here, **place))
        self.router = BankRouter(f"{path}.router", hidden, here, **place)
        self.observe: Callable[[Tensor], None] | None = None

    def probes(self) -> list[tuple[str, nn.Parameter]]:
        """What must get a gradient where a token with loss has passed: every B, as the rest has none while it is 0."""
        return [(f"{name}.B", getattr(self, name).B) for name in PROJECTIONS]

    def forward(self, x_TH: Tensor, u_TI: Tensor, v_TI: Tensor, form: ExpertForm) -> tuple[Tensor, Tensor, Tensor]:
        """(m [T,I], d [T,H]) as :func:`~lora.shared_ffn.mix` has them, and the sum [T] of each token's gates."""
        decision = self.router(x_TH)
        if self.observe is not None:
            self.observe(decision.gate_TE)
        assignment, gate_TK = _pairs(decision)
        dropout = self.here.config.dropout or 0.0
        scales, keep_NI = Scales(self.here.scale, self.here.scale), None
        if dropout and self.training:
            keep_NI = torch.empty(assignment.pair_N.numel(), u_TI.shape[1], dtype=torch.bool, device=x_TH.device)
            keep_NI.bernoulli_(1 - dropout)
            scales = Scales(self.here.scale, self.here.scale / (1 - dropout))
        seen_TH = F.dropout(x_TH, dropout, self.training)
        m_TI, d_TH = mix(seen_TH, u_TI, v_TI, gate_TK, self._stacks(), assignment, form, scales, keep_NI)
        return m_TI, d_TH, decision.gate_TE.sum(-1)

    def _stacks(self) -> Stacks:
        gate, up, down = (getattr(self, name) for name in PROJECTIONS)
        return Stacks(torch.cat([gate.A, up.A], dim=1), gate.B, up.B, down.A, down.B)

    def extra_repr(self) -> str:
        return f"{self.here.config.preset}, experts={self.here.num_experts}, r={self.here.r}, scale={self.here.scale:g}"


def _pairs(decision: Decision) -> tuple[Assignment, Tensor]:
    """The (token, expert) pairs to compute, and the gates [T,K] that go with them.

    Where tokens choose a varying number, K is E. On a CPU only what was chosen is computed; how much that is would have
    to be read back from a GPU, which therefore computes all, weighted by zero where nothing was chosen.
    """
    chosen_TE, experts = decision.chosen_TE, decision.gate_TE.shape[1]
    if decision.index_TK is not None:
        # Not gather, whose derivative scatters.
        is_TKE = decision.index_TK[..., None] == torch.arange(experts, device=chosen_TE.device)
        return assign(decision.index_TK, experts), (is_TKE * decision.gate_TE[:, None]).sum(-1)
    index_TE = torch.arange(experts, device=chosen_TE.device).expand_as(chosen_TE)
    if chosen_TE.is_cuda:
        return assign(index_TE, experts), decision.gate_TE
    pairs = int(chosen_TE.sum())
    return assign(index_TE.masked_fill(~chosen_TE, experts), experts, pairs), decision.gate_TE


class MixedFfn(nn.Module):
    """MixLoRA (arXiv 2404.15159, section 3) around one dense gated feed-forward block.

    ``y = sum_e g_e FFN_e(x)`` over the experts that the router chose, with

        FFN_e(x) = (W2 + s B2_e A2_e) (act((W1 + s B1_e A1_e) x) * (W3 + s B3_e A3_e) x)

    and ``s = alpha / r``. Presets, with the constants of the authors' code (E 8, K 2, r 16, alpha 32, dropout 0.05):

    * ``mixlora``: the K best of ``softmax(W x)``, renormalised. While B is zero the block computes what it did.
    * ``mixlora-dynamic``: the fewest whose probabilities reach 0.8, **not** renormalised, as in the authors' code: from
      the first step a token gets between 0.8 and 1 of its block's output.
    * ``mixlora-switch``: the best one, weighted by its probability, with a capacity, a z-loss and jitter. A token that
      finds no room gets nothing from the block, only the residual around it (Switch Transformer, arXiv 2101.03961).

    The balance loss is ``c E sum_e f_e P_e`` over all layers together, f counting the K choices (its optimum is K).
    Which c the paper used could not be verified: 0.001 is the code's default, its examples give 0.01.

    Dropout draws one mask of x per token, for gate and up of all its experts, and one of h per pair; the authors draw
    one per expert and projection. Both leave the expectation as it is.

    Takes over the modules of ``base``, so that the frozen parameters keep their paths.

    Raises AdapterError if ``base`` is no gated block of plain linear layers.
    """

    def __init__(self, base: nn.Module, here: BankAt, path: str, *, seed: int = 0) -> None:
        super().__init__()
        for name in PROJECTIONS:
            self.add_module(name, _plain(base, name, path))
        self.act_fn = getattr(base, "act_fn", None)
        self.form = ExpertForm(act=_activation(self.act_fn, path))
        weight_HI = self.down_proj.weight
        place = {"device": weight_HI.device, "dtype": weight_HI.dtype}
        self.adapter = FfnBank(f"{path}.adapter", *weight_HI.shape, here, seed=seed, **place)
        self.train(base.training)

    def forward(self, x: Tensor) -> Tensor:
        if not current().adapted:
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        x_TH = x.reshape(-1, x.shape[-1])
        down = self.down_proj
        m_TI, d_TH, sum_T = self.adapter(x_TH, self.gate_proj(x_TH), self.up_proj(x_TH), self.form)
        y_TH = torch.addmm(d_TH, m_TI, down.weight.T)
        if down.bias is not None:
            y_TH = y_TH + sum_T.to(y_TH.dtype)[:, None] * down.bias
        return y_TH.view_as(x)


def _plain(base: nn.Module, name: str, path: str) -> nn.Linear:
    linear = getattr(base, name, None)
    if type(linear) is not nn.Linear:
        raise AdapterError(f"{path}.{name} is a {type(linear).__name__} and no plain linear layer; leave the block out")
    return linear


def _activation(act: object, path: str) -> str:
    """An activation's name among those whose derivative the kernels know."""
    for name in ("silu", "gelu", "gelu_pytorch_tanh", "relu"):
        if type(ACT2FN[name]) is type(act) and has_derivative(ExpertForm(act=name)):
            return name
    what = "it has no act_fn" if act is None else f"its activation is {act!r}"
    raise AdapterError(f"{path}: {what}; known are silu, gelu, gelu_pytorch_tanh and relu: leave the block out")
