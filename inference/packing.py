"""Blocks packed and unpacked by compiled code, as :mod:`inference.packed` defines them.

Any number of threads may do so at once: neither holds the interpreter's lock.

Shapes: B elements of a block, R rows of C columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from inference.native import library
from inference.packed import GROUP, PackedBlock


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


def unpack_into(packed: Tensor, elements: int, out: Tensor, start: int = 0, stride: int = 0) -> None:
    """Unpack rows [R,C] of a packed block of so many elements, the first from ``start`` on, each ``stride`` behind it.

    By default they follow each other. ``start``, ``stride`` and C are whole groups. Raises NativeError.
    """
    assert out.dtype == torch.bfloat16, out.dtype
    assert out.is_contiguous(), out.stride()
    columns = out.shape[-1]
    rows, stride = out.numel() // columns, stride or columns
    assert start % GROUP == columns % GROUP == stride % GROUP == 0, (start, columns, stride)
    assert start + (rows - 1) * stride + columns <= elements, (start, out.shape, stride, elements)
    library().packed_unpack(packed.data_ptr(), elements, start, rows, columns, stride, out.data_ptr())
