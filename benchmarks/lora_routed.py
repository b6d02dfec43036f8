"""Cases of benchmarks.lora: banks on a linear layer, ours beside the loops over experts that were published, and PEFT.

The loops are re-stated here with the operations of the methods' own code: every expert a module call of its own, its
output built and weighted in [T, O]; MoLA's gathers each expert's tokens and adds them back. Same weights, router and
inputs for both; B is not zero. Gradients are those of x, of the router and of all factors. The floor is the frozen
linear layer, forward and backward to x. Plain LoRA runs beside PEFT itself.

``python -m benchmarks.lora --config cpu --case routed``

Shapes: T tokens, M inputs, O outputs, E experts, K choices per token, R rank, F experts with an A of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.lora_case import Arm, Case, Claim
from lora.config import BankConfig, Preset
from lora.linear import RoutedLinear
from lora.presets import bank_at


@dataclass(frozen=True)
class Size:
    """One layer and its bank, and what is claimed of our step's time over the peer's."""

    preset: Preset
    tokens: int
    inputs: int
    outputs: int
    experts: int
    r: int
    over_loop: float = 1.0

    @property
    def bank(self) -> BankConfig:
        return BankConfig(self.preset, num_experts=self.experts, r=self.r, alpha=32.0)


SIZES = {
    "cpu": [
        Size("loramoe", 512, 512, 1376, 8, 4, over_loop=0.5),
        Size("loramoe", 512, 512, 1376, 8, 16, over_loop=0.5),
        Size("loramoe", 128, 512, 1376, 8, 8, over_loop=0.5),
        Size("mola", 512, 512, 512, 8, 8),
        Size("hydralora", 512, 512, 1376, 3, 4),
        Size("lora", 512, 512, 1376, 1, 16),
    ],
    "qwen3": [
        Size("loramoe", 4096, 2048, 6144, 8, 4, over_loop=1 / 3),
        Size("loramoe", 4096, 2048, 6144, 8, 16, over_loop=1 / 3),
        Size("mola", 4096, 2048, 4096, 8, 8),
        Size("hydralora", 4096, 2048, 6144, 3, 4),
        Size("lora", 4096, 2048, 6144, 1, 16),
    ],
    "tiny": [
        Size("loramoe", 24, 12, 20, 4, 2, over_loop=99.0),
        Size("mola", 24, 12, 20, 4, 2, over_loop=99.0),
        Size("hydralora", 24, 12, 20, 3, 2, over_loop=99.0),
        Size("lora", 24, 12, 20, 1, 2, over_loop=99.0),
    ],
}


def cases(config: str, device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    for size in SIZES[config]:
        yield _case(size, device, dtype)


def _case(size: Size, device: torch.device, dtype: torch.dtype) -> Case:
    torch.manual_seed(0)
    base = nn.Linear(size.inputs, size.outputs, bias=False, device=device, dtype=dtype).requires_grad_(False)
    ours = RoutedLinear(base, bank_at(size.bank, 0, 1), "layers.0.up_proj")
    with torch.no_grad():
        ours.adapter.B.normal_(0, 0.05)
    peer, loop = ("PEFT", _PEFT(ours)) if size.preset == "lora" else ("published loop", _LOOPS[size.preset](ours))
    x_TM = torch.randn(size.tokens, size.inputs, device=device, dtype=dtype)
    upstream_TO = torch.randn(size.tokens, size.outputs, device=device, dtype=dtype)

    def arm(name: str, call: Callable[[Tensor], Tensor], trained: Mapping[str, nn.Parameter], **more) -> Arm:
        x = x_TM.clone().requires_grad_()

        def step(check: bool) -> dict[str, Tensor]:
            for leaf in (x, *trained.values()):
                leaf.grad = None
            out = call(x)
            out.backward(upstream_TO)
            if not check:
                return {}
            return {"out": out.detach(), "dx": x.grad} | _stacked({n: p.grad for n, p in trained.items()})

        return Arm(name, step, lambda: call(x), [base.weight, x, *trained.values()], **more)

    arms = [
        arm("frozen", base, {}, role="floor", exact=False),
        arm(peer, loop, loop.trained(), role="peer"),
        arm("ours", ours, dict(ours.adapter.named_parameters())),
    ]
    least = 1.0 if size.preset == "lora" else 0.5
    claims = [Claim("time", "ours", peer, size.over_loop), Claim("saved", "ours", peer, least)]
    title = f"{size.preset} T={size.tokens} {size.inputs} -> {size.outputs} E={size.experts} r={size.r}"
    return Case(title, arms, claims, tolerance=0.03 if dtype == torch.bfloat16 else 1e-4)


def _stacked(grads: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By our parameters' names, the loop's modules (``A.0.weight``) stacked."""
    found: dict[str, list[Tensor]] = {}
    for name, grad in grads.items():
        factor, _, _rest = name.partition(".")
        found.setdefault(f"d {factor}", []).append(grad)
    return {name: torch.stack(parts) if name != "d router" and parts[0].dim() == 2 else parts[0]
            for name, parts in found.items()}  # fmt: skip


