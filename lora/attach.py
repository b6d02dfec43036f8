"""Put adapter banks on a model, freeze the rest, and say what was matched."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from lora.config import BankConfig
from lora.errors import AdapterError
from lora.expert_site import attach_experts
from lora.linear_site import attach_linears
from lora.presets import check_banks, expand
from lora.sites import Frame, Match, global_size
from moe.families import MoEBlock

__all__ = ["AttachReport", "Match", "attach", "format_table"]

Attacher = Callable[[nn.Module, str, BankConfig, Sequence[MoEBlock], Frame], list[Match]]
_SITES: dict[str, Attacher] = {"linear": attach_linears, "experts": attach_experts}


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

    Call after the experts were converted and before the optimizer is built. Expert banks go to the ``adapter`` of
    every block's experts; the others to the modules that their targets name.

    Args:
        blocks: the model's MoE blocks, with experts that have an ``adapter`` attribute; none for a dense model.
        layout_ep: expert-parallel degree, which the experts must have been converted for.
        seed: of the factors that start at random.

    Raises AdapterError for contradictory banks, for a target that matches nothing (naming what is
    there) and for experts that cannot take an adapter.
    """
    check_banks(banks)
    for block in blocks:
        if getattr(block.module.experts, "adapter", None) is not None:
            raise AdapterError(
                f"{block.path}.experts already has an adapter; attach all banks at once to a model without any"
            )
    model.requires_grad_(False)
    frame = Frame(_layers(model), seed, layout_ep)
    matches = [
        match
        for name, bank in banks.items()
        for match in _SITES[str(expand(bank).site)](model, name, bank, blocks, frame)
    ]
    return _report(model, matches)


def _layers(model: nn.Module) -> int:
    """The model's decoder layers; banks may give them different experts and ranks."""
    found = [re.search(r"layers\.(\d+)\.", f"{path}.") for path, _ in model.named_modules()]
    return max((int(match[1]) for match in found if match), default=-1) + 1


def _kind(path: str) -> str:
    if ".adapter.router." in path:
        return "bank routers"
    return "linear banks" if path.rpartition(".")[0].endswith(".adapter") else "expert adapters"


def _report(model: nn.Module, matches: Sequence[Match]) -> AttachReport:
    trainable: Counter[str] = Counter()
    frozen = 0
    for path, parameter in model.named_parameters():
        if parameter.requires_grad:
            trainable[_kind(path)] += global_size([parameter])
        else:
            frozen += global_size([parameter])
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
