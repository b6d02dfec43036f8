"""The forward pass over the weights of a transformers model: rows of many sequences in one call, keys in pages.

Shapes: R rows over all sequences, H hidden, L rows whose scores are wanted, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from inference.attention import GroupedAttention, Step
from inference.dense import Function, Norm, feed_forward, linear
from inference.errors import InferenceError
from inference.kv import PagedKV
from inference.lanes import LANES
from inference.latent_attention import LatentAttention, interleaved
from inference.limits import CAPTURED_ROWS
from inference.rope import RopeTable
from inference.rows import Group, Rows, Span, computing, groups, padded_blocks, written
from moe.kernels.probe import runs_triton

__all__ = ["Forward", "Model", "Rows", "Segment", "Span"]

Segment = Callable[[Tensor, Tensor | None, Step], tuple[Tensor, Tensor]]

SMALL_PRODUCT = 1 << 23  # multiplications; one thread does so many in half a millisecond

Attention = GroupedAttention | LatentAttention

FAMILIES: dict[str, type[GroupedAttention] | type[LatentAttention]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), GroupedAttention),
    **dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss"), GroupedAttention),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3"), LatentAttention),
}


class Forward(Protocol):
    """What an engine asks of a model: :class:`Model`, or one whose steps are captured."""

    config: Any
    kv: PagedKV

    def forward(self, rows: Rows) -> Tensor:
        """Scores [L,V] of ``rows.logit_rows``; the keys and values of all rows are kept."""


class DenseSegment:
    """Everything between two feed-forward blocks: the sum with the last one's output, attention, both norms."""

    def __init__(self, layer: nn.Module, attention: Attention, dtype: torch.dtype) -> None:
        self.attention = attention
        self._before = Norm.of(layer.input_layernorm, dtype)
        self._after = Norm.of(layer.post_attention_layernorm, dtype)

    def __call__(self, x_RH: Tensor, added_RH: Tensor | None, step: Step) -> tuple[Tensor, Tensor]:
        """(the residual stream, the input of the feed-forward block)."""
        if added_RH is None:
            normed_RH = self._before(x_RH)
        else:
            x_RH, normed_RH = self._before.behind(x_RH, added_RH)
        return self._after.behind(x_RH, self.attention(normed_RH, step))


