"""What a bank costs at one place, from sizes alone (no torch here).

Notation: a frozen linear layer m -> n costs 2mn operations a token forward and 2mn for the gradient of its input: the
*floor* 4mn. A low-rank path of rank r costs 2r(m + n) forward and twice that backward: 6r(m + n).
"""

from __future__ import annotations

from dataclasses import dataclass

from lora.config import BankAt


@dataclass(frozen=True)
class Size:
    """Of one place.

    ``linear``: a layer ``ins -> outs``, in a model whose states are ``hidden`` wide. ``experts``: one stacked tensor of
    ``count`` experts, of which a token uses ``active``. ``ffn``: a block with ``ins`` outside and ``outs`` inside.
    ``parallel``: a block beside which a branch ``ins -> outs`` is put, with ``count`` experts of its own.
    """

    ins: int
    outs: int
    count: int = 0
    active: int = 0
    hidden: int = 0


@dataclass(frozen=True)
class Parameters:
    """Trainable numbers at one place: those of each of the model's experts, all counted, and those all ranks hold.

    ``frozen``: numbers of trained adapters, which the model holds and does not train."""

    of_experts: int
    shared: int
    frozen: int = 0

    @property
    def total(self) -> int:
        return self.of_experts + self.shared


def parameters(here: BankAt, size: Size, tensor: str = "") -> Parameters:
    """``tensor`` names the stacked tensor of a place of ``experts``."""
    full, experts, r = here.config, here.num_experts, here.r
    a, b = r * size.ins, size.outs * r
    if full.site == "experts":
        if full.share == "all":
            return Parameters(0, a + b)
        if full.share == "outer":
            own, common = (b, a) if tensor == "gate_up_proj" else (a, b)
            return Parameters(size.count * own, common)
        return Parameters(size.count * (a + b), 0)
    if full.site == "ffn":
        return Parameters(0, experts * 3 * (a + b) + _router(here, size.ins))
    if full.kind == "scale":
        return Parameters(0, experts * size.outs + _router(here, size.ins))
    factors = (1 if full.share == "A" else experts) * a + experts * (b + (r * r if full.mixer else 0))
    if full.adapters:
        directions = experts * size.ins if full.score == "arrow" else 0
        width = {"outputs": experts * size.outs, "states": size.hidden}.get(str(full.score), size.ins)
        return Parameters(0, _router(here, width) - directions, factors + directions)
    if full.router == "prompt":
        return Parameters(0, factors + size.hidden)
    return Parameters(0, factors + _router(here, size.hidden if full.score == "states" else size.ins))


def _router(here: BankAt, width: int) -> int:
    full, tasks = here.config, 0
    if full.router not in ("token", "task"):
        return 0
    if full.router == "task":
        width = full.task_embedding or 0
        tasks = (full.num_tasks or 0) * width
    more = (width + 1 if full.combine == "threshold" else 0) + (full.score == "outputs")
    more += here.num_experts * (full.score == "states")
    return here.num_experts * width + tasks + more


def floor(here: BankAt, size: Size) -> int:
    """Operations of the frozen place itself, for a token, forward and backward; 0 for a branch beside a block."""
    mn = 4 * size.ins * size.outs
    return {"linear": mn, "experts": mn * size.active, "ffn": 3 * mn, "parallel": 0}[str(here.config.site)]


def added(here: BankAt, size: Size) -> int:
    """Operations that the bank adds for a token, forward and backward.

    Banks on linear layers work in rank space on all their experts, whatever a token chose; banks on blocks on the
    experts that it chose, at most. A router of prompts is asked once for a sample, which is nothing for a token.
    """
    full, experts, r, both = here.config, here.num_experts, here.r, size.ins + size.outs
    router = 0
    if full.router == "token":
        router = (4 if full.score == "arrow" else 6) * size.ins * (experts + (full.combine == "threshold"))
    if full.score == "states":  # which get no gradient
        router = 4 * size.hidden * experts
    if full.score == "outputs":
        router = 4 * experts * r * size.ins + 6 * experts * experts * r
    if full.site == "experts":
        return 6 * r * both * size.active
    if full.site == "ffn":
        return router + 6 * r * both * 3 * chosen(here)
    if full.kind == "scale":
        return router + 6 * experts * size.outs
    if full.router == "base":
        return 6 * r * both * size.active
    ranks = (1 if full.share == "A" else experts) * size.ins + experts * (size.outs + (r if full.mixer else 0))
    return router + (4 if full.adapters else 6) * r * ranks


def chosen(here: BankAt) -> int:
    """Experts of the bank that a token uses, at most."""
    full = here.config
    if full.combine == "top_k":
        return min(full.top_k or 1, here.num_experts)
    return 1 if full.combine in ("static", "switch") else here.num_experts
