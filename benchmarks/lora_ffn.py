"""MixLoRA cases of benchmarks.lora: one dense feed-forward block with 8 adapter experts, 2 for each token.

The peer is the loop that MixLoRA's own package and MoE-PEFT run, written anew: the outputs of the frozen gate and up
projections are shared by all experts of a token; each expert then slices them for its tokens, adds its low-rank terms
in fp32, and runs the frozen down projection again. Dropout and the balance loss are off in all arms.

Shapes: T tokens, H hidden, I intermediate, E experts, K choices, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from benchmarks.lora_case import Arm, Case, Claim
from lora.config import BankConfig
from lora.ffn import PROJECTIONS, MixedFfn
from lora.presets import bank_at

EXPERTS, TOP_K = 8, 2
# H, I, T, R. On a GPU the sizes of Llama-3.1-8B's block.
SHAPES = {
    "cpu": ((512, 1376, 512, 16), (512, 1376, 128, 8)),
    "qwen3": ((4096, 14336, 2048, 16), (4096, 14336, 512, 16)),
    "tiny": ((32, 48, 16, 4),),
}
LIMITS = {"cpu": 1 / 2, "qwen3": 1 / 3, "tiny": 1e9}  # of the loop's time: twice as fast, three times on a GPU


class PublishedLoop(nn.Module):
    """The published loop over the weights of one of our banks: separate low-rank matrices for each expert."""

    def __init__(self, ours: MixedFfn) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = ours.gate_proj, ours.up_proj, ours.down_proj
        self.act, self.scale = ours.act_fn, ours.adapter.here.scale
        self.router = nn.Parameter(ours.adapter.router.weight.detach().clone())
        for name in PROJECTIONS:
            factors = getattr(ours.adapter, name)
            for kind, stack in (("A", factors.A), ("B", factors.B)):
                each = (nn.Parameter(expert.clone()) for expert in stack.detach())
                self.register_module(f"{name}_{kind}", nn.ParameterList(each))

    def _low_rank(self, name: str, e: int, base: Tensor, x: Tensor) -> Tensor:
        a, b = getattr(self, f"{name}_A")[e], getattr(self, f"{name}_B")[e]
        delta = F.linear(F.linear(x.float(), a.float()), b.float()) * self.scale
        return base + delta.to(base.dtype)

    def forward(self, x_TH: Tensor) -> Tensor:
        p_TE = F.linear(x_TH.float(), self.router.float()).softmax(-1)
        weight_TK, index_TK = p_TE.topk(TOP_K, -1)
        weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True)
        mask_EKT = F.one_hot(index_TK, EXPERTS).permute(2, 1, 0)
        gate_TI, up_TI = self.gate_proj(x_TH), self.up_proj(x_TH)
        states = []
        for e in range(EXPERTS):
            _, rows = torch.where(mask_EKT[e])
            x = x_TH[rows]
            gate = self._low_rank("gate_proj", e, gate_TI[rows], x)
            up = self._low_rank("up_proj", e, up_TI[rows], x)
            h = self.act(gate) * up
            states.append(self._low_rank("down_proj", e, self.down_proj(h), h))
        y_TH = torch.zeros_like(x_TH)
        for e in range(EXPERTS):
            choice, rows = torch.where(mask_EKT[e])
            y_TH = y_TH.index_add(0, rows, states[e] * weight_TK[rows, choice, None].to(x_TH.dtype))
        return y_TH


def cases(config: str, device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    for hidden, inner, tokens, rank in SHAPES[config]:
        yield _case(hidden, inner, tokens, rank, device, dtype, LIMITS[config])


def _case(
    hidden: int, inner: int, tokens: int, rank: int, device: torch.device, dtype: torch.dtype, limit: float
) -> Case:
    torch.manual_seed(0)
    sizes = LlamaConfig(hidden_size=hidden, intermediate_size=inner, num_attention_heads=2)
    base = LlamaMLP(sizes).to(device=device, dtype=dtype).requires_grad_(False)
    bank = BankConfig("mixlora", r=rank, num_experts=EXPERTS, top_k=TOP_K, dropout=0.0, router_aux_loss_coef=0.0)
    ours = MixedFfn(base, bank_at(bank, 0, 1), "layers.0.mlp")
    for parameter in ours.adapter.parameters():
        nn.init.normal_(parameter, std=0.02)
    loop = PublishedLoop(ours)
    x_TH = torch.randn(tokens, hidden, device=device, dtype=dtype, requires_grad=True)
    dy_TH = torch.randn(tokens, hidden, device=device, dtype=dtype)
    arms = [
        _arm("published loop", loop, x_TH, dy_TH, "peer", lambda: _loop_gradients(loop)),
        _arm("frozen block", base, x_TH, dy_TH, "floor", dict),
        _arm("ours", ours, x_TH, dy_TH, "ours", lambda: _our_gradients(ours)),
    ]
    return Case(
        title=f"MixLoRA H{hidden} I{inner} E{EXPERTS} k{TOP_K} r{rank} T{tokens}, {str(dtype).removeprefix('torch.')}",
        arms=arms,
        claims=(Claim("time", "ours", "published loop", limit), Claim("saved", "ours", "published loop", 0.6)),
        tolerance=1e-4 if dtype == torch.float32 else 3e-2,
    )


def _arm(
    name: str, module: nn.Module, x_TH: Tensor, dy_TH: Tensor, role: str, gradients: Callable[[], Mapping[str, Tensor]]
) -> Arm:
    known = [*module.parameters(), x_TH]

    def step(check: bool) -> Mapping[str, Tensor]:
        for tensor in known:
            tensor.grad = None
        y_TH = module(x_TH)
        y_TH.backward(dy_TH)
        return {"y": y_TH, "dx": x_TH.grad, **gradients()} if check else {}

    return Arm(name, step, lambda: module(x_TH), known, role, exact=role != "floor")


def _our_gradients(ours: MixedFfn) -> dict[str, Tensor]:
    found = {"router": ours.adapter.router.weight.grad}
    for name in PROJECTIONS:
        factors = getattr(ours.adapter, name)
        found |= {f"{name}.A": factors.A.grad, f"{name}.B": factors.B.grad}
    return found


def _loop_gradients(loop: PublishedLoop) -> dict[str, Tensor]:
    found = {"router": loop.router.grad}
    for name in PROJECTIONS:
        for kind in ("A", "B"):
            each = getattr(loop, f"{name}_{kind}")
            found[f"{name}.{kind}"] = torch.stack([p.grad if p.grad is not None else torch.zeros_like(p) for p in each])
    return found
