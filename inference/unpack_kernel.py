"""Packed blocks of bf16 weights, :mod:`inference.packed`, made whole on a GPU: one program for each tile.

A program decodes its tile, then, behind a barrier, puts the exceptions of that tile in their places. It reads 0.75 of
the bytes that it writes, all of them in whole lines, so it takes some microseconds, and computing beside it goes on.

Shapes: B elements of a block, N bytes of a packed one.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from inference.packed import GROUP, HEADER, OTHER, TILE, PackedBlock

_EXCEPTIONS = 128  # of one tile that are put in their places at once
_WARPS = 4
_HIDDEN = 6  # arguments that Triton may add to a kernel


@triton.jit
def _unpack(packed, block, elements: tl.constexpr, codes_at: tl.constexpr, first_at: tl.constexpr,
            exceptions_at: tl.constexpr, HEADER: tl.constexpr, OTHER: tl.constexpr, TILE: tl.constexpr,
            GROUP: tl.constexpr, SOME: tl.constexpr):  # fmt: skip
    tile = tl.program_id(0)
    base = tl.load(packed.to(tl.pointer_type(tl.int32)))
    group = tile * (TILE // GROUP) + tl.arange(0, TILE // GROUP)[:, None]
    within = tl.arange(0, GROUP // 2)[None, :]
    here = group * GROUP < elements
    low = group * GROUP + within
    high = low + GROUP // 2
    codes = tl.load(packed + codes_at + group * (GROUP // 2) + within, mask=here, other=0).to(tl.int32)
    small_low = tl.load(packed + HEADER + low, mask=here, other=0).to(tl.int32)
    small_high = tl.load(packed + HEADER + high, mask=here, other=0).to(tl.int32)
    code_low, code_high = codes & 15, codes >> 4
    field_low = tl.where(code_low == OTHER, 0, base - code_low)
    field_high = tl.where(code_high == OTHER, 0, base - code_high)
    bits_low = (small_low & 0x80) << 8 | field_low << 7 | small_low & 0x7F
    bits_high = (small_high & 0x80) << 8 | field_high << 7 | small_high & 0x7F
    tl.store(block + low, bits_low.to(tl.int16), mask=here)
    tl.store(block + high, bits_high.to(tl.int16), mask=here)
    first = packed.to(tl.pointer_type(tl.int32)) + first_at // 4 + tile
    start, end = tl.load(first), tl.load(first + 1)
    if start < end:
        tl.debug_barrier()
        while start < end:
            turn = start + tl.arange(0, SOME)
            one = tl.load(packed.to(tl.pointer_type(tl.int64)) + exceptions_at // 8 + turn, mask=turn < end, other=0)
            tl.store(block + (one >> 16), one.to(tl.int16), mask=turn < end)
            start += SOME


def unpack_on_device(packed_N: Tensor, block_B: Tensor) -> Any:
    """``block_B`` (bf16, contiguous) from its packed bytes, both on the device, on the current stream.

    Returns what Triton compiled.
    """
    assert (packed_N.dtype, block_B.dtype) == (torch.uint8, torch.bfloat16), (packed_N.dtype, block_B.dtype)
    assert packed_N.data_ptr() % 64 == 0
    assert block_B.is_contiguous()
    form = PackedBlock(block_B.numel())
    return _unpack[(form.tiles,)](
        packed_N, block_B.view(torch.int16), form.elements, form.codes, form.first, form.exceptions, HEADER, OTHER,
        TILE, GROUP, _EXCEPTIONS, num_warps=_WARPS,
    )  # fmt: skip


class Unpacker:
    """Launches of the kernel for blocks of one size on one device, by CUDA's driver: Triton's own take the host twice
    as long.

    Attributes:
        launch: cuLaunchKernel, and ``kernel``, ``tiles``, ``threads`` and ``shared`` what it is given.
        arguments: of the kernel, the first two are where a packed block is and where the block goes, and the
            ``places`` where the driver finds them.
    """

    def __init__(self, elements: int, device: torch.device) -> None:
        form = PackedBlock(elements)
        packed_N = torch.zeros(form.stride, dtype=torch.uint8, device=device)
        compiled = unpack_on_device(packed_N, torch.empty(elements, dtype=torch.bfloat16, device=device))
        assert compiled.metadata.num_warps == _WARPS
        # Behind the kernel's own arguments Triton has its own, two in 3.6, for memory that this one does not use. The
        # driver reads as many as there are.
        count = 2 + _HIDDEN
        self.arguments = (ctypes.c_uint64 * count)()
        places = [ctypes.addressof(self.arguments) + 8 * i for i in range(count)]
        self.places = (ctypes.c_void_p * count)(*places)
        self.launch = ctypes.CDLL("libcuda.so.1").cuLaunchKernel
        self._compiled = compiled  # its kernel is loaded as long as it is
        self.kernel, self.shared = compiled.function, compiled.metadata.shared
        self.tiles, self.threads = form.tiles, 32 * _WARPS