class Model:
    """A causal language model over paged keys and values.

    Args:
        module: transformers' model with its weights, adapters attached and routed experts replaced where they are.
            Weights of joined projections become views of one tensor. Attach adapters before, not after.
        kv: where keys and values are kept.

    Attributes:
        segments: one per layer, ``(x_RH, added_RH, step) -> (x_RH, h_RH)``, functions of tensors only: with the
            same shapes they run the same kernels. They may be replaced by faster ones that do the same.

    Raises:
        InferenceError: the family, or its way to encode positions, is not served.
    """

    def __init__(self, module: nn.Module, kv: PagedKV) -> None:
        self.config, self.kv = module.config, kv
        kind = self.config.model_type
        if kind not in FAMILIES:
            raise InferenceError(f"models of type {kind!r} are not served; served are {', '.join(FAMILIES)}")
        base = module.model
        self._rope = RopeTable(
            base.rotary_emb,
            getattr(self.config, "qk_rope_head_dim", None) or kv.shape.width,
            interleaved=interleaved(self.config),
            device=kv.device,
            dtype=kv.dtype,
        )
        self._embedding_VH = base.embed_tokens.weight
        attentions = [
            FAMILIES[kind](layer.self_attn, self.config, number, kv) for number, layer in enumerate(base.layers)
        ]
        self.segments: list[Segment] = [
            DenseSegment(layer, attention, kv.dtype) for layer, attention in zip(base.layers, attentions, strict=True)
        ]
        self.feed_forwards: list[Function] = [feed_forward(layer.mlp) for layer in base.layers]
        self._kernels = all(getattr(attention, "_kernels", None) is not None for attention in attentions)
        self._windows = {attention.window for attention in attentions}
        self._norm = Norm.of(base.norm, kv.dtype)
        self._head = linear(module.lm_head)
        self._widest = max(weight.numel() for layer in base.layers for weight in layer.self_attn.parameters())

    @torch.inference_mode()
    def forward(self, rows: Rows) -> Tensor:
        """Scores [L,V] of ``rows.logit_rows``; the keys and values of all rows are kept."""
        device = self.kv.device
        step = self._step(rows, device)
        with computing(rows), self._company(len(rows.token_R), self._widest):
            x_RH = self.layers(rows.token_R.to(device), step)
        if rows.logit_rows != tuple(range(len(x_RH))):
            x_RH = x_RH[torch.tensor(rows.logit_rows, dtype=torch.int64, device=device)]
        with self._company(len(x_RH), self._embedding_VH.numel()):
            return self.scores(x_RH)

    def _company(self, rows: int, weights: int) -> AbstractContextManager[None]:
        """One thread for products that are over before a second one has woken up."""
        small = self.kv.device.type == "cpu" and rows * weights <= SMALL_PRODUCT
        return LANES.alone() if small else nullcontext()

    def layers(self, token_R: Tensor, step: Step) -> Tensor:
        """The residual stream [R,H] behind the last layer: a function of tensors only, fit for capture in a graph."""
        x_RH, added_RH = F.embedding(token_R, self._embedding_VH), None
        for segment, block in zip(self.segments, self.feed_forwards, strict=True):
            x_RH, h_RH = segment(x_RH, added_RH, step)
            added_RH = block(h_RH)
        return x_RH + added_RH

    def scores(self, x_RH: Tensor) -> Tensor:
        """[R,V], a function of tensors only."""
        return self._head(self._norm(x_RH))

    def decoding_step(self, position_R: Tensor, table_RM: Tensor) -> Step:
        """What all layers share where every row is the newest of a sequence of its own, from tensors on the device.

        The keys that a row sees follow from its position, so one captured graph serves every step of as many blocks.

        Args:
            table_RM: the blocks of each sequence in order of position; those beyond its length may be any.
        """
        size, keys = self.kv.block_size, table_RM.shape[1] * self.kv.block_size
        block_R = table_RM.gather(1, position_R[:, None] // size)[:, 0]
        cos_R1D, sin_R1D = self._rope.rows(position_R, keys)
        key_L = torch.arange(keys, device=position_R.device)
        seen: dict[int | None, tuple[Group, ...]] = {}
        for window in self._windows:
            mask_RL = key_L <= position_R[:, None]
            if window is not None:
                mask_RL &= key_L > position_R[:, None] - window
            rows = slice(0, len(position_R))
            seen[window] = (Group(rows, len(position_R), 1, table_RM, keys, mask_RL[:, None, None]),)
        return Step(cos_R1D, sin_R1D, block_R * size + position_R % size, seen, table_RM, position_R)

    def rotations(self, blocks: int) -> tuple[Tensor, Tensor]:
        """The tables that :meth:`decoding_step` takes its rotations from, long enough for so many blocks."""
        return self._rope.tables(blocks * self.kv.block_size)

    def _step(self, rows: Rows, device: torch.device) -> Step:
        size = self.kv.block_size
        if self._decodes(rows, device):
            blocks = padded_blocks(rows.spans, size)
            tables = [span.blocks[:blocks] + (0,) * (blocks - len(span.blocks)) for span in rows.spans]
            return self.decoding_step(rows.position_R.to(device), torch.tensor(tables, device=device))
        longest = max(span.length for span in rows.spans)
        cos_R1D, sin_R1D = self._rope.rows(rows.position_R.to(device), longest)
        slot_R = torch.tensor(written(rows.spans, size), device=device)
        return Step(cos_R1D, sin_R1D, slot_R, {w: groups(rows.spans, size, w, device) for w in self._windows})

    def _decodes(self, rows: Rows, device: torch.device) -> bool:
        """Whether these are computed as captured steps are, so that capturing does not reach the bits."""
        few = len(rows.spans) <= CAPTURED_ROWS or self._kernels
        return few and runs_triton(device) and all(span.rows == 1 for span in rows.spans)
