"""Blocks of bf16 weights in 12 bits a weight instead of 16, without loss.

Weights of one expert have few magnitudes: their exponent fields, 8 bits each, carry about 2.6 bits. So a weight's sign
and mantissa are kept as they are, and its exponent as one of 16 codes: 15 consecutive exponents, chosen for the block,
and zero. Weights outside of these are kept whole in a list of exceptions. Codes of one width, unlike Huffman's, are
decoded at the speed at which a processor reads memory. That exponents of bf16 weights carry so few bits is also
what DFloat11 (Zhang et al., arXiv 2504.11651) rests on, with Huffman codes decoded by the GPU.

A packed block of B elements, little-endian, from an address divisible by 64:

======================== ============================================================================================
64 bytes                 int32: ``base`` (an exponent field), the number X of exceptions; zeros
``small`` [B] uint8      bit 7 the sign, bits 6 to 0 the mantissa
``codes`` [B/2] uint8    16 bytes for 32 elements: byte j has the code of element j in its low, of j + 16 in its high
                         half. Codes 0 to 14 are the fields base - code, 15 is the field 0 (zeros, subnormals)
``first`` [tiles+1]      int32: of each tile of 4,096 elements, which exception is the first at or behind its begin;
                         then X. Padded to 64 bytes from the block's begin
``exceptions`` [X]       uint64, ascending: element number << 16 | the 16 bits. In ``codes`` they are 15, in
                         ``small`` as all others: left alone they decode to less than 2**-126
======================== ============================================================================================

This is the definition, in numpy; what serves is compiled (``packed.c``), the same in each byte.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from inference.expert_block import ExpertBlock
from inference.packed_block import GROUP, HEADER, TILE, PackedBlock, whole_groups

__all__ = ["GROUP", "HEADER", "OTHER", "TILE", "PackedBlock", "pack", "packable", "unpack"]

OTHER = 15  # the code of exponent field 0, and of exceptions


def packable(layout: ExpertBlock) -> bool:
    """Whether blocks of this layout can be packed, if their weights allow it: every row is whole groups."""
    sizes = (layout.shape.hidden, layout.shape.intermediate, layout.elements)
    return layout.dtype == torch.bfloat16 and whole_groups(*sizes)


def pack(block_B: Tensor) -> Tensor | None:
    """The block's used bytes, or None if it has too many exceptions."""
    form = PackedBlock(block_B.numel())
    assert block_B.dtype == torch.bfloat16, block_B.dtype
    assert form.elements % GROUP == 0, block_B.shape
    bits_B = block_B.contiguous().view(torch.int16).numpy().view(np.uint16)
    fields_B = (bits_B >> 7 & 0xFF).astype(np.int32)
    base = _base(np.bincount(fields_B, minlength=256))
    inside_B = (fields_B > base - OTHER) & (fields_B <= base)
    at_X = np.flatnonzero(~inside_B & (fields_B > 0))
    if len(at_X) > form.max_exceptions:
        return None
    codes_GHN = np.where(inside_B, base - fields_B, OTHER).astype(np.uint8).reshape(-1, 2, GROUP // 2)
    packed = np.zeros(form.used(len(at_X)), np.uint8)
    packed[:8].view(np.int32)[:] = base, len(at_X)
    packed[form.small : form.codes] = bits_B >> 8 & 0x80 | bits_B & 0x7F
    packed[form.codes : form.first] = (codes_GHN[:, 0] | codes_GHN[:, 1] << 4).reshape(-1)
    tiles = np.arange(form.tiles + 1) * TILE
    packed[form.first :][: 4 * len(tiles)].view(np.int32)[:] = np.searchsorted(at_X, tiles)
    packed[form.exceptions :].view(np.uint64)[:] = at_X.astype(np.uint64) << np.uint64(16) | bits_B[at_X]
    return torch.from_numpy(packed)


def _base(count_256: np.ndarray) -> int:
    """The smallest exponent field such that it and the 14 below have most of the weights. None of them is 0."""
    upto_257 = np.concatenate([[0], np.cumsum(count_256)])
    return OTHER + int(np.argmax(upto_257[OTHER + 1 :] - upto_257[1:-OTHER]))


def unpack(packed: Tensor, elements: int) -> Tensor:
    """The block [B], in bf16, of its packed bytes; more may follow them."""
    form, data = PackedBlock(elements), packed.numpy()
    base, exceptions = data[:8].view(np.int32).tolist()
    small_B = data[form.small : form.codes].astype(np.uint16)
    codes_GN = data[form.codes : form.first].reshape(-1, GROUP // 2)
    codes_B = np.stack([codes_GN & 0xF, codes_GN >> 4], axis=1).reshape(-1).astype(np.uint16)
    fields_B = np.where(codes_B == OTHER, np.uint16(0), np.uint16(base) - codes_B)
    bits_B = (small_B & 0x80) << 8 | fields_B << 7 | small_B & 0x7F
    exceptions_X = data[form.exceptions : form.used(exceptions)].view(np.uint64)
    bits_B[(exceptions_X >> np.uint64(16)).astype(np.int64)] = (exceptions_X & np.uint64(0xFFFF)).astype(np.uint16)
    return torch.from_numpy(bits_B.astype(np.uint16).view(np.int16)).view(torch.bfloat16)
