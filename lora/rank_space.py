"""The products of a linear layer's bank, forward and backward, without the effective weight and without E outputs.

The gates multiply in rank space, between A and B. That is exact because the sum over experts is linear: one product
with all A, one with all B, whatever E is. For backward they keep the input, which neighbouring layers share, and
[T, X].

Shapes: T tokens, M inputs, O outputs, E experts of the bank, R rank, F experts with an A of their own (E, or 1 where
they share it), X = E*R.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class RankSpace(torch.autograd.Function):
    """``y + s * sum_e g_e B_e C_e A_e d(x)``, added to y in place; d is dropout, C may be missing, g too (then 1).

    Every factor gets a gradient, zero where no token used it: ranks that skip one leave the others waiting.
    """

    @staticmethod
    def forward(
        ctx,
        y_TO: Tensor,
        x_TM: Tensor,
        a_FRM: Tensor,
        c_ERR: Tensor | None,
        b_EOR: Tensor,
        gate_TE: Tensor | None,
        scale: float,
        dropout: tuple[float, int] | None,
    ) -> Tensor:
        u_TFR = F.linear(dropped(x_TM, dropout), a_FRM.flatten(0, 1)).unflatten(1, a_FRM.shape[:2])
        z_TX = _weighted(_mixed(u_TFR, c_ERR), gate_TE, scale, b_EOR.shape[0]).flatten(1)
        y_TO.addmm_(z_TX, _side_by_side(b_EOR).T)
        ctx.mark_dirty(y_TO)
        ctx.save_for_backward(x_TM, a_FRM, c_ERR, b_EOR, gate_TE, u_TFR)
        ctx.scale, ctx.dropout = scale, dropout
        return y_TO

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_TO: Tensor):
        x_TM, a_FRM, c_ERR, b_EOR, gate_TE, u_TFR = ctx.saved_tensors
        _, needs_x, needs_a, needs_c, needs_b, needs_gate, _, _ = ctx.needs_input_grad
        (experts, _, rank), scale = b_EOR.shape, ctx.scale
        dx_TM = da_FRM = dc_ERR = db_EOR = dgate_TE = None
        v_TFR = _mixed(u_TFR, c_ERR)
        if needs_b:
            z_TX = _weighted(v_TFR, gate_TE, scale, experts).flatten(1)
            db_EOR = (dy_TO.T @ z_TX).unflatten(1, (experts, rank)).transpose(0, 1).contiguous()
        dz_TER = (dy_TO @ _side_by_side(b_EOR)).unflatten(1, (experts, rank))
        if needs_gate:
            dgate_TE = (dz_TER.to(gate_TE.dtype) * v_TFR.to(gate_TE.dtype)).sum(-1).mul_(scale)
        du_TFR = _weighted(dz_TER, gate_TE, scale, experts)
        if c_ERR is not None:
            if needs_c:
                dc_ERR = torch.einsum("tes,ter->esr", du_TFR, u_TFR.expand(-1, experts, -1))
            du_TFR = torch.einsum("tes,esr->ter", du_TFR, c_ERR)
        if a_FRM.shape[0] < experts:
            du_TFR = du_TFR.sum(1, keepdim=True)
        du_TX = du_TFR.flatten(1)
        if needs_a:
            da_FRM = (du_TX.T @ dropped(x_TM, ctx.dropout)).view_as(a_FRM)
        if needs_x:
            dx_TM = dropped(du_TX @ a_FRM.flatten(0, 1), ctx.dropout)
        return dy_TO, dx_TM, da_FRM, dc_ERR, db_EOR, dgate_TE, None, None


def add_low_rank(y_TO: Tensor, x_TM: Tensor, a_1RM: Tensor, b_1OR: Tensor, scale: float) -> Tensor:
    """``y + s B A x`` of one pair without dropout, added to y in place; differentiable, and keeps x and ``A x``.

    Torch's own operations: a pair is so few of them that a function in Python costs a GPU's host more than they do.
    """
    z_TR = F.linear(x_TM, a_1RM.flatten(0, 1))
    return y_TO.addmm_(z_TR, b_1OR.flatten(0, 1).T, alpha=scale)


def _side_by_side(b_EOR: Tensor) -> Tensor:
    """[O, X]."""
    return b_EOR.transpose(0, 1).flatten(1)


def _mixed(u_TFR: Tensor, c_ERR: Tensor | None) -> Tensor:
    return u_TFR if c_ERR is None else torch.einsum("ter,esr->tes", u_TFR.expand(-1, c_ERR.shape[0], -1), c_ERR)


def _weighted(v_TFR: Tensor, gate_TE: Tensor | None, scale: float, experts: int) -> Tensor:
    """[T, E, R], scaled, in the dtype of ``v_TFR``; the gates multiply in theirs."""
    if gate_TE is None:
        return (v_TFR * scale).expand(-1, experts, -1)
    return (v_TFR * (gate_TE * scale).unsqueeze(-1)).to(v_TFR.dtype)


def dropped(x_TM: Tensor, dropout: tuple[float, int] | None) -> Tensor:
    """``x_TM`` with a share of its entries zero and the others larger by as much. The same seed drops the same ones.

    Backward draws the mask again instead of keeping it, from a generator of its own.
    """
    if dropout is None:
        return x_TM
    share, seed = dropout
    generator = torch.Generator(device=x_TM.device).manual_seed(seed)
    keep_TM = torch.empty_like(x_TM).bernoulli_(1 - share, generator=generator)
    return keep_TM.mul_(x_TM).mul_(1 / (1 - share))


class ScaledOutput(torch.autograd.Function):
    """``y * (1 + sum_e g_e b_e)``, elementwise (g may be missing: then 1). The sum over experts comes first.

    MoV (arXiv 2309.05444, section 2.2) merges vectors ``l_e = 1 + b_e`` like that, with gates that sum to one. Keeps y.
    """

    @staticmethod
    def forward(ctx, y_TO: Tensor, b_EO: Tensor, gate_TE: Tensor | None) -> Tensor:
        ctx.save_for_backward(y_TO, b_EO, gate_TE)
        return torch.addcmul(y_TO, y_TO, _merged(b_EO, gate_TE))

    @staticmethod
    @once_differentiable
    def backward(ctx, d_TO: Tensor):
        y_TO, b_EO, gate_TE = ctx.saved_tensors
        needs_y, needs_b, needs_gate = ctx.needs_input_grad
        dy_TO = torch.addcmul(d_TO, d_TO, _merged(b_EO, gate_TE)) if needs_y else None
        db_EO = dgate_TE = None
        if needs_b or needs_gate:
            dm_TO = d_TO * y_TO
        if needs_b:
            db_EO = dm_TO.sum(0).expand_as(b_EO).clone() if gate_TE is None else gate_TE.to(dm_TO.dtype).T @ dm_TO
        if needs_gate:
            dgate_TE = (dm_TO @ b_EO.T).to(gate_TE.dtype)
        return dy_TO, db_EO, dgate_TE


def _merged(b_EO: Tensor, gate_TE: Tensor | None) -> Tensor:
    """The delta of each token's scale, [T, O] or [O]."""
    return b_EO.sum(0) if gate_TE is None else gate_TE.to(b_EO.dtype) @ b_EO
