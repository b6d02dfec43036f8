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
    if not blocks:
        raise AdapterError(f"adapter.{name}: preset {bank.preset} stands beside MoE blocks, and this model has none")
    found = []
    for target in targets_of(bank):
        wanted = [block for block in blocks if matches(target, block.path)]
        if not wanted:
            there = ", ".join(sorted({block.path.rpartition(".")[2] for block in blocks}))
            raise AdapterError(f"adapter.{name}: target {target!r} matches no MoE block; the model has: {there}")
        for block in wanted:
            if getattr(block.module, "adapter", None) is not None:
                raise AdapterError(f"adapter.{name}: {block.path} already has a bank beside it; give each block to one")
            home = next(chain(block.gate.parameters(), block.module.parameters()))
            hidden = int(model.config.hidden_size)
            here = bank_at(bank, block.layer, frame.layers, _count(block), _active(model))
            adapter = put_beside(
                block.module, block.module.experts, block.path, hidden, here,
                seed=frame.seed, device=home.device, dtype=home.dtype,
            )  # fmt: skip
            found.append(Match(name, block.path, target, global_size(adapter.parameters())))
    return found


def _active(model: nn.Module) -> int:
    """Routed experts of a token; 0 if the model does not say."""
    names = ("num_experts_per_tok", "moe_topk", "top_k")
    return next((int(getattr(model.config, name)) for name in names if getattr(model.config, name, None)), 0)


def _count(block: MoEBlock) -> int:
    """Routed experts of the block, over all ranks."""
    experts = block.module.experts
    count = getattr(experts, "num_experts", None)
    return int(count) if count else int(experts.down_proj.shape[0])
