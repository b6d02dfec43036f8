"""Banks beside MoE blocks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

from torch import nn

from lora.config import BankConfig
from lora.errors import AdapterError
from lora.parallel import put_beside
from lora.presets import bank_at, matches, targets_of
from lora.sites import Frame, Match, global_size
from moe.families import MoEBlock


def attach_beside(
    model: nn.Module, name: str, bank: BankConfig, blocks: Sequence[MoEBlock], frame: Frame
) -> list[Match]:
    """Put the bank beside every MoE block that its targets name; dense blocks have no place for it."""
    found = []
    for target in targets_of(bank):
        for block in blocks:
            if not matches(target, block.path):
                continue
            if getattr(block.module, "adapter", None) is not None:
                raise AdapterError(f"adapter.{name}: {block.path} already has a bank beside it; give each block to one")
            # The experts' own place and type; where they hold no weights, the gate's.
            home = next(chain(block.module.experts.parameters(), block.module.parameters()))
            hidden = int(model.config.hidden_size)
            here = bank_at(bank, block.layer, frame.layers, _count(block), frame.active)
            adapter = put_beside(
                block.module, block.module.experts, block.path, hidden, here,
                seed=frame.seed, device=home.device, dtype=home.dtype,
            )  # fmt: skip
            found.append(Match(name, block.path, target, global_size(adapter.parameters())))
    return found


def _count(block: MoEBlock) -> int:
    """Routed experts of the block, over all ranks."""
    experts = block.module.experts
    count = getattr(experts, "num_experts", None)
    return int(count) if count else int(experts.down_proj.shape[0])