class _Loop(nn.Module):
    """A frozen linear with E experts, each of two linear modules, and a router."""

    def __init__(self, ours: RoutedLinear) -> None:
        super().__init__()
        bank = ours.adapter
        self.frozen, self.scale, self.top_k = [ours.weight], bank.here.scale, bank.here.config.top_k
        self.A = nn.ModuleList(_linear(weight) for weight in bank.A)
        self.B = nn.ModuleList(_linear(weight) for weight in bank.B)
        self.router = _linear(bank.router.weight)

    def trained(self) -> dict[str, nn.Parameter]:
        return dict(self.named_parameters())

    def scores(self, x_TM: Tensor) -> Tensor:
        return F.linear(x_TM.float(), self.router.weight.float()).softmax(-1)


def _linear(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        linear.weight.copy_(weight)
    return linear


class LoRAMoELoop(_Loop):
    """arXiv 2312.09979: all experts' outputs, weighted."""

    def forward(self, x_TM: Tensor) -> Tensor:
        y_TO, scores_TE = F.linear(x_TM, self.frozen[0]), self.scores(x_TM).to(x_TM.dtype)
        for e, (a, b) in enumerate(zip(self.A, self.B, strict=True)):
            y_TO = y_TO + scores_TE[:, e : e + 1] * b(a(x_TM)) * self.scale
        return y_TO


class HydraLoRALoop(_Loop):
    """arXiv 2404.19245: the same with one A."""

    def forward(self, x_TM: Tensor) -> Tensor:
        y_TO, scores_TE = F.linear(x_TM, self.frozen[0]), self.scores(x_TM).to(x_TM.dtype)
        u_TR = self.A[0](x_TM)
        for e, b in enumerate(self.B):
            y_TO = y_TO + scores_TE[:, e : e + 1] * b(u_TR) * self.scale
        return y_TO


class MoLALoop(_Loop):
    """arXiv 2402.08562: each expert's tokens are gathered, and its outputs added where they came from."""

    def forward(self, x_TM: Tensor) -> Tensor:
        y_TO, scores_TE = F.linear(x_TM, self.frozen[0]), self.scores(x_TM)
        weights_TK, index_TK = scores_TE.topk(self.top_k, dim=-1)
        weights_TK = (weights_TK / weights_TK.sum(-1, keepdim=True)).to(x_TM.dtype)
        mask_EKT = F.one_hot(index_TK, len(self.A)).permute(2, 1, 0)
        delta_TO = torch.zeros_like(y_TO)
        for e, (a, b) in enumerate(zip(self.A, self.B, strict=True)):
            choice_N, token_N = torch.where(mask_EKT[e])
            rows_NO = b(a(x_TM[token_N])) * weights_TK[token_N, choice_N, None] * self.scale
            delta_TO = delta_TO.index_add(0, token_N, rows_NO)
        return y_TO + delta_TO


class _PEFT(nn.Module):
    """PEFT's own LoRA around the same frozen weight."""

    def __init__(self, ours: RoutedLinear) -> None:
        from peft import LoraConfig, inject_adapter_in_model

        super().__init__()
        rank, scale = ours.adapter.here.r, ours.adapter.here.scale
        base = nn.Linear(ours.in_features, ours.out_features, bias=False, device="meta")
        base.weight = ours.weight
        config = LoraConfig(r=rank, lora_alpha=scale * rank, target_modules=["up_proj"])
        self.model = inject_adapter_in_model(config, nn.ModuleDict({"up_proj": base}))
        for name, parameter in self.trained().items():
            with torch.no_grad():
                parameter.copy_(getattr(ours.adapter, name[0])[0])

    def trained(self) -> dict[str, nn.Parameter]:
        layer = self.model["up_proj"]
        return {f"{name}.0.weight": getattr(layer, f"lora_{name}")["default"].weight for name in "AB"}

    def forward(self, x_TM: Tensor) -> Tensor:
        return self.model["up_proj"](x_TM)


_LOOPS: dict[str, Callable[[RoutedLinear], _Loop]] = {
    "loramoe": LoRAMoELoop,
    "hydralora": HydraLoRALoop,
    "mola": MoLALoop,
}
