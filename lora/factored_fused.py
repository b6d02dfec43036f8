"""Low-rank updates of rows sorted by group, in a few Triton launches whatever the number of groups.

Shapes: N rows, L groups, R rank, M inputs, O outputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lora.rank_kernels import factor_gradient, from_rank, to_rank
from lora.sorted_rows import SortedRows, rows_in_order


class FusedDelta(torch.autograd.Function):
    """``scale * B_g A_g x[n]`` [N,O] of each row's group g; with ``y``, added to it in place.

    Keeps x, A, B and the [N,R] products. Rows of one group touch no other group's: not their values, not their
    gradients, be they not a number. Gradients are whole stacks, zero for groups without rows.
    """

    @staticmethod
    def forward(
        ctx: Any, y_NO: Tensor | None, x_NM: Tensor, a_LRM: Tensor, b_LOR: Tensor, counts_L: Tensor, scale: float
    ) -> Tensor:
        if y_NO is not None:
            ctx.mark_dirty(y_NO)
        x_NM, ctx.scale, ctx.pairs = x_NM.contiguous(), scale, x_NM.shape[0]
        if not ctx.pairs:
            ctx.save_for_backward(x_NM, a_LRM, b_LOR)
            return x_NM.new_zeros(0, b_LOR.shape[1]) if y_NO is None else y_NO
        by = rows_in_order(counts_L, ctx.pairs)
        z_NR = to_rank(x_NM, a_LRM, by, gather=False)
        ctx.save_for_backward(x_NM, a_LRM, b_LOR, z_NR, by.table_X)
        ctx.sizes = by.experts, by.rows, by.tiles
        return from_rank(z_NR, b_LOR.transpose(1, 2), scale, by, onto=y_NO)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy_NO: Tensor) -> tuple[Tensor | None, ...]:
        x_NM, a_LRM, b_LOR, *kept = ctx.saved_tensors
        adds, needs_x, needs_a, needs_b, _, _ = ctx.needs_input_grad
        passed = dy_NO if adds else None
        if not ctx.pairs:
            return passed, torch.zeros_like(x_NM), torch.zeros_like(a_LRM), torch.zeros_like(b_LOR), None, None
        z_NR, table_X = kept
        experts, rows, tiles = ctx.sizes
        by = SortedRows(table_X, None, 1, ctx.pairs, experts, rows, tiles)
        dy_NO, scale = dy_NO.contiguous(), ctx.scale
        dz_NR = to_rank(dy_NO, b_LOR.transpose(1, 2), by, gather=False)
        da_LRM = factor_gradient(x_NM, dz_NR, scale, by, a_LRM, True, gather=False) if needs_a else None
        db_LOR = factor_gradient(dy_NO, z_NR, scale, by, b_LOR, False, gather=False) if needs_b else None
        dx_NM = from_rank(dz_NR, a_LRM, scale, by) if needs_x else None
        return passed, dx_NM, da_LRM, db_LOR, None, None
