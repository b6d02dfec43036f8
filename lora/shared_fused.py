"""The feed-forward block of :mod:`lora.shared_ffn` on a GPU: its pairs in a dozen Triton launches in each direction.

What stands between the frozen products, for all pairs of a token and an expert: one kernel for ``A x`` of gate and up,
one that reads the shared products of each pair's token, adds both B's parts, activates, weighs and multiplies by the
down side's A, one for its B, and two sums over each token's pairs. Nothing of N x I is kept for the backward.

Shapes: T tokens, K choices of each, E experts of the bank, N pairs sorted by expert, H hidden, I intermediate, R rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lora.activation_kernels import Between, activate, activate_backward
from lora.rank_kernels import factor_gradient, from_rank, to_rank
from lora.sorted_rows import sorted_again, sorted_rows
from moe.assignment import Assignment
from moe.kernels.combine import combine


class FusedMix(torch.autograd.Function):
    """(m [T,I], d [T,H]) as :func:`lora.shared_ffn.mix` has them, of its arguments. Keeps x, u, v, gates, [N,3R]."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TH: Tensor,
        u_TI: Tensor,
        v_TI: Tensor,
        gate_TK: Tensor,
        a_in: Tensor,
        b_gate: Tensor,
        b_up: Tensor,
        a_down: Tensor,
        b_down: Tensor,
        keep_NI: Tensor | None,
        assignment: Assignment,
        s: float,
        s_down: float,
    ) -> tuple[Tensor, Tensor]:
        gate_TK, factors = gate_TK.contiguous(), (a_in, b_gate, b_up, a_down, b_down)
        if not assignment.pair_N.numel():
            m_TI, d_TH, kept = torch.zeros_like(u_TI), torch.zeros_like(x_TH), (None, None, None)
        else:
            by = sorted_rows(assignment)
            z_N2R = to_rank(x_TH, a_in, by, gather=True)
            between = Between(
                u_TI, v_TI, gate_TK, z_N2R, b_gate, b_up, a_down, keep_NI, s, s_down, own=True, gather=True
            )
            a_NI, w_NR = activate(between, by)
            assert w_NR is not None
            m_TI = combine(a_NI, assignment)
            del a_NI
            d_TH = combine(from_rank(w_NR, b_down.transpose(1, 2), s_down, by), assignment)
            kept = (z_N2R, w_NR, by.table_X)
        parts = (assignment.pair_N, assignment.slot_RK, assignment.counts_L)
        ctx.save_for_backward(x_TH, u_TI, v_TI, gate_TK, *factors, keep_NI, *parts, *kept)
        ctx.known = assignment.complete, s, s_down
        return m_TI, d_TH

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dm_TI: Tensor, dd_TH: Tensor) -> tuple[Tensor | None, ...]:
        x_TH, u_TI, v_TI, gate_TK, *rest = ctx.saved_tensors
        a_in, b_gate, b_up, a_down, b_down = factors = rest[:5]
        keep_NI, (complete, s, s_down) = rest[5], ctx.known
        assignment, (z_N2R, w_NR, table_X) = Assignment(*rest[6:9], complete), rest[9:]
        if z_N2R is None:
            return (*(torch.zeros_like(t) for t in (x_TH, u_TI, v_TI, gate_TK, *factors)), *(None,) * 4)
        by, rank, inner = sorted_again(table_X, assignment), b_gate.shape[2], u_TI.shape[1]
        dm_TI, dd_TH = dm_TI.contiguous(), dd_TH.contiguous()
        between = Between(u_TI, v_TI, gate_TK, z_N2R, b_gate, b_up, a_down, keep_NI, s, s_down, own=True, gather=True)
        dw_NR = to_rank(dd_TH, b_down.transpose(1, 2), by, gather=True)
        dh_N2I = u_TI.new_empty(by.pairs, 2 * inner)
        found = activate_backward(dm_TI, dw_NR, between, by, dh_N2I, complete)
        assert found.dz is not None
        da_down = factor_gradient(found.a, dw_NR, s_down, by, a_down, True, gather=False)
        db_down = factor_gradient(dd_TH, w_NR, s_down, by, b_down, False, gather=True)
        db_gate = factor_gradient(dh_N2I[:, :inner], z_N2R[:, :rank], s, by, b_gate, False, gather=False)
        db_up = factor_gradient(dh_N2I[:, inner:], z_N2R[:, rank:], s, by, b_up, False, gather=False)
        da_in = factor_gradient(x_TH, found.dz, s, by, a_in, True, gather=True)
        dh_T2I = combine(dh_N2I, assignment)
        del dh_N2I
        dx_TH = combine(from_rank(found.dz, a_in, s, by), assignment) if ctx.needs_input_grad[0] else None
        return (
            dx_TH, dh_T2I[:, :inner], dh_T2I[:, inner:], found.score, da_in, db_gate, db_up, da_down, db_down,
            *(None,) * 4,
        )  # fmt: skip
