"""Banks on linear layers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from lora.config import BankConfig
from lora.errors import AdapterError
from lora.linear import RoutedLinear
from lora.presets import bank_at, layer_of, matches, targets_of
from lora.sites import Frame, Match, global_size
from moe.families import MoEBlock


def attach_linears(
    model: nn.Module, name: str, bank: BankConfig, blocks: Sequence[MoEBlock], frame: Frame
) -> list[Match]:
    """Replace every linear layer that the bank's targets name, routers excepted."""
    routers = {block.gate for block in blocks}
    linears = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and module not in routers
    }
    found = []
    for target in targets_of(bank):
        paths = [path for path in linears if matches(target, path)]
        if not paths:
            there = ", ".join(sorted({path.rpartition(".")[2] for path in linears})) or "no linear layer at all"
            raise AdapterError(f"adapter.{name}: target {target!r} matches no linear layer; the model has: {there}")
        for path in paths:
            if isinstance(linears[path], RoutedLinear):
                raise AdapterError(f"adapter.{name}: {path} already has a bank; give each linear to one")
            here = bank_at(bank, layer_of(path), frame.layers)
            routed = RoutedLinear(linears[path], here, path, seed=frame.seed)
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, routed)
            linears[path] = routed
            trained = [p for p in routed.adapter.parameters() if p.requires_grad]
            found.append(Match(name, path, target, global_size(trained)))
    return found
