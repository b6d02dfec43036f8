"""The arms: what is put on the base, with how many trainable parameters.

An arm is one or two banks of a preset whose sizes are still open; :func:`fitted` chooses them, layer by layer, so that
the whole has as many trainable parameters as asked for, routers included.

Shapes: G tasks, N rows of all tasks, M inputs, O outputs, R rank.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from lora.attach import attach
from lora.config import BankConfig
from lora.cost import Size
from lora.cost import parameters as count_parameters
from lora.errors import AdapterError
from lora.factors import stacked_init
from lora.presets import bank_at, expand, layer_of, matches

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FFN = ("gate_proj", "up_proj", "down_proj")
TOLERANCE = 0.02


@dataclass(frozen=True)
class Arm:
    """One row of the table.

    Attributes:
        banks: their sizes are placeholders.
        fits: the field that is fitted: ranks, or of banks without ranks the number of experts.
        names_task: whether it is told the task, which the others have to infer.
        oracle: one adapter per task, each with ``share`` of the parameters. It is told the task, of course.
        variant: not as published: what its name says differs.
        router_lr: learning rate of routers, in units of the factors'.
    """

    name: str
    banks: Mapping[str, BankConfig] = field(default_factory=dict)
    fits: Literal["r", "num_experts"] = "r"
    names_task: bool = False
    oracle: bool = False
    share: float = 1.0
    variant: bool = False
    router_lr: float = 1.0

    @property
    def routed(self) -> bool:
        return any(expand(bank).router != "none" for bank in self.banks.values())


def _linears(preset: Any, attention: Any = None, layers: str = "", **fields: Any) -> dict[str, BankConfig]:
    """A preset on the feed-forward linears, and it or another one on the attention's; apart, to be fitted finely."""
    fields = {"dropout": 0.0} | fields
    own = fields if attention is None else {"dropout": 0.0}
    return {
        "attention": BankConfig(attention or preset, targets=_within(layers, ATTENTION), **own),
        "ffn": BankConfig(preset, targets=_within(layers, FFN), **fields),
    }


def _within(layers: str, targets: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"layers.{layers}.*.{target}" for target in targets) if layers else targets


def _mixlora(preset: Any, **fields: Any) -> dict[str, BankConfig]:
    return {
        "attention": BankConfig("lora", targets=ATTENTION),
        "ffn": BankConfig(preset, dropout=0.0, **fields),
    }


def _loramoe_on_top() -> dict[str, BankConfig]:
    """Routed where the base knows the task, plain LoRA before."""
    return {
        "below": BankConfig("lora", targets=_within("[012]", ATTENTION + FFN)),
        "ffn": BankConfig("loramoe", targets=_within("3", FFN)),
    }


_TASK = {"num_tasks": 8, "rank_rule": "fixed", "task_embedding": 8}
_ARMS = (
    Arm("lora", _linears("lora")),
    Arm("one lora per task", _linears("lora"), oracle=True, share=1 / 8),
    Arm("one lora per task, 8x", _linears("lora"), oracle=True),
    Arm("lora, 8x", _linears("lora"), share=8.0, variant=True),
    Arm("rslora", _linears("rslora")),
    Arm("moslora", _linears("moslora")),
    Arm("mixlora", _mixlora("mixlora")),
    Arm("mixlora-dynamic", _mixlora("mixlora-dynamic")),
    Arm("mixlora-switch", _mixlora("mixlora-switch")),
    Arm("molora", _linears("molora")),
    Arm("mov", _linears("mov"), fits="num_experts"),
    Arm("loramoe", {"ffn": BankConfig("loramoe")}),
    Arm("mola", _linears("mola", num_experts=(2, 4, 6, 8))),
    Arm("moelora", _linears("moelora")),
    Arm("moelora-task", _linears("moelora-task", **_TASK), names_task=True),
    Arm("hydralora", _linears("hydralora")),
    Arm("adamole", _linears("adamole")),
    # Plain LoRA on what the routed ones below and loramoe have; whatever they gain over these is routing's.
    Arm("lora, feed-forward", {"ffn": BankConfig("lora", targets=FFN)}, variant=True),
    Arm("lora, last layer", _linears("lora", layers="3"), variant=True),
    # The base knows the task best in its last layer; see docs/measurements.md.
    Arm("mola, last layer", _linears("mola", layers="3", num_experts=8), variant=True),
    Arm("loramoe, last layer", {"ffn": BankConfig("loramoe", targets=_within("3", FFN))}, variant=True),
    Arm("loramoe, lora below", _loramoe_on_top(), variant=True),
)
ARMS = {arm.name: arm for arm in _ARMS}


def _sized(arm: Arm, sizes: Mapping[str, tuple[int, ...]]) -> dict[str, BankConfig]:
    """The arm's banks with these sizes in its layers; their updates are scaled as the preset's are at its own rank."""
    found = {}
    for name, bank in arm.banks.items():
        full = expand(bank)
        if arm.fits == "num_experts":
            found[name] = replace(bank, num_experts=sizes[name])
            continue
        alpha = full.alpha
        if full.scaling == "r":
            assert full.alpha is not None
            assert isinstance(full.r, int)
            alpha = full.alpha / full.r * sizes[name][0]
        found[name] = replace(bank, r=sizes[name], alpha=alpha)
    return found


