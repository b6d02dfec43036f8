"""Banks on the stacked weights of routed experts."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

from torch import nn

from lora.config import BankConfig
from lora.errors import AdapterError
from lora.experts import ExpertLoRA, ExpertSlice
from lora.presets import bank_at, expert_tensors, targets_of
from lora.sites import Frame, Match, global_size
from moe.families import MoEBlock


def attach_experts(
    model: nn.Module, name: str, bank: BankConfig, blocks: Sequence[MoEBlock], frame: Frame
) -> list[Match]:
    """Give the bank's tensors of every block's experts an adapter; several banks share one ``adapter`` module."""
    return [match for block in blocks for match in _attach_block(name, bank, block, frame)]


def _attach_block(name: str, bank: BankConfig, block: MoEBlock, frame: Frame) -> list[Match]:
    experts, path = block.module.experts, f"{block.path}.experts"
    found = [(target, tensor) for target in targets_of(bank) for tensor in expert_tensors(target, path)]
    if not found:
        return []
    _check(experts, path, frame)
    hidden, intermediate = _sizes(experts, path)
    # The weights' own place and type; where experts hold none, the gate's.
    home = next(chain(experts.parameters(), block.module.parameters()))
    local = experts.num_experts // experts.ep_size
    part = ExpertSlice(block.layer, experts.num_experts, experts.first_expert, local, experts.ep_size)
    if experts.adapter is None:
        experts.adapter = ExpertLoRA(f"{path}.adapter", part, hidden, intermediate)
    here = bank_at(bank, block.layer, frame.layers, experts.num_experts, frame.active)
    for _, tensor in found:
        experts.adapter.add(tensor, here, seed=frame.seed, device=home.device, dtype=home.dtype)
    sizes = {tensor: global_size(getattr(experts.adapter, tensor).parameters()) for _, tensor in found}
    return [Match(name, path, target, sizes[tensor]) for target, tensor in found]


def _check(experts: nn.Module, path: str, frame: Frame) -> None:
    if not hasattr(experts, "adapter"):
        raise AdapterError(
            f"{path} ({type(experts).__name__}) cannot take an adapter; convert the model first (moe.convert.convert)"
        )
    if experts.ep_size != frame.ep:
        raise AdapterError(f"{path} was converted for ep={experts.ep_size}, the adapter is for ep={frame.ep}")


def _sizes(experts: nn.Module, path: str) -> tuple[int, int]:
    """(hidden, intermediate), whatever the layout of the weights and whether they are held."""
    try:
        return experts.hidden_size, experts.intermediate_size
    except AttributeError:
        raise AdapterError(
            f"{path} ({type(experts).__name__}) has no hidden_size and intermediate_size, which an adapter needs"
        ) from None
