"""Attention of many sequences' rows over their paged keys and values.

Shapes: R rows, H heads, K key and value heads, G = H/K heads that share one, D numbers of a head, C = 2K cached heads,
N blocks of S positions; of a group: B sequences, Q rows of each, L keys of each.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from inference.dense import Norm, joined, linear
from inference.kv import PagedKV
from inference.rope import rotated
from inference.rows import Group
from moe.kernels.probe import runs_triton

# Which layers see only the last `sliding_window` keys: all of them, or those that `layer_types` names.
_ALL_WINDOWED = ("mistral", "mixtral", "qwen3_moe")
_SOME_WINDOWED = ("qwen2", "qwen3", "qwen2_moe", "gpt_oss")


def window_of(config: Any, layer: int) -> int | None:
    """How many keys a row of ``layer`` sees, its own included; None: all."""
    window = getattr(config, "sliding_window", None)
    if window is None or config.model_type not in (*_ALL_WINDOWED, *_SOME_WINDOWED):
        return None
    if config.model_type in _SOME_WINDOWED and config.layer_types[layer] != "sliding_attention":
        return None
    return int(window)


@dataclass(frozen=True)
class Step:
    """What all layers of one call share: rotations, where rows are written, and who attends to what, by window.

    ``table_RM`` and ``position_R`` are there where every row is the newest of its sequence: its blocks, its position.
    """

    cos_R1D: Tensor
    sin_R1D: Tensor
    slot_R: Tensor
    groups: Mapping[int | None, tuple[Group, ...]]
    table_RM: Tensor | None = None
    position_R: Tensor | None = None


class GroupedAttention:
    """Attention with K key and value heads for H heads (Ainslie et al., arXiv 2305.13245).

    Norms of queries and keys, biases, clipping, sliding windows and sinks as the families have them; projections with
    adapters are called as modules.
    """

    def __init__(self, module: nn.Module, config: Any, layer: int, kv: PagedKV) -> None:
        self._layer, self._kv = layer, kv
        self._heads, self._kv_heads, self._width = config.num_attention_heads, kv.shape.heads // 2, kv.shape.width
        self._scale = float(module.scaling)
        self._clip = getattr(config, "clip_qkv", None)
        self._qkv = joined((module.q_proj, module.k_proj, module.v_proj))
        self._out = linear(module.o_proj)
        self._set_norms(module, kv.dtype)
        sinks = getattr(module, "sinks", None)
        self._sinks_KG = None if sinks is None else sinks.detach().view(self._kv_heads, -1)
        self.window = window_of(config, layer)
        self._kernels = self._decode_kernels()

    def _decode_kernels(self) -> ModuleType | None:
        """The kernels that decode steps run on a GPU; None where they do not serve, and torch's operations do."""
        if self._sinks_KG is not None or not runs_triton(self._kv.device):
            return None
        kernels = importlib.import_module("inference.decode_kernels")
        return kernels if kernels.serves(self._width) else None

    def _set_norms(self, module: nn.Module, dtype: torch.dtype) -> None:
        """Over each head (Qwen3), where one product serves queries and keys, or over all heads at once (OLMoE)."""
        self._head_norm: Norm | None = None
        self._row_norms: tuple[Norm, Norm] | None = None
        if getattr(module, "q_norm", None) is None:
            return
        q, k = Norm.of(module.q_norm, dtype), Norm.of(module.k_norm, dtype)
        if q.weight_H.numel() == self._width and q.eps == k.eps:
            scales = q.weight_H.expand(self._heads, -1), k.weight_H.expand(self._kv_heads, -1)
            self._head_norm = Norm(torch.cat(scales), q.eps)
        else:
            self._row_norms = q, k

    def __call__(self, x_RH: Tensor, step: Step) -> Tensor:
        turned = self._heads + self._kv_heads
        qkv_RXD = self._projected(x_RH).view(x_RH.shape[0], -1, self._width)
        if self._kernels is not None and step.table_RM is not None:
            return self._out(self._decoded(qkv_RXD, step))
        qk_RXD = qkv_RXD[:, :turned]
        if self._head_norm is not None:
            qk_RXD = self._head_norm(qk_RXD)
        qkv_RXD[:, :turned] = rotated(qk_RXD, step.cos_R1D, step.sin_R1D)
        self._kv.positions_PCD[self._layer].index_copy_(0, step.slot_R, qkv_RXD[:, self._heads :])
        return self._out(self._mixed(qkv_RXD[:, : self._heads], step.groups[self.window]))

    def _decoded(self, qkv_RXD: Tensor, step: Step) -> Tensor:
        assert self._kernels is not None
        norm = self._head_norm
        return self._kernels.attention(
            qkv_RXD,
            step.cos_R1D,
            step.sin_R1D,
            step.slot_R,
            self._kv.layers_NSCD[self._layer],
            step.table_RM,
            step.position_R,
            heads=self._heads,
            scale=self._scale,
            window=self.window,
            norm=None if norm is None else (norm.weight_H, norm.eps),
        )

    def _projected(self, x_RH: Tensor) -> Tensor:
        qkv = self._qkv(x_RH)
        if self._row_norms is not None:
            q_width, k_width = self._heads * self._width, self._kv_heads * self._width
            q, k, v = qkv.split((q_width, k_width, k_width), dim=-1)
            qkv = torch.cat([self._row_norms[0](q), self._row_norms[1](k), v], dim=-1)
        return qkv if self._clip is None else qkv.clamp(-self._clip, self._clip)

    def _mixed(self, q_RHD: Tensor, groups: tuple[Group, ...]) -> Tensor:
        if len(groups) == 1 and groups[0].sequences * groups[0].queries == q_RHD.shape[0]:
            return self._attended(q_RHD, groups[0])
        out_RX = q_RHD.new_empty(q_RHD.shape[0], self._heads * self._width)
        for group in groups:
            out_RX[group.rows] = self._attended(q_RHD[group.rows], group)
        return out_RX

    def _attended(self, q_RHD: Tensor, group: Group) -> Tensor:
        """[R, H*D] of a group's rows."""
        cached_BLCD = gathered(self._kv.layers_NSCD[self._layer], group)
        k_BKLD, v_BKLD = cached_BLCD.transpose(1, 2).chunk(2, dim=1)
        rows = q_RHD.shape[0]
        if group.queries == 1:  # the heads that share a key are the rows of one product
            q_BKGD = q_RHD.view(rows, self._kv_heads, -1, self._width)
            if self._sinks_KG is None:
                out = F.scaled_dot_product_attention(q_BKGD, k_BKLD, v_BKLD, group.mask, scale=self._scale)
            else:
                sinks_KG1 = self._sinks_KG[..., None]
                out = with_sinks(q_BKGD, k_BKLD, v_BKLD, group.mask, sinks_KG1, self._scale)
            return out.reshape(rows, -1)
        q_1HQD = q_RHD.transpose(0, 1)[None]
        share = self._heads // self._kv_heads
        k_1HLD, v_1HLD = k_BKLD.repeat_interleave(share, 1), v_BKLD.repeat_interleave(share, 1)
        if self._sinks_KG is None:
            mask, causal = group.mask, group.causal
            out = F.scaled_dot_product_attention(q_1HQD, k_1HLD, v_1HLD, mask, is_causal=causal, scale=self._scale)
        else:
            mask = causal_mask(group.length, q_RHD.device) if group.causal else group.mask
            out = with_sinks(q_1HQD, k_1HLD, v_1HLD, mask, self._sinks_KG.view(-1, 1, 1), self._scale)
        return out[0].transpose(0, 1).reshape(rows, -1)


def gathered(layer_NSCD: Tensor, group: Group) -> Tensor:
    """The cached positions [B,L,C,D] of a group's sequences; a view if they lie in a row."""
    size = layer_NSCD.shape[1]
    if isinstance(group.keys, slice):
        return layer_NSCD.flatten(0, 1).narrow(0, group.keys.start * size, group.length).unsqueeze(0)
    blocks = group.keys.shape[1]
    taken = layer_NSCD.index_select(0, group.keys.reshape(-1))
    return taken.view(group.sequences, blocks * size, *layer_NSCD.shape[2:])[:, : group.length]


def causal_mask(length: int, device: torch.device) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()


def with_sinks(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor, scale: float) -> Tensor:
    """Attention in which every head may also look at nothing, at the score ``sinks`` [.., 1] (gpt_oss)."""
    scores = q @ k.transpose(-1, -2) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    sinks = sinks.to(scores.dtype).expand(*scores.shape[:-1], 1)
    probabilities = torch.cat([scores, sinks], dim=-1).softmax(dim=-1)[..., :-1]
    return probabilities @ v
