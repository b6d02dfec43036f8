"""MixLoRA (arXiv 2404.15159) one token and one expert at a time, from the paper's formulas."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Routed:
    """What the router of one layer decided for all tokens."""

    gates: list[dict[int, Tensor]] = field(default_factory=list)  # of each token, by expert
    wanted: list[list[int]] = field(default_factory=list)
    probabilities: list[Tensor] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)


def choose(x_TH: Tensor, router_EH: Tensor, rule: str, *, top_k: int = 2, top_p: float = 0.8, room: int = 0) -> Routed:
    """``rule``: top_k (renormalised), top_p (not) or switch, with ``room`` places at each expert."""
    routed, taken = Routed(), [0] * len(router_EH)
    for x_H in x_TH:
        logits_E = torch.stack([row_H @ x_H for row_H in router_EH])
        p_E = logits_E.exp() / logits_E.exp().sum()
        order = sorted(range(len(p_E)), key=lambda e: -p_E[e].item())
        if rule == "top_k":
            wanted = order[:top_k]
            gates = {e: p_E[e] / sum(p_E[i] for i in wanted) for e in wanted}
        elif rule == "top_p":
            wanted, total = [], 0.0
            for e in order:
                if total >= top_p:
                    break
                wanted.append(e)
                total += p_E[e].item()
            gates = {e: p_E[e] for e in wanted}
        else:
            wanted = order[:1]
            taken[wanted[0]] += 1
            gates = {wanted[0]: p_E[wanted[0]]} if taken[wanted[0]] <= room else {}
        routed.gates.append(gates)
        routed.wanted.append(wanted)
        routed.probabilities.append(p_E)
        routed.logits.append(logits_E)
    return routed


def expert(x_H: Tensor, e: int, w: Mapping[str, Tensor], s: float) -> Tensor:
    """``FFN_e(x)``; ``w`` holds the frozen weights (and biases) and the bank's factors by name."""

    def projection(name: str, v: Tensor) -> Tensor:
        y = w[f"{name}.weight"] @ v + s * (w[f"adapter.{name}.B"][e] @ (w[f"adapter.{name}.A"][e] @ v))
        return y + w[f"{name}.bias"] if f"{name}.bias" in w else y

    gate, up = projection("gate_proj", x_H), projection("up_proj", x_H)
    return projection("down_proj", gate / (1 + (-gate).exp()) * up)


def block(x_TH: Tensor, routed: Routed, w: Mapping[str, Tensor], s: float) -> Tensor:
    rows = []
    for x_H, gates in zip(x_TH, routed.gates, strict=True):
        y_H = torch.zeros_like(x_H)
        for e, g in gates.items():
            y_H = y_H + g * expert(x_H, e, w, s)
        rows.append(y_H)
    return torch.stack(rows)


def balance_loss(layers: list[Routed]) -> Tensor:
    """``E sum_e f_e P_e`` over the tokens of all layers together; f counts choices."""
    wanted = [e for routed in layers for chosen in routed.wanted for e in chosen]
    probabilities = torch.stack([p for routed in layers for p in routed.probabilities])
    tokens, experts = probabilities.shape
    return experts * sum(wanted.count(e) / tokens * probabilities[:, e].sum() / tokens for e in range(experts))


def z_loss(routed: Routed) -> Tensor:
    return sum(logits.exp().sum().log() ** 2 for logits in routed.logits) / len(routed.logits)
