"""Every method on a linear layer, from its paper's formula: one token and one expert at a time, in fp64.

``p`` holds a layer's parameters by name; ``s`` is alpha / r (alpha / sqrt r for rsLoRA). Gradients are autograd's,
through these loops. Nothing here is shared with the product but the names of the parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

Parameters = dict[str, Tensor]


@dataclass(frozen=True)
class Facts:
    """What a reference needs besides parameters. ``samples``: lists of a sample's real tokens, ``tasks`` by sample."""

    real: Sequence[int]
    samples: Sequence[Sequence[int]] = ()
    tasks: Sequence[int] = ()
    task_of: Sequence[int] = ()
    numbers: dict[str, float] = field(default_factory=dict)


@dataclass
class Result:
    """Outputs by token, and the sum of the auxiliary losses."""

    rows: list[Tensor]
    loss: Tensor


def softmax(logits: Tensor) -> Tensor:
    powers = [(score - logits.detach().max()).exp() for score in logits]
    return torch.stack([power / sum(powers) for power in powers])


def frozen(p: Parameters, token: Tensor) -> Tensor:
    y = p["weight"] @ token
    return y + p["bias"] if "bias" in p else y


def expert(p: Parameters, e: int, token: Tensor) -> Tensor:
    low = p["adapter.A"][e if len(p["adapter.A"]) > 1 else 0] @ token
    return p["adapter.B"][e] @ (p["adapter.C"][e] @ low if "adapter.C" in p else low)


def nothing(p: Parameters) -> Tensor:
    return p["weight"].new_zeros(())


# -- one expert --------------------------------------------------------------------------------------------------------


def lora(p: Parameters, x: Tensor, s: float, facts: Facts) -> Result:
    """arXiv 2106.09685, eq. 3; rsLoRA (arXiv 2312.03732) is the same with its own s."""
    return Result([frozen(p, token) + s * expert(p, 0, token) for token in x], nothing(p))


def moslora(p: Parameters, x: Tensor, s: float, facts: Facts) -> Result:
    """arXiv 2406.11909: a mixer between the factors."""
    rows = [frozen(p, token) + s * p["adapter.B"][0] @ (p["adapter.C"][0] @ (p["adapter.A"][0] @ token)) for token in x]
    return Result(rows, nothing(p))


def summed(p: Parameters, x: Tensor, s: float, facts: Facts) -> Result:
    """Several experts, all with weight 1 (PERFT-D's rule)."""
    experts = range(len(p["adapter.B"]))
    return Result([frozen(p, token) + sum(s * expert(p, e, token) for e in experts) for token in x], nothing(p))


# -- all experts, weighted ---------------------------------------------------------------------------------------------


def _soft(p: Parameters, x: Tensor, s: float) -> tuple[list[Tensor], list[Tensor]]:
    rows, gates = [], []
    for token in x:
        g = softmax(p["adapter.router.weight"] @ token)
        rows.append(frozen(p, token) + sum(s * g[e] * expert(p, e, token) for e in range(len(g))))
        gates.append(g)
    return rows, gates


def molora(p: Parameters, x: Tensor, s: float, facts: Facts) -> Result:
    """arXiv 2309.05444, section 2.3: the router's softmax weighs all experts' outputs."""
    return Result(_soft(p, x, s)[0], nothing(p))


def mov(p: Parameters, x: Tensor, s: float, facts: Facts) -> Result:
    """arXiv 2309.05444, section 2.2: the router's softmax merges vectors l = 1 + B, which then scale the output."""
    rows = []
    for token in x:
        g = softmax(p["adapter.router.weight"] @ token)
        merged = sum(g[e] * (1 + p["adapter.B"][e, :, 0]) for e in range(len(g)))
        rows.append(merged * frozen(p, token))
    return Result(rows, nothing(p))