def _sizes_of(model: LlamaForCausalLM, arm: Arm, size: int) -> dict[str, list[int]]:
    """Trainable parameters of each bank in each layer, if all sizes are ``size``."""
    layers = model.config.num_hidden_layers
    found = {name: [0] * layers for name in arm.banks}
    for name, bank in _sized(arm, dict.fromkeys(arm.banks, (size,) * layers)).items():
        for path, module in _places(model, bank):
            layer = layer_of(path)
            found[name][layer] += count_parameters(bank_at(bank, layer, layers), _size(module)).total
    return found


def _places(model: LlamaForCausalLM, bank: BankConfig) -> list[tuple[str, nn.Module]]:
    targets = expand(bank).targets
    return [(path, m) for path, m in model.named_modules() if any(matches(target, path) for target in targets)]


def _size(module: nn.Module) -> Size:
    linear = module if isinstance(module, nn.Linear) else module.gate_proj
    return Size(linear.in_features, linear.out_features)


def _total(counts: Mapping[str, list[int]]) -> int:
    return sum(map(sum, counts.values()))


def reference_size(model: LlamaForCausalLM) -> int:
    """The trainable parameters that all arms get: those of eight routed experts of rank 2 on every linear layer."""
    return _total(_sizes_of(model, Arm("reference", _linears("molora", num_experts=8)), 2))


def fitted(model: LlamaForCausalLM, arm: Arm, parameters: int) -> tuple[dict[str, BankConfig], int]:
    """The arm's banks with about ``parameters`` trainable ones, and how many they are.

    All layers have the same size or, in later ones, one more. Raises AdapterError if that comes no nearer than
    TOLERANCE.
    """
    target, layers = parameters * arm.share, model.config.num_hidden_layers
    counts = {1: _sizes_of(model, arm, 1)}
    if _total(counts[1]) > target:
        raise AdapterError(f"{arm.name}: has {_total(counts[1])} parameters at the least, not {target:.0f}")
    size, above = 1, 2
    while _total(counts.setdefault(above, _sizes_of(model, arm, above))) <= target:
        size, above = above, 2 * above
    while above - size > 1:
        middle = (size + above) // 2
        counts[middle] = _sizes_of(model, arm, middle)
        size, above = (middle, above) if _total(counts[middle]) <= target else (size, middle)
    smaller, larger = counts[size], counts[above]
    choices = []
    for cuts in itertools.product(range(layers + 1), repeat=len(arm.banks)):
        count = sum(
            sum(smaller[name][:cut]) + sum(larger[name][cut:]) for name, cut in zip(arm.banks, cuts, strict=True)
        )
        choices.append((abs(count - target), cuts, count))
    off, cuts, count = min(choices)
    if off > TOLERANCE * target:
        raise AdapterError(f"{arm.name}: {count} parameters are the nearest to {target:.0f} that its ranks allow")
    sizes = {name: (size,) * cut + (above,) * (layers - cut) for name, cut in zip(arm.banks, cuts, strict=True)}
    return _sized(arm, sizes), count


def put_on(model: LlamaForCausalLM, arm: Arm, banks: Mapping[str, BankConfig], tasks: int, seed: int) -> None:
    """Freeze the model and give it the arm's adapters."""
    if arm.oracle:
        _attach_per_task(model, banks, tasks, seed)
    else:
        attach(model, banks, [], seed=seed)


class LoraPerTask(nn.Module):
    """``y = W x + s * B_g A_g x`` for rows of G tasks, sorted by task, as many of each: G adapters that share nothing.

    Training them together is training each alone: their losses are added, and the optimizer works elementwise.
    """

    def __init__(self, base: nn.Linear, tasks: int, r: int, scale: float, key: str) -> None:
        super().__init__()
        self.base, self.scale = base, scale
        place = {"device": base.weight.device, "dtype": base.weight.dtype}
        self.A = nn.Parameter(stacked_init(tasks, 0, (r, base.in_features), f"{key}/A").to(**place))
        self.B = nn.Parameter(torch.zeros(tasks, base.out_features, r, **place))

    def forward(self, x: Tensor) -> Tensor:
        y_NO = F.linear(x, self.base.weight, self.base.bias)
        x_GNM = x.reshape(self.A.shape[0], -1, x.shape[-1])
        delta_GNO = x_GNM @ self.A.transpose(1, 2) @ self.B.transpose(1, 2)
        return y_NO + self.scale * delta_GNO.view_as(y_NO)


def _attach_per_task(model: LlamaForCausalLM, banks: Mapping[str, BankConfig], tasks: int, seed: int) -> None:
    model.requires_grad_(False)
    layers = model.config.num_hidden_layers
    for bank in banks.values():
        for path, module in _places(model, bank):
            here = bank_at(bank, layer_of(path), layers)
            parent, _, child = path.rpartition(".")
            adapted = LoraPerTask(module, tasks, here.r, here.scale, f"{seed}/{path}")
            setattr(model.get_submodule(parent), child, adapted)
