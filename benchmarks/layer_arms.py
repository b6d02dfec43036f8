"""The contestants of benchmarks.moe_layer: the same weights and routing through ours and others' expert layers.

Shapes: T tokens, K choices per token, E experts, H hidden, I intermediate.
"""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from moe.experts import Experts
from moe.families import find_moe_blocks
from moe.kernels.backend import BackendError
from trainer.engine import prepare_deepspeed

CAPACITY = 1.25  # of DeepSpeed's layer, which drops what is beyond it
_LARGEST_GATHER = 1 << 29  # bytes of weights that batched_mm copies, one expert's for each choice


@dataclass(frozen=True)
class Shape:
    """One layer's sizes and how many tokens it gets."""

    tokens: int
    hidden: int
    inner: int
    experts: int
    top_k: int

    @property
    def flops(self) -> int:
        """Forward and backward: six products of 2 T K H I each, thrice."""
        return 18 * self.tokens * self.top_k * self.hidden * self.inner

    def __str__(self) -> str:
        return f"T={self.tokens} H={self.hidden} I={self.inner} E={self.experts} K={self.top_k}"


@dataclass(frozen=True)
class Routed:
    """Rows and where a softmax router with renormalised top-k sends them."""

    x_TH: Tensor
    gate_EH: Tensor
    index_TK: Tensor
    weights_TK: Tensor


def route(shape: Shape, skewed: bool, device: torch.device, dtype: torch.dtype) -> Routed:
    """``skewed``: the experts' shares fall about like 1/rank (Zipf), in a shuffled order."""
    draw = torch.Generator().manual_seed(1)
    x_TH = torch.randn(shape.tokens, shape.hidden, generator=draw)
    x_TH[:, 0] = 1  # carries the router's bias, so that any layer with a linear router routes alike
    gate_EH = torch.randn(shape.experts, shape.hidden, generator=draw) * 1.28 / shape.hidden**0.5
    share_E = 1 / torch.arange(1, shape.experts + 1) if skewed else torch.ones(shape.experts)
    gate_EH[:, 0] = share_E.log()[torch.randperm(shape.experts, generator=draw)]
    x_TH, gate_EH = x_TH.to(device, dtype), gate_EH.to(device, dtype)
    scores_TE = (x_TH.float() @ gate_EH.float().T).softmax(-1)
    weights_TK, index_TK = scores_TE.topk(shape.top_k)
    weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
    return Routed(x_TH, gate_EH, index_TK, weights_TK.to(dtype))


@dataclass
class Arm:
    """``run(x, index, weights)`` -> [T,H]; ``parameters`` get gradients. ``exact``: nothing is dropped."""

    name: str
    run: Callable[[Tensor, Tensor, Tensor], Tensor]
    parameters: list[Tensor]
    exact: bool = True
    note: str = ""
    prepare: Callable[[Routed], None] = field(default=lambda routed: None)


class Skipped(Exception):
    """An arm that cannot run here, and why."""


def transformers_layer(shape: Shape, device: torch.device, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """A Qwen3-MoE model of one layer and a tiny vocabulary, and its experts."""
    config = AutoConfig.for_model(
        "qwen3_moe", vocab_size=32, hidden_size=shape.hidden, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, head_dim=16, moe_intermediate_size=shape.inner, num_experts=shape.experts,
        num_experts_per_tok=shape.top_k, intermediate_size=32, max_position_embeddings=32,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model, find_moe_blocks(model)[0].experts


def transformers_arm(model: nn.Module, experts: nn.Module, implementation: str, shape: Shape) -> Arm:
    gathered = shape.tokens * shape.top_k * 3 * shape.inner * shape.hidden * experts.down_proj.element_size()
    if implementation == "batched_mm" and gathered > _LARGEST_GATHER:
        raise Skipped(f"it would copy {gathered / 1e9:.1f} GB of weights, an expert's for each choice")

    def run(x_TH: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
        model.set_experts_implementation(implementation)
        return experts(x_TH, index_TK, weights_TK)

    return Arm(f"transformers {implementation}", run, list(experts.parameters()))


def our_arm(theirs: nn.Module, backend: str) -> Arm:
    experts = Experts(theirs.gate_up_proj, theirs.down_proj, layer=0)
    experts.wanted_backend = backend
    try:
        found = experts.backend
    except BackendError as error:
        raise Skipped(str(error)) from error
    return Arm(f"ours {backend}", experts, list(experts.parameters()), note=found.reason)


def scattermoe_arm(theirs: nn.Module, shape: Shape) -> Arm:
    if theirs.down_proj.device.type != "cuda":
        raise Skipped("it needs a CUDA device")
    try:
        mlp = importlib.import_module("scattermoe.mlp")
    except ImportError as error:
        raise Skipped(f"scattermoe cannot be imported: {error}") from error
    layer = mlp.GLUMLP(shape.hidden, shape.inner, shape.experts, shape.top_k, activation=nn.SiLU())
    layer = layer.to(theirs.down_proj.device, theirs.down_proj.dtype)
    with torch.no_grad():
        gate, up = theirs.gate_up_proj.chunk(2, dim=1)
        layer.experts.weight.copy_(torch.cat([up, gate], dim=1))  # it takes the second half for the gate
        layer.output_experts.weight.copy_(theirs.down_proj)
    return Arm("ScatterMoE", lambda x, index, weights: layer(x, weights, index), list(layer.parameters()))


class _Expert(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_up = nn.Linear(shape.hidden, 2 * shape.inner, bias=False)
        self.down = nn.Linear(shape.inner, shape.hidden, bias=False)

    def forward(self, x_NH: Tensor) -> Tensor:
        gate_NI, up_NI = self.gate_up(x_NH).chunk(2, dim=-1)
        return self.down(nn.functional.silu(gate_NI) * up_NI)


def deepspeed_arm(theirs: nn.Module, shape: Shape) -> Arm:
    """DeepSpeed's own layer. It routes by itself, with the same router, and drops beyond its capacity."""
    try:
        from moe.deepspeed_ep import MoE
    except ImportError as error:
        raise Skipped(f"DeepSpeed cannot be imported: {error}") from error
    device, dtype = theirs.down_proj.device, theirs.down_proj.dtype
    _join_alone(device)
    with torch.device(device):
        layer = MoE(
            shape.hidden, _Expert(shape), shape.experts, k=shape.top_k, capacity_factor=CAPACITY, min_capacity=4,
            use_rts=False, top2_2nd_expert_sampling=False,
        )  # fmt: skip
    layer.set_deepspeed_parallelism()
    layer = layer.to(dtype)
    with torch.no_grad():
        for expert, up, down in zip(
            layer.deepspeed_moe.experts.deepspeed_experts, theirs.gate_up_proj, theirs.down_proj, strict=True
        ):
            expert.gate_up.weight.copy_(up)
            expert.down.weight.copy_(down)

    def prepare(routed: Routed) -> None:
        layer.deepspeed_moe.gate.wg.weight.data = routed.gate_EH.float()

    def run(x_TH: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
        return layer(x_TH)[0]

    return Arm(
        f"DeepSpeed MoE cf={CAPACITY}", run, list(layer.parameters()), exact=False,
        note="routes itself, router included in its time", prepare=prepare,
    )  # fmt: skip


def _join_alone(device: torch.device) -> None:
    """DeepSpeed makes groups even for one process."""
    if dist.is_initialized():
        return
    with tempfile.NamedTemporaryFile(delete=False) as file:
        address = f"file://{file.name}.store"
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", init_method=address, rank=0, world_size=1)
    prepare_deepspeed()
