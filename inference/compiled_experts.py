"""Experts of few rows by the compiled lane, which needs no interpreter, as one more kernel of the CPU's.

It takes experts as they lie in banks: gate, up and down in one block, without biases, with silu between them. Others,
and calls of many rows where processors multiply faster than they read, go to the kernels of
:mod:`inference.cpu_experts`.

Shapes: N rows of all experts of a call, H hidden, I intermediate.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from inference.cpu_lane import CpuLane, LaneCall
from inference.host_expert import PackedExpert, StoredExpert
from inference.native import opened

COMPILED = "compiled"


def compiled_kernels(dtype: torch.dtype) -> tuple[str, ...]:
    """Its name, where a compiler made it and it knows the precision; a cache folder that cannot be written is none."""
    known = dtype in (torch.bfloat16, torch.float32)
    return (COMPILED,) if known and not isinstance(opened(), str) else ()


class CompiledExperts:
    """Args:
        threads: besides the caller's.
        down_start: the element of a block at which down begins.

    Attributes:
        lane: what computes; captured decode steps give it their calls themselves.

    Raises LaneError where there is no compiler, or for a precision that it does not know.
    """

    def __init__(self, threads: int, hidden: int, intermediate: int, dtype: torch.dtype, down_start: int) -> None:
        self.lane = CpuLane(threads, hidden, intermediate, dtype, down_start)
        self._dtype, self._down_start = dtype, down_start

    def takes(self, expert: StoredExpert) -> bool:
        """Whether it lies as the lane reads."""
        if isinstance(expert, PackedExpert):
            layout = expert.layout
            return self.lane.packs and layout.shape.plain and layout.parts[1].start == self._down_start
        fused_2IH, down_HI = expert.gate_up_2IH, expert.down_HI
        if expert.interleaved or expert.gate_up_bias is not None or expert.dtype != self._dtype:
            return False
        apart = down_HI.data_ptr() - fused_2IH.data_ptr()
        whole = fused_2IH.is_contiguous() and down_HI.is_contiguous()
        return whole and apart == self._down_start * self._dtype.itemsize

    def submit(
        self,
        work: Sequence[tuple[StoredExpert, slice]],
        x_NH: Tensor,
        out_NH: Tensor,
        what: tuple[int, Sequence[int]] = (-1, ()),
    ) -> None:
        """Begin: the rows of each expert go through it, from x into those of out. A call before is waited for.

        All are packed or none is. ``what`` are the layer and its experts. Raises
        :class:`inference.cpu_lane.LaneHung`, as ``wait`` does.
        """
        x_NH = x_NH.float().contiguous()
        ones_N1 = torch.ones(x_NH.shape[0], 1)
        call = LaneCall(x_NH.numpy(), ones_N1.numpy(), out_NH.numpy(), len(work), lambda *_: work)
        rows, first = [], [0]
        for _, here in work:
            rows += range(here.start, here.stop)
            first.append(len(rows))
        blocks = [expert.address for expert, _ in work]
        self.lane.submit(call, blocks, first, rows, what, packed=isinstance(work[0][0], PackedExpert))

    def wait(self) -> None:
        """Until the results are there; the caller's thread helps."""
        self.lane.wait()

    def close(self) -> None:
        self.lane.close()
