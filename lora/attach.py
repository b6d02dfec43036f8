"""Put adapter banks on a model, freeze the rest, and say what was matched."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from lora.config import BankAt, BankConfig
from lora.errors import AdapterError
from lora.expert_site import attach_expert_tensor
from lora.ffn_site import attach_ffn
from lora.first_pass import run_first
from lora.linear_site import attach_linear
from lora.methods import EXPERT_TENSORS, FFN
from lora.parallel_site import attach_beside
from lora.presets import bank_at, check_banks
from lora.prompt_router import join_layers
from lora.routers import BankRouter
from lora.sites import Frame, Match, global_size
from lora.targets import OUTPUT, ROUTER, Placed, Places, resolve
from moe.families import MoEBlock

__all__ = ["AttachReport", "Match", "attach", "format_table"]

Attacher = Callable[[nn.Module, Placed, BankAt, Frame], int]
_SITES: dict[str, Attacher] = {
    "linear": attach_linear,
    "experts": attach_expert_tensor,
    "ffn": attach_ffn,
    "parallel": attach_beside,
}
_KINDS = {
    "linear": "linear banks",
    "experts": "expert adapters",
    "ffn": "feed-forward banks",
    "parallel": "parallel banks",
}


@dataclass(frozen=True)
class AttachReport:
    """What ``attach`` did. Counts are of the whole model, not of this rank's share.

    ``trainable`` is keyed by kind: ``linear banks``, ``expert adapters``, ``feed-forward banks``, ``parallel banks``,
    ``bank routers``.
    """

    matches: tuple[Match, ...]
    trainable: dict[str, int]
    frozen: int


def attach(
    model: nn.Module,
    banks: Mapping[str, BankConfig],
    blocks: Sequence[MoEBlock],
    *,
    layout_ep: int = 1,
    seed: int = 0,
    sites: Mapping[str, Attacher] | None = None,
) -> AttachReport:
    """Freeze ``model`` and give it the adapters that ``banks`` describe; B starts at zero, so outputs stay.

    Call after the experts were converted and before the optimizer is built. Expert banks go to the ``adapter`` of
    every block's experts; the others to the modules that their targets name.

    Args:
        blocks: the model's MoE blocks, with experts that have an ``adapter`` attribute; none for a dense model.
        layout_ep: expert-parallel degree, which the experts must have been converted for.
        seed: of the factors that start at random.
        sites: what puts the bank of each site on a place, if not one adapter with a seed of its own.

    Raises AdapterError for contradictory banks, for a target that matches nothing (naming what is there), for a place
    that cannot take an adapter, and for a model that has one already.
    """
    check_banks(banks)
    for path, module in model.named_modules():
        if getattr(module, "adapter", None) is not None:
            raise AdapterError(f"{path} already has an adapter; attach all banks at once to a model without any")
    placed = resolve(banks, places_of(model, blocks))
    model.requires_grad_(False)
    frame = Frame(seed, layout_ep, {block.layer: block for block in blocks}, _hidden(model))
    layers, active = _layers(model), _experts_per_token(model, blocks)
    matches = []
    for place in placed:
        here = bank_at(banks[place.bank], place.layer, layers, _routed(frame, place.layer), active)
        count = (sites or _SITES)[place.site](model, place, here, frame)
        matches.append(Match(place.bank, place.host, place.target, count, place.site, here.num_experts, here.r))
    join_layers(model, ((place.bank, place.path) for place in placed if place.site == "linear"))
    run_first(model, (m for m in model.modules() if isinstance(m, BankRouter) and m.here.config.score == "states"))
    # New modules begin in training mode; in a model that generates, dropout must stay off.
    model.train(model.training)
    return _report(model, matches)


def places_of(model: nn.Module, blocks: Sequence[MoEBlock]) -> Places:
    """Where banks may go. Linear layers outside of the model's layers, and routers, are refused."""
    linear, ffn, refused = [], [], {}
    gates = {block.gate for block in blocks}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):
            if module in gates:
                refused[path] = ROUTER
            elif re.search(r"\.\d+\.", path) is None:
                refused[path] = OUTPUT
            else:
                linear.append(path)
        elif all(isinstance(getattr(module, name, None), nn.Linear) for name in FFN):
            ffn.append(path)
    experts = [f"{block.path}.experts.{tensor}" for block in blocks for tensor in EXPERT_TENSORS]
    return Places(tuple(linear), tuple(experts), tuple(ffn), tuple(block.path for block in blocks), refused)


