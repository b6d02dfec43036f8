"""Cases of benchmarks.lora: LoRA on routed experts, ours beside PEFT's ``target_parameters`` on transformers' experts.

One layer's frozen experts, the same weights, factors (B is not zero) and routing for all. PEFT runs on a real one-block
model, with each of transformers' implementations that is in question; claims are about the faster one. Gradients are
those of x, of the scores, and of all factors.

Shapes: T tokens, K choices per token, E experts, H hidden, I intermediate, Q rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.layer_arms import Routed, Shape, route, transformers_layer
from benchmarks.lora_case import Arm, Case, Claim
from lora.config import BankConfig
from lora.experts import ExpertLoRA, ExpertSlice
from lora.fold import Way
from lora.methods import EXPERT_TENSORS
from lora.peft_format import pack_a, pack_b
from lora.presets import bank_at
from moe.experts import Experts

ALPHA = 16.0


@dataclass(frozen=True)
class Size:
    """A layer, the rank, and what is claimed of the adapted step over PEFT's and over the frozen one's."""

    shape: Shape
    r: int
    over_peft: float = 1.0
    over_frozen: float = 1.25
    saved: float = 0.25
    skewed: bool = False


SIZES = {
    "cpu": [
        Size(Shape(256, 256, 128, 64, 8), 8, over_peft=0.55, over_frozen=1.2),
        Size(Shape(1024, 256, 384, 16, 4), 8, over_frozen=1.2),
        Size(Shape(2048, 256, 128, 64, 8), 8, over_frozen=1.2),
        Size(Shape(256, 256, 128, 64, 8), 8, over_peft=0.55, over_frozen=1.2, skewed=True),
        Size(Shape(16, 256, 128, 64, 8), 8, over_peft=0.55, over_frozen=1.2),
        Size(Shape(8192, 256, 128, 16, 4), 8, over_frozen=1.2),
    ],
    "qwen3": [
        Size(Shape(4096, 2048, 768, 128, 8), 16, over_peft=0.6, saved=0.1),
        Size(Shape(1024, 2048, 768, 128, 8), 16, over_peft=0.6, saved=0.1),
        Size(Shape(16384, 2048, 768, 128, 8), 16, saved=0.25),
        Size(Shape(4096, 2048, 768, 128, 8), 16, over_peft=0.6, saved=0.1, skewed=True),
    ],
    "tiny": [Size(Shape(40, 16, 8, 4, 2), 3, 99.0, 99.0, 99.0)],
}


def cases(config: str, device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    for size in SIZES[config]:
        yield _case(size, device, dtype)


def _case(size: Size, device: torch.device, dtype: torch.dtype) -> Case:
    shape = size.shape
    model, theirs = transformers_layer(shape, device, dtype)
    model.requires_grad_(False)
    routed = route(shape, size.skewed, device, dtype)
    run = _Run(routed, torch.randn(routed.x_TH.shape, device=device, dtype=dtype))
    factors = _factors(shape, size.r, device, dtype)
    implementations = ("grouped_mm",) if device.type == "cuda" else ("eager", "grouped_mm")
    # Before PEFT wraps the experts' parameters.
    arms = [_frozen(theirs, run)]
    arms += [_frozen_theirs(model, theirs, name, run) for name in implementations]
    ways: tuple[Way, ...] = ("auto", "split", "fold")
    mine = [_ours(theirs, factors, size.r, way, run) for way in ways]
    arms += [_peft(model, theirs, factors, size, name, run) for name in implementations] + mine
    claims = [Claim("time", "ours auto", "frozen, ours", size.over_frozen)]
    for name in implementations:
        claims.append(Claim("time", "ours auto", f"PEFT, {name}", size.over_peft))
        claims.append(Claim("saved", "ours auto", f"PEFT, {name}", size.saved))
        claims.append(Claim("peak", "ours auto", f"PEFT, {name}", 1.0))
    per_expert = shape.tokens * shape.top_k / shape.experts
    skew = ", skewed" * size.skewed
    title = f"expert-lora {shape} r={size.r}{skew}: {per_expert:g} rows per expert"
    return Case(title, arms, claims, tolerance=0.03 if dtype == torch.bfloat16 else 1e-4)


def _factors(shape: Shape, r: int, device: torch.device, dtype: torch.dtype) -> dict[str, tuple[Tensor, Tensor]]:
    """A [E,Q,in] and B [E,out,Q] of both tensors."""
    draw = torch.Generator().manual_seed(2)
    sizes = {"gate_up_proj": (shape.hidden, 2 * shape.inner), "down_proj": (shape.inner, shape.hidden)}

    def one(*size: int) -> Tensor:
        return (torch.randn(shape.experts, *size, generator=draw) / size[-1] ** 0.5).to(device, dtype)

    return {name: (one(r, inputs), one(outputs, r) * 0.1) for name, (inputs, outputs) in sizes.items()}


@dataclass(frozen=True)
class _Run:
    """The inputs of all arms, and how a step is made of an arm's layer."""

    routed: Routed
    upstream_TH: Tensor

    def arm(self, name: str, call: Callable, trained: Mapping[str, nn.Parameter], known: list[Tensor],
            unpack: Callable[[str, Tensor], Tensor] = lambda name, grad: grad, **more) -> Arm:  # fmt: skip
        x, weights = (t.detach().clone().requires_grad_() for t in (self.routed.x_TH, self.routed.weights_TK))

        def forward() -> Tensor:
            return call(x, self.routed.index_TK, weights)

        def step(check: bool) -> dict[str, Tensor]:
            for leaf in (x, weights, *trained.values()):
                leaf.grad = None
            out = forward()
            out.backward(self.upstream_TH)
            if not check:
                return {}
            return {"out": out.detach(), "dx": x.grad, "d scores": weights.grad} | {
                f"d {name}": unpack(name, p.grad) for name, p in trained.items()
            }

        return Arm(name, step, forward, [x, weights, self.routed.index_TK, *trained.values(), *known], **more)


