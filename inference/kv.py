"""Keys and values of many sequences in one pool of blocks (Kwon et al., PagedAttention, arXiv 2309.06180).

Shapes: N blocks of S positions, C cached heads, D numbers in each. A position is C heads: the keys, then the values;
with latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1) it is one head, the latent and then the rotated key.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BLOCK_SIZE = 16


@dataclass(frozen=True)
class KVShape:
    """What one position keeps: ``layers`` times ``heads`` times ``width`` numbers."""

    layers: int
    heads: int
    width: int

    @classmethod
    def of(cls, config: Any) -> KVShape:
        """From a transformers configuration."""
        layers = int(config.num_hidden_layers)
        if (rank := getattr(config, "kv_lora_rank", None)) is not None:
            return cls(layers, 1, int(rank) + int(config.qk_rope_head_dim))
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(layers, 2 * int(config.num_key_value_heads), int(width))

    def bytes_per_block(self, block_size: int, dtype: torch.dtype) -> int:
        return self.layers * self.heads * self.width * block_size * dtype.itemsize


class PagedKV:
    """The pool. Who owns which block is somebody else's affair; block numbers begin at 0.

    Args:
        shape: of the model, see :meth:`KVShape.of`.
        num_blocks: how many blocks there are; all memory is taken at once.
    """

    def __init__(
        self,
        shape: KVShape,
        num_blocks: int,
        block_size: int = BLOCK_SIZE,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        assert min(num_blocks, block_size) > 0, (num_blocks, block_size)
        self.shape, self.num_blocks, self.block_size = shape, num_blocks, block_size
        # Zeros, since positions that are masked are multiplied by 0, which NaN would survive.
        self.pool_LNSCD = torch.zeros(
            shape.layers, num_blocks, block_size, shape.heads, shape.width, device=device, dtype=dtype
        )
        self.layers_NSCD: tuple[Tensor, ...] = self.pool_LNSCD.unbind(0)
        # The same memory by position (block * S + offset), which rows are written to.
        self.positions_PCD: tuple[Tensor, ...] = tuple(layer.flatten(0, 1) for layer in self.layers_NSCD)

    @staticmethod
    def bytes_per_block(config: Any, dtype: torch.dtype, block_size: int = BLOCK_SIZE) -> int:
        """Memory of one block over all layers of the model that ``config`` (transformers') describes."""
        return KVShape.of(config).bytes_per_block(block_size, dtype)

    @property
    def device(self) -> torch.device:
        return self.pool_LNSCD.device

    @property
    def dtype(self) -> torch.dtype:
        return self.pool_LNSCD.dtype
