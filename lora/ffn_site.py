"""Banks on dense feed-forward blocks."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from lora.config import BankConfig
from lora.errors import AdapterError
from lora.ffn import PROJECTIONS, MixedFfn
from lora.presets import bank_at, layer_of, matches, targets_of
from lora.sites import Frame, Match, global_size
from moe.families import MoEBlock


def attach_ffns(model: nn.Module, name: str, bank: BankConfig, blocks: Sequence[MoEBlock], frame: Frame) -> list[Match]:
    """Replace every dense feed-forward block that the bank's targets name, shared experts too if they are named.

    With expert parallelism every rank holds the whole bank: the blocks and their tokens are on every rank.
    """
    found = []
    for target in targets_of(bank):
        dense = {path: module for path, module in model.named_modules() if is_ffn(module)}
        paths = [path for path in dense if matches(target, path)]
        for path in paths:
            if isinstance(dense[path], MixedFfn):
                raise AdapterError(f"adapter.{name}: {path} already has a bank; give each block to one")
            mixed = MixedFfn(dense[path], bank_at(bank, layer_of(path), frame.layers), path, seed=frame.seed)
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, mixed)
            found.append(Match(name, path, target, global_size(mixed.adapter.parameters())))
    return found


def is_ffn(module: nn.Module) -> bool:
    """Whether it is a gated feed-forward block as Llama, Mistral and Qwen have them."""
    return hasattr(module, "act_fn") and all(isinstance(getattr(module, name, None), nn.Linear) for name in PROJECTIONS)
