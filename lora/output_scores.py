"""Scores of experts by what all of them say (MOLE, arXiv 2404.13628), without building what they say.

``score = W n`` with n all outputs ``u_e = s B_e A_e x`` of a token in one row, divided by its root mean square. Both
product and square are sums over experts of products with ``A_e x``, which has only R numbers: ``W_e' B`` is built once,
and ``u_e' u_e = z' (B' B) z``.

Shapes: T tokens, M inputs, O outputs, E experts, R rank, Y = E*O, X = E*R.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_EPSILON = 1e-6  # added to the mean square


class _OutputScores(torch.autograd.Function):
    """Keeps x alone, which the bank keeps anyway, and computes the rest again in backward."""

    @staticmethod
    def forward(ctx, x_TM: Tensor, w_EY: Tensor, a_ERM: Tensor, b_EOR: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(x_TM, w_EY, a_ERM, b_EOR)
        ctx.scale = scale
        return _scores(x_TM, w_EY, a_ERM, b_EOR, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_TE: Tensor):
        x_TM, w_EY, a_ERM, b_EOR = ctx.saved_tensors
        with torch.enable_grad():
            inputs = [t.detach().requires_grad_() for t in (x_TM, w_EY)]
            scores_TE = _scores(*inputs, a_ERM.detach(), b_EOR.detach(), ctx.scale)
        return *torch.autograd.grad(scores_TE, inputs, d_TE), None, None, None


def _scores(x_TM: Tensor, w_EY: Tensor, a_ERM: Tensor, b_EOR: Tensor, scale: float) -> Tensor:
    dtype = torch.promote_types(x_TM.dtype, torch.float32)
    x_TM, w_EY, a_ERM, b_EOR = (t.to(dtype) for t in (x_TM, w_EY, a_ERM, b_EOR))
    experts, outs, rank = b_EOR.shape
    z_TX = (x_TM @ a_ERM.flatten(0, 1).T) * scale
    seen_EX = torch.einsum("feo,eor->fer", w_EY.unflatten(1, (experts, outs)), b_EOR).flatten(1)
    square_ERR = b_EOR.transpose(1, 2) @ b_EOR
    z_TER = z_TX.unflatten(1, (experts, rank))
    square_T = (torch.einsum("ter,ers->tes", z_TER, square_ERR) * z_TER).sum((1, 2))
    return (z_TX @ seen_EX.T) / (square_T / (experts * outs) + _EPSILON).sqrt().unsqueeze(1)


def output_scores(x_TM: Tensor, a_ERM: Tensor, b_EOR: Tensor, scale: float, w_EY: Tensor) -> Tensor:
    """[T, E] in fp32 or wider. The factors get no gradient: they are those of trained adapters."""
    return _OutputScores.apply(x_TM, w_EY, a_ERM, b_EOR, scale)
