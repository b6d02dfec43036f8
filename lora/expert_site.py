"""Banks on the stacked weights of routed experts."""

from __future__ import annotations

from itertools import chain

from torch import nn

from lora.config import BankAt
from lora.errors import AdapterError
from lora.experts import ExpertLoRA, ExpertSlice
from lora.sites import Frame, global_size
from lora.targets import Placed


def attach_expert_tensor(model: nn.Module, placed: Placed, here: BankAt, frame: Frame) -> int:
    """Give one tensor of a block's experts an adapter; several banks share one ``adapter`` module.

    Raises AdapterError for experts that cannot take an adapter.
    """
    block, path, tensor = frame.blocks[placed.layer], placed.host, placed.path.rpartition(".")[2]
    experts = block.module.experts
    _check(experts, path, frame)
    hidden, intermediate = _sizes(experts, path)
    # The weights' own place and type; where experts hold none, the gate's.
    home = next(chain(experts.parameters(), block.module.parameters()))
    if experts.adapter is None:
        local = experts.num_experts // experts.ep_size
        part = ExpertSlice(block.layer, experts.num_experts, experts.first_expert, local, experts.ep_size)
        experts.adapter = ExpertLoRA(f"{path}.adapter", part, hidden, intermediate)
    experts.adapter.add(tensor, here, seed=frame.seed, device=home.device, dtype=home.dtype)
    return global_size(getattr(experts.adapter, tensor).parameters())


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
