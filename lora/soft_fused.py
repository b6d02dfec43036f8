"""A soft bank with its router as one function: a third of the launches of :mod:`lora.rank_space` behind a router.

For banks that add no loss to their router's gates; see :meth:`lora.linear.LinearBank.forward`.

Shapes: T tokens, M inputs, O outputs, E experts of the bank, R rank, F experts with an A of their own, X = E*R, Y = X
filled up to a multiple of 8.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lora.soft_kernels import filled, soft_backward, soft_forward


class SoftSpace(torch.autograd.Function):
    """``y + s sum_e g_e B_e A_e x`` with ``g = softmax(W x)``, added to y in place; and g [T,E], which has no gradient.

    Logits and gates are fp32. Keeps x, ``A x`` and g. T is not 0.
    """

    @staticmethod
    def forward(
        ctx: Any, y_TO: Tensor, x_TM: Tensor, a_FRM: Tensor, b_EOR: Tensor, w_EM: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        x_TM = x_TM.contiguous()
        u, gate_TE, z_TY = soft_forward(x_TM, a_FRM.contiguous(), w_EM.contiguous(), scale)
        y_TO.addmm_(z_TY, _side_by_side(b_EOR).T)
        ctx.mark_dirty(y_TO)
        ctx.mark_non_differentiable(gate_TE)
        ctx.set_materialize_grads(False)  # or zeros would be made for the gates
        ctx.save_for_backward(x_TM, a_FRM, b_EOR, w_EM, u, gate_TE)
        ctx.scale = scale
        return y_TO, gate_TE

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TO: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        x_TM, a_FRM, b_EOR, w_EM, u, gate_TE = ctx.saved_tensors
        _, needs_x, needs_a, needs_b, needs_w, _ = ctx.needs_input_grad
        (experts, _, rank), rows = b_EOR.shape, u.shape[1]
        z_TY, d = soft_backward(dy_TO @ _side_by_side(b_EOR), u, gate_TE, rank, ctx.scale)
        dx_TM = da_FRM = db_EOR = dw_EM = None
        if needs_b:
            db_OX = (dy_TO.T @ z_TY)[:, : experts * rank]
            db_EOR = db_OX.unflatten(1, (experts, rank)).transpose(0, 1).contiguous()
        if needs_a or needs_w:
            both = d.T @ x_TM
            da_FRM, high, low = (
                both[:rows].view_as(a_FRM),
                both[rows : rows + experts],
                both[rows + experts :][:experts],
            )
            dw_EM = high + low
        if needs_x:
            both = [a_FRM.flatten(0, 1), w_EM, w_EM]
            if d.shape[1] > rows + 2 * experts:
                both.append(w_EM.new_zeros(d.shape[1] - rows - 2 * experts, w_EM.shape[1]))
            dx_TM = d @ torch.cat(both)
        return dy_TO, dx_TM, da_FRM if needs_a else None, db_EOR, dw_EM if needs_w else None, None


def _side_by_side(b_EOR: Tensor) -> Tensor:
    """[O,Y]."""
    b_OX = b_EOR.transpose(0, 1).flatten(1)
    lacking = filled(b_OX.shape[1]) - b_OX.shape[1]
    return F.pad(b_OX, (0, lacking)) if lacking else b_OX