def _routed(frame: Frame, layer: int) -> int:
    """The model's own experts in the layer, over all ranks."""
    if layer not in frame.blocks:
        return 0
    experts = frame.blocks[layer].module.experts
    return int(getattr(experts, "num_experts", 0) or experts.down_proj.shape[0])


def _experts_per_token(model: nn.Module, blocks: Sequence[MoEBlock]) -> int:
    """Of the model's own router; 0 if it has none, or does not say."""
    names = ("num_experts_per_tok", "top_k")
    homes = [getattr(model, "config", None), *(block.gate for block in blocks)] if blocks else []
    return next((n for home in homes for name in names if isinstance(n := getattr(home, name, None), int)), 0)


def _hidden(model: nn.Module) -> int:
    return getattr(getattr(model, "config", None), "hidden_size", None) or 0


def _layers(model: nn.Module) -> int:
    """The model's decoder layers; banks may give them different experts and ranks."""
    found = [re.search(r"layers\.(\d+)\.", f"{path}.") for path, _ in model.named_modules()]
    return max((int(match[1]) for match in found if match), default=-1) + 1


def _kind(path: str, sites: Mapping[str, str]) -> str:
    host, _, inner = path.rpartition(".adapter.")
    return "bank routers" if inner.startswith("router") else _KINDS[sites[host]]


def _report(model: nn.Module, matches: Sequence[Match]) -> AttachReport:
    sites = {match.path: match.site for match in matches}
    trainable: Counter[str] = Counter()
    frozen = 0
    for path, parameter in model.named_parameters():
        if parameter.requires_grad:
            trainable[_kind(path, sites)] += global_size([parameter])
        else:
            frozen += global_size([parameter])
    return AttachReport(tuple(matches), dict(trainable), frozen)


def format_table(report: AttachReport) -> str:
    """The report as lines for a terminal: one row per (bank, target), then the totals.

    ``E`` and ``r`` are the experts and the rank of one place, ``each`` what trains there; a range where layers differ.
    """
    rows: dict[tuple[str, str], list[Match]] = {}
    for match in report.matches:
        rows.setdefault((match.bank, match.target), []).append(match)
    cells = [("bank", "site", "target", "places", "E", "r", "each", "trainable", "first match")]
    for (bank, target), found in rows.items():
        spans = (_span(getattr(m, key) for m in found) for key in ("num_experts", "r", "parameters"))
        total = sum(m.parameters for m in found)
        cells.append((bank, found[0].site, target, str(len(found)), *spans, f"{total:,}", found[0].path))
    lines = [
        f"{bank:<14} {site:<9} {target:<16} {places:>6} {e:>7} {r:>7} {each:>12} {total:>12}  {first}"
        for bank, site, target, places, e, r, each, total, first in cells
    ]
    total = sum(report.trainable.values())
    kinds = ", ".join(f"{kind} {count:,}" for kind, count in report.trainable.items())
    share = 100 * total / max(1, total + report.frozen)
    lines.append(f"trainable {total:,} ({share:.2f} % of {total + report.frozen:,}): {kinds}; frozen {report.frozen:,}")
    return "\n".join(lines)


def _span(values: Iterable[int]) -> str:
    low, *_, high = sorted(found) if len(found := set(values)) > 1 else [*found, *found]
    return f"{low:,}" if low == high else f"{low:,}-{high:,}"
