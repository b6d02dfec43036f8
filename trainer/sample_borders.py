"""Attention that stops at the borders of the samples of a packed row, in transformers' own masks.

transformers looks for packed rows itself, by position ids that start again. That waits to read the answer from a GPU in
every forward pass, and not every family's model hands its position ids to the masks: gpt_oss of 5.23 leaks. Here the
functions that draw the masks, which all families call, take the samples from the BatchContext instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import masking_utils

from moe.context import current
from moe.families import FamilyError

_DRAWN = ("sdpa", "eager")  # attention whose masks are drawn as tensors

MaskFunction = Callable[[Any, Any, Any, Any], Any]  # (batch, head, query, key) -> may it be seen


def respect_borders() -> None:
    """Have masks keep the samples of packed rows apart, for the rest of the process; calling it again changes nothing.

    Without segments in the context, a row is one sample, and masks are what they were.
    """
    if hasattr(masking_utils, "find_packed_sequence_indices"):
        masking_utils.find_packed_sequence_indices = lambda position_ids: None
    interface = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS
    for name in _DRAWN:
        draw = interface[name]
        if not hasattr(draw, "respects_borders"):
            type(interface).register(name, _bordered(draw))


def check_attention(config: Any) -> None:
    """Raises FamilyError if the model's attention gets its masks from elsewhere."""
    kind = getattr(config, "_attn_implementation", None)
    if kind not in _DRAWN:
        raise FamilyError(
            f"data.format: chat keeps samples apart in attention masks, which attention {kind!r} does not draw; load "
            f"the model with {' or '.join(_DRAWN)}"
        )


def _bordered(draw: Callable[..., Any]) -> Callable[..., Any]:
    def drawn(
        *args: Any, mask_function: MaskFunction = masking_utils.causal_mask_function, **kwargs: Any
    ) -> Tensor | None:
        segment_T, shape = current().segment_T, current().shape
        if segment_T is not None:
            assert shape is not None, "segments without the batch's shape"
            mask_function = masking_utils.and_masks(mask_function, _same_sample(segment_T.view(shape)))
            kwargs["allow_is_causal_skip"] = False  # the kernel's own causal mask knows no borders
        mask: Tensor | None = draw(*args, mask_function=mask_function, **kwargs)
        return mask

    drawn.respects_borders = True  # type: ignore[attr-defined]
    return drawn


def _same_sample(segment_BS: Tensor) -> MaskFunction:
    def same(batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return segment_BS[batch, query] == segment_BS[batch, key]

    return same
