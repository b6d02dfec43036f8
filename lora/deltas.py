"""An adapter as low-rank updates of weights, whatever bank they come from: what every exporter works on.

Shapes: E experts, R rank, M inputs, O outputs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lora.config import BankConfig
from lora.errors import AdapterError
from lora.owners import owners_of
from lora.presets import expand, matches

FACTORS = ("A", "B", "C")
_ONE_LAYER = re.compile(r"\d|[*?\[]")  # in a target: it may name some layers only


@dataclass(frozen=True)
class Delta:
    """``scale * B_e A_e`` is added to a weight, or to expert e's part of a stacked one.

    Attributes:
        bank: whose it is.
        site: the bank's.
        place: path of the adapted module, e.g. ``model.layers.0.mlp.experts``.
        tensor: ``weight`` of a linear layer; the name of a stacked tensor; the projection inside a feed-forward block.
        scale: alpha / r, or alpha / sqrt r.
        alpha: what gives ``scale`` under the bank's own rule.
        rank_scaling: whether that rule is alpha / sqrt r.
        everywhere: whether the bank adapts the tensor of this name in every layer.
    """

    bank: str
    site: str
    place: str
    tensor: str
    a_ERM: Tensor
    b_EOR: Tensor
    scale: float
    alpha: float
    rank_scaling: bool
    everywhere: bool = False

    @property
    def experts(self) -> int:
        return self.a_ERM.shape[0]

    @property
    def r(self) -> int:
        return self.a_ERM.shape[1]

    @property
    def name(self) -> str:
        """Path of the adapted parameter; for messages, where it is none."""
        return f"{self.place}.{self.tensor}"

    def of(self, expert: int) -> Tensor:
        """The update of one expert [O, M] in fp32: the product of the factors, then the scale, as PEFT multiplies."""
        return (self.b_EOR[expert].float() @ self.a_ERM[expert].float()) * self.scale


def split_factor(path: str) -> tuple[str, str, str]:
    """(adapted module, name inside its adapter, factor) of a tensor's path; the factor is empty for routers and such.

    >>> split_factor("model.layers.3.mlp.experts.adapter.down_proj.A")
    ('model.layers.3.mlp.experts', 'down_proj', 'A')
    >>> split_factor("model.layers.3.self_attn.q_proj.adapter.router.weight")
    ('model.layers.3.self_attn.q_proj', 'router.weight', '')
    """
    place, _, inner = path.rpartition(".adapter.")
    parent, _, last = inner.rpartition(".")
    return (place, parent, last) if last in FACTORS else (place, inner, "")


def deltas_of(
    tensors: Mapping[str, Tensor],
    banks: Mapping[str, BankConfig],
    routed_experts: int | None = None,
    owners: Mapping[str, str] | None = None,
) -> list[Delta]:
    """The updates of all banks' factors, C multiplied into A in fp32, shared factors given to each expert.

    Args:
        tensors: by parameter path, over all experts; routers and the like are passed over.
        routed_experts: of a layer of the base model; needed where all factors of a bank on experts are shared.
        owners: the bank of each tensor; without them they are found by :func:`lora.owners.owners_of`.
    Raises AdapterError where one of the last two is needed and absent.
    """
    owners = owners or owners_of(tensors, banks)
    factors: dict[tuple[str, str], dict[str, Tensor]] = {}
    names: dict[tuple[str, str], str] = {}
    for path, tensor in tensors.items():
        place, inner, factor = split_factor(path)
        if factor:
            names[place, inner] = owners[path]
            factors.setdefault((place, inner), {})[factor] = tensor if tensor.dim() == 3 else tensor.unsqueeze(0)
    return [_delta(*where, found, names[where], banks, routed_experts) for where, found in factors.items()]


def _delta(
    place: str,
    inner: str,
    found: Mapping[str, Tensor],
    name: str,
    banks: Mapping[str, BankConfig],
    routed_experts: int | None,
) -> Delta:
    full = expand(banks[name])
    a, b = found["A"], found["B"]
    if "C" in found:
        a = torch.matmul(found["C"].float(), a.float())
    experts = max(a.shape[0], b.shape[0])
    if full.site == "experts" and experts == 1 and full.share == "all":
        if routed_experts is None:
            raise AdapterError(
                f"adapter.{name} ({full.preset}) shares one adapter among a layer's experts, and how many there are is "
                "not known here; name the base model's folder with --base"
            )
        experts = routed_experts
    r, alpha, by_root = a.shape[1], float(full.alpha or 0), full.scaling == "sqrt_r"
    scale = alpha / math.sqrt(r) if by_root else alpha / r
    tensor = "weight" if full.site == "linear" else inner.rpartition(".")[2]
    a, b = (factor.expand(experts, -1, -1) for factor in (a, b))
    adapted = place if full.site == "linear" else f"{place}.{tensor}"
    everywhere = any(matches(target, adapted) for target in full.targets if not _ONE_LAYER.search(target))
    return Delta(name, str(full.site), place, tensor, a, b, scale, alpha, by_root, everywhere)


def summed(delta: Delta, gates: Sequence[float] | Tensor | None = None) -> Delta:
    """``sum_e g_e B_e A_e`` as one update of rank E * R: A's rows stacked, B's columns side by side, times the gates.

    What the gates multiply is fp32, whatever the factors are.

    Args:
        gates: one for each expert; ones by default.
    """
    if delta.experts == 1 and gates is None:
        return delta
    b_EOR = delta.b_EOR
    if gates is not None:
        gates_E = torch.as_tensor(gates, dtype=torch.float32)
        b_EOR = b_EOR.float() * gates_E.view(-1, 1, 1)
    a_1XM = delta.a_ERM.flatten(0, 1).unsqueeze(0)
    b_1OX = b_EOR.permute(1, 0, 2).flatten(1).unsqueeze(0)
    growth = math.sqrt(delta.experts) if delta.rank_scaling else delta.experts
    return replace(delta, a_ERM=a_1XM, b_EOR=b_1OX, alpha=delta.alpha * growth)