def _frozen(theirs: nn.Module, run: _Run) -> Arm:
    experts = Experts(theirs.gate_up_proj, theirs.down_proj, layer=0)
    return run.arm("frozen, ours", experts, {}, list(experts.parameters()), role="floor", exact=False)


def _frozen_theirs(model: nn.Module, theirs: nn.Module, implementation: str, run: _Run) -> Arm:
    # Without its children's later wrappers: PEFT puts these around the module, not into it.
    def call(x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        model.set_experts_implementation(implementation)
        return theirs(x, index, weights)

    name = f"frozen, transformers {implementation}"
    return run.arm(name, call, {}, list(theirs.parameters()), role="peer", exact=False)


def _ours(theirs: nn.Module, factors: Mapping, r: int, way: Way, run: _Run) -> Arm:
    experts = Experts(theirs.gate_up_proj, theirs.down_proj, layer=0)
    count, hidden, inner = experts.num_experts, experts.hidden_size, experts.intermediate_size
    adapter = experts.adapter = ExpertLoRA("layer.adapter", ExpertSlice(0, count, 0, count), hidden, inner)
    adapter.way = way
    place = {"device": theirs.down_proj.device, "dtype": theirs.down_proj.dtype}
    for name in EXPERT_TENSORS:
        adapter.add(name, bank_at(BankConfig("expert-lora", r=r, alpha=ALPHA), 0, 1, count), **place)
        with torch.no_grad():
            for mine, given in zip(getattr(adapter, name).parameters(), factors[name], strict=True):
                mine.copy_(given)
    trained = dict(adapter.named_parameters())
    return run.arm(f"ours {way}", experts, trained, [theirs.gate_up_proj, theirs.down_proj])


def _peft(model: nn.Module, theirs: nn.Module, factors: Mapping, size: Size, implementation: str, run: _Run) -> Arm:
    """PEFT's own wrappers around transformers' experts; each implementation has a model of its own."""
    from peft import LoraConfig, get_peft_model

    shape, dtype, device = size.shape, theirs.down_proj.dtype, theirs.down_proj.device
    twin, experts = transformers_layer(shape, device, dtype)
    twin.requires_grad_(False)
    for name in EXPERT_TENSORS:  # the same memory
        setattr(experts, name, getattr(theirs, name))
    config = LoraConfig(
        r=size.r, lora_alpha=ALPHA, target_modules=[], target_parameters=[f"mlp.experts.{n}" for n in EXPERT_TENSORS]
    )
    wrapped = get_peft_model(twin, config, autocast_adapter_dtype=False)
    outer = wrapped.base_model.model.model.layers[0].mlp.experts  # down_proj's, around gate_up_proj's
    trained = {}
    for name, wrapper in (("gate_up_proj", outer.base_layer), ("down_proj", outer)):
        for factor, given, pack in zip("AB", factors[name], (pack_a, pack_b), strict=True):
            parameter = getattr(wrapper, f"lora_{factor}")["default"].weight
            with torch.no_grad():
                parameter.copy_(pack(given))
            trained[f"{name}.{factor}"] = parameter

    def unpack(name: str, grad: Tensor) -> Tensor:
        if name.endswith("A"):
            return grad.view(shape.experts, size.r, -1)
        return grad.view(grad.shape[0], size.r, shape.experts).permute(2, 0, 1)

    def call(x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        twin.set_experts_implementation(implementation)
        return outer(x, index, weights)

    known = [theirs.gate_up_proj, theirs.down_proj]
    return run.arm(f"PEFT, {implementation}", call, trained, known, unpack, role="peer")
