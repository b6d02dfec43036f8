"""The block's shared expert while tokens are on their way.

A transformers block calls its shared expert before its gate or after its experts, never between sending and receiving.
So the blocks' ``forward`` is replaced by one that calls the same modules in another order and adds the same things: its
output has the same bits. Gradients of the tokens are sums whose order autograd takes from the order of the calls, so
there the rounding may differ.

Shapes: B sequences, S positions, T = B*S tokens, K experts per token, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from moe.dispatch_choice import Chosen, choose_dispatch
from moe.families import FamilyError, MoEBlock


def set_exchange(blocks: Sequence[MoEBlock], top_k: int, *, dispatch: str = "auto", overlap: str = "none") -> Chosen:
    """Have the experts of all blocks exchange tokens as told, and say which way ``auto`` means.

    Args:
        top_k: experts per token.
        dispatch: see :func:`moe.dispatch_choice.choose_dispatch`.
        overlap: ``shared``: the shared expert runs while tokens travel; or ``none``. Without other ranks it does
            nothing.

    Raises FamilyError if the shared expert is wanted and a block has none that we know.
    """
    chosen = choose_dispatch(dispatch, top_k, blocks[0].experts.ep_size)
    for block in blocks:
        if block.experts.ep_size == 1:
            continue
        block.experts.dispatch = chosen.name
        if overlap == "shared":
            _overlap_shared(block)
    return chosen


def _overlap_shared(block: MoEBlock) -> None:
    module: Any = block.module
    shared = shared_expert_of(block)
    # Its gate gets what the block would give it: Qwen2's blocks flatten first, DeepSeek's do not.
    flattens = hasattr(module, "shared_expert")

    def forward(hidden_states_BSH: Tensor) -> Tensor:
        x_TH = hidden_states_BSH.reshape(-1, hidden_states_BSH.shape[-1])
        # The block's own at this moment: a run may put another router in its place.
        _, weights_TK, index_TK = module.gate(x_TH if flattens else hidden_states_BSH)
        computed: list[Tensor] = []
        module.experts.meanwhile = lambda: computed.append(shared(x_TH))
        try:
            out_TH = module.experts(x_TH, index_TK, weights_TK)
        finally:
            module.experts.meanwhile = None
        return (out_TH + computed[0]).view_as(hidden_states_BSH)

    module.forward = forward


def shared_expert_of(block: MoEBlock) -> Callable[[Tensor], Tensor]:
    """What the block adds to its experts' output, as a function of its tokens [T,H].

    Raises FamilyError if there is none, saying what was looked for.
    """
    module = block.module
    single, several = getattr(module, "shared_expert", None), getattr(module, "shared_experts", None)
    gate = getattr(module, "shared_expert_gate", None)
    if single is not None and gate is not None:
        return lambda x_TH: torch.sigmoid(gate(x_TH)) * single(x_TH)
    if several is not None and gate is None:
        return several  # type: ignore[no-any-return]
    raise FamilyError(
        f"{block.path} ({type(module).__name__}) has no shared expert that could run while tokens travel: looked for "
        "`shared_expert` with `shared_expert_gate`, or `shared_experts`; remove parallel.overlap"
    )
