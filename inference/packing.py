"""Blocks packed and unpacked by compiled code, as :mod:`inference.packed` defines them.

Any number of threads may do so at once: neither holds the interpreter's lock.

Shapes: B elements of a block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from inference.expert_block import ExpertBlock
from inference.native import library, opened
from inference.packed import GROUP, PackedBlock, packable
from moe.kernels.probe import runs_triton


def why_not_packed(layout: ExpertBlock, device: torch.device) -> str | None:
    """What keeps this machine from packing such experts and unpacking them on ``device``; None if it can."""
    if layout.dtype != torch.bfloat16:
        return f"they are in {str(layout.dtype).removeprefix('torch.')}, and only bfloat16 is"
    if not packable(layout):
        sizes = f"{layout.shape.hidden} and {layout.shape.intermediate}"
        return f"their rows, of {sizes} weights, are not whole groups of {GROUP}"
    if isinstance(routines := opened(), str):
        return routines
    if not routines.packed_is_quick():
        return "this processor has neither AVX2 nor AVX-512, without which it computes them at a quarter of its speed"
    if device.type == "cuda" and not runs_triton(device):
        return f"there is no Triton to unpack them on {device}"
    return None


def pack_into(block_B: Tensor, packed: Tensor) -> int:
    """Pack a block to the begin of ``packed``, which has room for ``PackedBlock(B).stride`` bytes (uint8).

    Returns the bytes used, or 0 if the block has too many exceptions. Raises :class:`inference.native.NativeError`.
    """
    elements = block_B.numel()
    assert block_B.dtype == torch.bfloat16, block_B.dtype
    assert elements % GROUP == 0, block_B.shape
    assert block_B.is_contiguous(), block_B.stride()
    assert packed.nbytes >= PackedBlock(elements).stride, packed.shape
    return int(library().packed_pack(block_B.data_ptr(), elements, packed.data_ptr()))


def unpack_into(packed: Tensor, block_B: Tensor) -> None:
    """Unpack a whole block. Raises NativeError."""
    unpack_rows(packed, block_B, 0, 1, block_B.numel(), block_B.numel())


def unpack_rows(packed: Tensor, block_B: Tensor, start: int, rows: int, columns: int, stride: int) -> None:
    """Unpack some rows to their places in a block, of which nothing else is written. Raises NativeError.

    Args:
        start: the first row's first element; the others begin ``stride`` behind each other. Whole groups, all three.
    """
    assert block_B.dtype == torch.bfloat16, block_B.dtype
    assert block_B.is_contiguous(), block_B.stride()
    assert start % GROUP == columns % GROUP == stride % GROUP == 0, (start, columns, stride)
    assert start + (rows - 1) * stride + columns <= block_B.numel(), (start, rows, columns, stride, block_B.shape)
    given = (packed.data_ptr(), block_B.numel(), start, rows, columns, stride, block_B.data_ptr())
    library().packed_unpack(*given)
