"""Put adapter banks on a model, freeze the rest, and say what was matched."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from math import prod

import torch
from torch import nn

from lora.config import BankConfig
from lora.errors import AdapterError
from lora.experts import ExpertLoRA, ExpertSlice
from lora.linear import RoutedLinear
from lora.presets import check_banks, targets_of
from moe.families import MoEBlock
from moe.form import PLAIN


@dataclass(frozen=True)
class Match:
    """One place that a bank was put on; ``parameters`` counts trainable ones over all experts."""

    bank: str
    path: str
    target: str
    parameters: int


@dataclass(frozen=True)
class AttachReport:
    """What ``attach`` did. Counts are of the whole model, not of this rank's share.

    ``trainable`` is keyed by kind: ``expert adapters``, ``linear banks``, ``bank routers``.
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
) -> AttachReport:
    """Freeze ``model`` and give it the adapters that ``banks`` describe; B starts at zero, so outputs stay.

    Call after the experts were converted and before the optimizer is built. Expert banks go to the
    ``adapter`` of every block's experts; routed banks replace matching linears in place.

    Args:
        blocks: the model's MoE blocks, with experts that have an ``adapter`` attribute.
        layout_ep: expert-parallel degree, which the experts must have been converted for.
        seed: of the factors that start at random.

    Raises AdapterError for contradictory banks, for a target that matches nothing (naming what is
    there) and for experts that cannot take an adapter.
    """
    check_banks(banks)
    model.requires_grad_(False)
    matches: list[Match] = []
    expert_banks = {name: bank for name, bank in banks.items() if bank.preset == "expert-lora"}
    if expert_banks:
        for block in blocks:
            matches += _attach_experts(block, expert_banks, layout_ep, seed)
    routers = {block.gate for block in blocks}
    for name, bank in banks.items():
        if bank.preset == "mola":
            matches += _attach_linears(model, name, bank, routers, seed)
    return _report(model, matches)


def _attach_experts(block: MoEBlock, banks: Mapping[str, BankConfig], layout_ep: int, seed: int) -> list[Match]:
    experts, path = block.module.experts, f"{block.path}.experts"
    if not hasattr(experts, "adapter"):
        raise AdapterError(
            f"{path} ({type(experts).__name__}) cannot take an adapter; convert the model first (moe.convert.convert)"
        )
    form = getattr(experts, "form", PLAIN)
    if form.transposed or form.interleaved:
        raise AdapterError(
            f"{path}: expert-lora is for experts with gate_up_proj [E,2I,H], gate rows first; this family's are "
            f"{'transposed' if form.transposed else 'interleaved'}; use preset mola on the attention's projections"
        )
    if experts.adapter is not None:
        raise AdapterError(f"{path} already has an adapter; attach all banks at once to a model without any")
    if experts.ep_size != layout_ep:
        raise AdapterError(f"{path} was converted for ep={experts.ep_size}, the adapter is for ep={layout_ep}")
    owners = {target: name for name, bank in banks.items() for target in targets_of(bank)}
    factors = {target: (banks[name].r, banks[name].alpha) for target, name in owners.items()}
    hidden, intermediate = _sizes(experts, path)
    # The weights' own place and type; where experts hold none, the gate's.
    home = next(chain(experts.parameters(), block.module.parameters()))
    local = experts.num_experts // experts.ep_size
    part = ExpertSlice(block.layer, experts.num_experts, experts.first_expert, local, experts.ep_size)
    experts.adapter = ExpertLoRA(
        f"{path}.adapter", part, hidden, intermediate, factors, seed=seed, device=home.device, dtype=home.dtype
    )
    return [
        Match(owners[target], path, target, _global_size(getattr(experts.adapter, target).parameters()))
        for target in factors
    ]


def _sizes(experts: nn.Module, path: str) -> tuple[int, int]:
    """(hidden, intermediate), from the weights or, where they are not held, from attributes."""
    down_LHI = getattr(experts, "down_proj", None)
    if isinstance(down_LHI, torch.Tensor) and down_LHI.dim() == 3:
        return down_LHI.shape[1], down_LHI.shape[2]
    try:
        return experts.hidden_size, experts.intermediate_size
    except AttributeError:
        raise AdapterError(
            f"{path} ({type(experts).__name__}) has neither a stacked down_proj [L,H,I] "
            "nor hidden_size and intermediate_size"
        ) from None


def _attach_linears(model: nn.Module, name: str, bank: BankConfig, routers: set[nn.Module], seed: int) -> list[Match]:
    linears = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and module not in routers
    }
    matches = []
    for target in targets_of(bank):
        found = [path for path in linears if f".{path}".endswith(f".{target}")]
        if not found:
            there = ", ".join(sorted({path.rpartition(".")[2] for path in linears})) or "no linear layer at all"
            raise AdapterError(f"adapter.{name}: target {target!r} matches no linear layer; the model has: {there}")
        for path in found:
            if isinstance(linears[path], RoutedLinear):
                raise AdapterError(f"adapter.{name}: {path} already has a bank; give each linear to one")
            routed = RoutedLinear(linears[path], bank, path, seed=seed)
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, routed)
            linears[path] = routed
            matches.append(Match(name, path, target, _global_size(routed.adapter.parameters())))
    return matches


def _global_size(parameters: Iterable[nn.Parameter]) -> int:
    return sum(prod(p.address.global_shape) if hasattr(p, "address") else p.numel() for p in parameters)


def _kind(path: str) -> str:
    if path.endswith(".adapter.router"):
        return "bank routers"
    return "linear banks" if path.rpartition(".")[0].endswith(".adapter") else "expert adapters"


def _report(model: nn.Module, matches: Sequence[Match]) -> AttachReport:
    trainable: Counter[str] = Counter()
    frozen = 0
    for path, parameter in model.named_parameters():
        if parameter.requires_grad:
            trainable[_kind(path)] += _global_size([parameter])
        else:
            frozen += _global_size([parameter])
    return AttachReport(tuple(matches), dict(trainable), frozen)


def format_table(report: AttachReport) -> str:
    """The report as lines for a terminal: one row per (bank, target), then the totals."""
    rows: dict[tuple[str, str], list[Match]] = {}
    for match in report.matches:
        rows.setdefault((match.bank, match.target), []).append(match)
    lines = [f"{'bank':<14} {'target':<14} {'places':>6} {'trainable':>12}  first match"]
    lines += [
        f"{bank:<14} {target:<14} {len(found):>6} {sum(m.parameters for m in found):>12,}  {found[0].path}"
        for (bank, target), found in rows.items()
    ]
    total = sum(report.trainable.values())
    kinds = ", ".join(f"{kind} {count:,}" for kind, count in report.trainable.items())
    share = 100 * total / max(1, total + report.frozen)
    lines.append(f"trainable {total:,} ({share:.2f} % of {total + report.frozen:,}): {kinds}; frozen {report.frozen:,}")
    return "\n".join(lines)