def loramoe(p: Parameters, x: Tensor, s: float, facts: Facts) -> Result:
    """arXiv 2312.09979: soft, with the localized balancing constraint over samples and experts of two types."""
    rows, gates = _soft(p, x, s)
    experts, delta, entries = len(gates[0]), facts.numbers["delta"], []
    for sample, task in zip(facts.samples, facts.tasks, strict=True):
        for e in range(experts):
            importance = sum(gates[t][e] for t in sample)
            same = (e >= (experts + 1) // 2) == (task > 0)
            entries.append(importance * (1 + delta if same else 1 - delta))
    mean = sum(entries) / len(entries)
    variance = sum((z - mean) ** 2 for z in entries) / max(1, len(entries) - 1)
    return Result(rows, facts.numbers["balance"] * variance / (mean**2 + 1e-10))


def chosen_vectors(p: Parameters, x: Tensor, s: float, facts: Facts) -> Result:
    """MoV's vectors under a router that chooses: what their gates do not give is left to the frozen output."""
    rows = []
    for token in x:
        q = softmax(p["adapter.router.weight"] @ token)
        change = sum(q[e] * p["adapter.B"][e, :, 0] for e in best(q, int(facts.numbers["top_k"])))
        rows.append((1 + change) * frozen(p, token))
    return Result(rows, nothing(p))


def hydralora(p: Parameters, x: Tensor, s: float, facts: Facts) -> Result:
    """arXiv 2404.19245, eq. 5: one A, several B weighted by the router's softmax."""
    assert len(p["adapter.A"]) == 1
    return Result(_soft(p, x, s)[0], nothing(p))


def moelora_task(p: Parameters, x: Tensor, s: float, facts: Facts) -> Result:
    """MOELoRA (arXiv 2310.18339, eq. 6-9): the task's embedding decides the weights."""
    rows = []
    for t, token in enumerate(x):
        g = softmax(p["adapter.router.weight"] @ p["adapter.router.task_embedding"][facts.task_of[t]])
        rows.append(frozen(p, token) + sum(s * g[e] * expert(p, e, token) for e in range(len(g))))
    return Result(rows, nothing(p))


# -- chosen experts ----------------------------------------------------------------------------------------------------


def best(p: Tensor, count: int) -> list[int]:
    return sorted(range(len(p)), key=lambda e: -p[e].item())[:count]


def switch_form(scores: Sequence[Tensor], chosen: Sequence[Sequence[int]], real: Sequence[int], per_token: int):
    """``E sum_e f_e P_e`` over the real tokens; f in choices per token and ``per_token``."""
    experts, n = len(scores[0]), max(1, len(real))
    loss = torch.zeros((), dtype=torch.float64)
    for e in range(experts):
        f = sum(e in chosen[t] for t in real) / (n * per_token)
        loss = loss + experts * f * sum(scores[t][e] for t in real) / n
    return loss


def squared_normalizers(p: Parameters, x: Tensor, facts: Facts) -> Tensor:
    """The z-loss (ST-MoE, arXiv 2202.08906, eq. 5)."""
    logs = [(p["adapter.router.weight"] @ x[t]).exp().sum().log() for t in facts.real]
    return sum(log**2 for log in logs) / max(1, len(logs))


def _top_k(p: Parameters, x: Tensor, s: float, facts: Facts) -> tuple[list[Tensor], list[Tensor], list[list[int]]]:
    rows, scores, chosen = [], [], []
    for token in x:
        q = softmax(p["adapter.router.weight"] @ token)
        mine = best(q, int(facts.numbers["top_k"]))
        total = sum(q[e] for e in mine) if facts.numbers["renormalise"] else 1
        rows.append(frozen(p, token) + sum(s * q[e] / total * expert(p, e, token) for e in mine))
        scores.append(q)
        chosen.append(mine)
    return rows, scores, chosen


def mola(p: Parameters, x: Tensor, s: float, facts: Facts) -> Result:
    """arXiv 2402.08562, eq. 3-5: the best K, renormalised; f are shares of all choices."""
    rows, scores, chosen = _top_k(p, x, s, facts)
    loss = facts.numbers["balance"] * switch_form(scores, chosen, facts.real, int(facts.numbers["top_k"]))
    return Result(rows, loss + facts.numbers.get("z", 0) * squared_normalizers(p, x, facts))


def moelora(p: Parameters, x: Tensor, s: float, facts: Facts) -> Result:
    """arXiv 2402.12851: as MoLA, and outputs of one expert attract while those of different ones repel (InfoNCE)."""
    rows, scores, chosen = _top_k(p, x, s, facts)
    loss = facts.numbers["balance"] * switch_form(scores, chosen, facts.real, int(facts.numbers["top_k"]))
    pairs = [(e, expert(p, e, x[t])) for t in facts.real for e in chosen[t]]
    return Result(rows, loss + facts.numbers["contrastive"] * info_nce(pairs, facts.numbers["temperature"]))


def info_nce(pairs: Sequence[tuple[int, Tensor]], temperature: float) -> Tensor:
    anchors = []
    for i, (mine, u) in enumerate(pairs):
        others = [(e, v) for j, (e, v) in enumerate(pairs) if j != i]
        scores = [(u @ v) / (u @ u).sqrt() / (v @ v).sqrt() / temperature for _, v in others]
        positives = [score for score, (e, _) in zip(scores, others, strict=True) if e == mine]
        if positives:
            whole = sum(score.exp() for score in scores).log()
            anchors.append(sum(whole - score for score in positives) / len(positives))
    return sum(anchors) / len(anchors) if anchors else torch.zeros((), dtype=torch.float64)


def adamole(p: Parameters, x: Tensor, s: float, facts: Facts) -> Result:
    """arXiv 2405.00361, eq. 4-6: experts above a threshold that the token decides, weighted by how far."""
    rows, scores, chosen = [], [], []
    for token in x:
        q = softmax(p["adapter.router.weight"] @ token)
        bar = p["adapter.router.threshold_weight"][0] @ token + p["adapter.router.threshold_bias"][0]
        bar = (facts.numbers["max_threshold"] or 1 / len(q)) / (1 + (-bar).exp())
        mine = [e for e in range(len(q)) if q[e] >= bar]
        total = sum(q[e] - bar for e in mine)
        y = frozen(p, token)
        for e in mine:
            y = y + s * (q[e] - bar) / total * expert(p, e, token)
        rows.append(y)
        scores.append(q - bar)
        chosen.append(mine)
    return Result(rows, facts.numbers["balance"] * switch_form(scores, chosen, facts.real, 1))


def top_p(p: Parameters, x: Tensor, s: float, facts: Facts) -> Result:
    """The rule of MixLoRA-dynamic: the fewest experts that reach the share together."""
    rows, scores, chosen = [], [], []
    for token in x:
        q = softmax(p["adapter.router.weight"] @ token)
        mine: list[int] = []
        for e in best(q, len(q)):
            if not mine or sum(q[i] for i in mine) < facts.numbers["top_p"]:
                mine.append(e)
        total = sum(q[e] for e in mine) if facts.numbers["renormalise"] else 1
        rows.append(frozen(p, token) + sum(s * q[e] / total * expert(p, e, token) for e in mine))
        scores.append(q)
        chosen.append(mine)
    return Result(rows, facts.numbers["balance"] * switch_form(scores, chosen, facts.real, 1))


def switch(p: Parameters, x: Tensor, s: float, facts: Facts) -> Result:
    """The rule of MixLoRA-switch (arXiv 2101.03961, eq. 2-3): the best expert, weighted by p, if it has room."""
    rows, scores, chosen, taken = [], [], [], {}
    for t, token in enumerate(x):
        q = softmax(p["adapter.router.weight"] @ token)
        [mine] = best(q, 1)
        limit = max(1, math.ceil(facts.numbers["capacity"] * len(x) / len(q)))
        y = frozen(p, token)
        if t in facts.real and taken.get(mine, 0) < limit:
            taken[mine] = taken.get(mine, 0) + 1
            y = y + s * q[mine] * expert(p, mine, token)
        rows.append(y)
        scores.append(q)
        chosen.append([mine])
    return Result(rows, facts.numbers["balance"] * switch_form(scores, chosen, facts.real, 1))


REFERENCES: dict[str, Callable[[Parameters, Tensor, float, Facts], Result]] = {
    "lora": lora,
    "rslora": lora,
    "moslora": moslora,
    "molora": molora,
    "mov": mov,
    "loramoe": loramoe,
    "hydralora": hydralora,
    "moelora-task": moelora_task,
    "mola": mola,
    "moelora": moelora,
    "adamole": adamole,
    "summed": summed,
    "chosen vectors": chosen_vectors,
    "top_p": top_p,
    "switch": switch,
}
