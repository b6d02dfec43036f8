"""X-LoRA from its formula (arXiv 2402.07148, as PEFT has it), one token and one adapter at a time, in fp64.

The model is transformers' own, without a bank: the first pass asks it for its hidden states, in the second one hooks on
its linear layers add what the adapters do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn


def gates(w: Tensor, b: Tensor, states: Tensor, temperature: float, top_k: int, renormalise: bool):
    """By token: (weights, probabilities, chosen) of one module's adapters."""
    found = []
    for h in states:
        scores = [((w[e] * h).sum() + b[e]) / temperature for e in range(len(w))]
        powers = [score.exp() for score in scores]
        p = [power / sum(powers) for power in powers]
        chosen = sorted(range(len(p)), key=lambda e: -p[e].item())[:top_k]
        share = sum(p[e] for e in chosen) if renormalise else 1
        found.append(([p[e] / share if e in chosen else 0 * p[e] for e in range(len(p))], p, chosen))
    return found


def switch_loss(found: Sequence[tuple], real: Sequence[int], top_k: int) -> Tensor:
    """``E / k sum_e f_e P_e`` over the real tokens of one module."""
    experts, total = len(found[0][1]), 0
    for e in range(experts):
        f = sum(e in found[t][2] for t in real) / len(real)
        total = total + f * sum(found[t][1][e] for t in real) / len(real)
    return experts / top_k * total


def run(
    model: nn.Module, p: Mapping[str, Tensor], scale: float, tokens: Tensor, real: Sequence[int], temperature=1.0,
    top_k=99, renormalise=True, **inputs,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Logits, and the sum of the balance losses. ``p``: the banks' tensors by path."""
    with torch.no_grad():
        states = model(tokens, output_hidden_states=True, use_cache=False, **inputs).hidden_states[-1].flatten(0, 1)
    hooks, losses = [], []

    def adding(at: str):
        a, b = p[f"{at}.A"], p[f"{at}.B"]

        def hook(_module, args, y):
            x, k = args[0].flatten(0, -2), min(top_k, len(a))
            found = gates(p[f"{at}.router.weight"], p[f"{at}.router.bias"], states, temperature, k, renormalise)
            losses.append(switch_loss(found, real, k))
            rows = [
                sum(g[e] * scale * (b[e] @ (a[e] @ token)) for e in range(len(a)))
                for (g, _, _), token in zip(found, x, strict=True)
            ]
            return y + torch.stack(rows).view_as(y)

        return hook

    for path in [path for path in p if path.endswith(".A")]:
        place = path.removesuffix(".adapter.A")
        hooks.append(model.get_submodule(place).register_forward_hook(adding(f"{place}.adapter")))
    logits = model(tokens, use_cache=False, **inputs).logits
    for hook in hooks:
        hook.remove()
    return logits, sum(losses)
