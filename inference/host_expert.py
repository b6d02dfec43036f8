"""One expert as it lies in host memory, whatever its family's layout. Shapes: B elements of a block, H hidden,
I intermediate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from inference.expert_block import ExpertBlock
from inference.packed import GROUP
from inference.packing import unpack_into, unpack_rows
from moe.form import ExpertForm


@dataclass(frozen=True)
class HostExpert:
    """One expert in host memory, as views in any strides.

    Attributes:
        interleaved: gate and up take turns, gate first (gpt_oss); else gate's rows come first.
        gate_up_bias, down_bias: [2I] laid out as the rows are, [H]; None without.
    """

    gate_up_2IH: Tensor
    down_HI: Tensor
    interleaved: bool = False
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None

    @classmethod
    def of_parts(cls, parts: Sequence[Tensor], form: ExpertForm) -> HostExpert:
        """From ``gate_up_proj`` and ``down_proj`` of one expert as its family lays them out, and their biases."""
        gate_up_2IH, down_HI = (part.t() if form.transposed else part for part in parts[:2])
        return cls(gate_up_2IH, down_HI, form.interleaved, *parts[2:])

    @property
    def halves(self) -> tuple[Tensor, Tensor]:
        """gate and up [I,H]."""
        if self.interleaved:
            return self.gate_up_2IH[::2], self.gate_up_2IH[1::2]
        gate_IH, up_IH = self.gate_up_2IH.chunk(2)
        return gate_IH, up_IH

    @property
    def intermediate(self) -> int:
        return self.down_HI.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.down_HI.dtype

    @property
    def address(self) -> int:
        return self.gate_up_2IH.data_ptr()


@dataclass(frozen=True)
class PackedExpert:
    """One expert packed in host memory (:mod:`inference.packed`).

    Attributes:
        packed: its bytes.
        layout: of the block that they make.
    """

    packed: Tensor
    layout: ExpertBlock

    @property
    def intermediate(self) -> int:
        return self.layout.shape.intermediate

    @property
    def dtype(self) -> torch.dtype:
        return self.layout.dtype

    @property
    def address(self) -> int:
        return self.packed.data_ptr()

    def unpacked(self, columns: slice, block_B: Tensor) -> HostExpert:
        """The expert in ``block_B``, to which at least those intermediate columns are unpacked.

        What is computed from it has the bits, and the operands' places in memory, of one that was never packed.
        """
        shape = self.layout.shape
        hidden, intermediate = shape.hidden, shape.intermediate
        if not shape.plain or columns.stop - columns.start == intermediate:
            unpack_into(self.packed, block_B)
        else:
            begin = columns.start // GROUP * GROUP
            width = -(-columns.stop // GROUP) * GROUP - begin
            for first_row in (begin, intermediate + begin):
                unpack_rows(self.packed, block_B, first_row * hidden, 1, width * hidden, width * hidden)
            down = self.layout.parts[1].start
            unpack_rows(self.packed, block_B, down + begin, hidden, width, intermediate)
        return HostExpert.of_parts(self.layout.split(block_B), shape.form)


StoredExpert = HostExpert | PackedExpert
