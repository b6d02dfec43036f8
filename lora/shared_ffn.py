"""A gated feed-forward block run once per adapter expert, with what the experts have in common computed once.

Experts share the frozen W1, W3, W2 and differ by low-rank terms. So ``u = W1 x`` and ``v = W3 x`` are the same for all
experts of a token, and since W2 is linear, ``sum_e g_e W2 h_e = W2 sum_e g_e h_e``: the frozen products run once per
token, not once per choice. What is left per (token, expert) pair is small products and the activation:

    h  = act(u + s B1 A1 x) * (v + s B3 A3 x)          m = sum_e g_e h_e          d = sum_e g_e s B2 A2 h_e

and the block's output is ``W2 m + d``. Nothing of N x I is kept for backward: h is computed again from u and v.

Shapes: T tokens, K choices of each, E experts of the bank, N pairs sorted by expert, H hidden, I intermediate, R rank.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lora.factors import aligned
from lora.fused import refuses_fused
from lora.pairs import collect_rows, spread_rows
from moe.assignment import Assignment
from moe.form import ExpertForm
from moe.kernels.activation import between, differentiate, gated
from moe.kernels.grouped import choose_backend, grouped_linear
from moe.kernels.probe import is_plain_silu


@dataclass(frozen=True)
class Stacks:
    """The bank's factors: A of gate and up side by side [E,2R,H], A of down [E,R,I]; B [E,I,R], [E,I,R], [E,H,R]."""

    a_in: Tensor
    b_gate: Tensor
    b_up: Tensor
    a_down: Tensor
    b_down: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.a_in, self.b_gate, self.b_up, self.a_down, self.b_down


@dataclass(frozen=True)
class Scales:
    """What the products are multiplied by: ``s``, and ``s`` over the share that dropout keeps of h."""

    s: float
    s_down: float


def mix(
    x_TH: Tensor,
    u_TI: Tensor,
    v_TI: Tensor,
    gate_TK: Tensor,
    stacks: Stacks,
    assignment: Assignment,
    form: ExpertForm,
    scales: Scales,
    keep_NI: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(m [T,I], d [T,H]) of the module's formula.

    Args:
        x_TH: input of the adapters, dropout applied; ``u_TI`` and ``v_TI`` are the frozen products of the input itself.
        gate_TK: fp32 or wider, weight of each choice of ``assignment``.
        keep_NI: false where dropout zeroes the adapter's view of h; None without dropout.

    The gradient of every factor is a whole stack, zero for experts without pairs. On a GPU in bf16 nothing is read back
    to the host; elsewhere the counts are.
    """
    dtype = u_TI.dtype
    factors = tuple(t.to(dtype) for t in stacks.tensors)
    if choose_backend(u_TI.device, dtype, x_TH.shape[1], u_TI.shape[1]).name == "loop":
        return _Mix.apply(x_TH, u_TI, v_TI, gate_TK, *factors, keep_NI, assignment, form, scales)
    if not _refuses_fused(u_TI, stacks, form):
        fused = importlib.import_module("lora.shared_fused").FusedMix
        return fused.apply(x_TH, u_TI, v_TI, gate_TK, *factors, keep_NI, assignment, scales.s, scales.s_down)
    inputs = (x_TH, u_TI, v_TI, gate_TK, *_aligned(*factors))
    return checkpoint(
        _grouped, *inputs, keep_NI, assignment, form, scales, use_reentrant=False, preserve_rng_state=False
    )


def _refuses_fused(u_TI: Tensor, stacks: Stacks, form: ExpertForm) -> str | None:
    if not is_plain_silu(form):
        return "the fused kernels know silu only"
    return refuses_fused(u_TI.device, u_TI.dtype, stacks.b_gate.shape[2])


def _aligned(a_in: Tensor, b_gate: Tensor, b_up: Tensor, a_down: Tensor, b_down: Tensor) -> tuple[Tensor, ...]:
    """The factors with a rank that grouped products take, gate and up each by itself."""
    a_in = aligned(a_in.unflatten(1, (2, -1)), 2).flatten(1, 2)
    return a_in, aligned(b_gate, 2), aligned(b_up, 2), aligned(a_down, 1), aligned(b_down, 2)


def _grouped(
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
    form: ExpertForm,
    scales: Scales,
) -> tuple[Tensor, Tensor]:
    """All pairs at once with grouped products; differentiable."""

    def product(x: Tensor, weight: Tensor) -> Tensor:
        return grouped_linear(x, weight, assignment.counts_L, "grouped_mm")

    def pairs(x: Tensor) -> Tensor:
        return spread_rows(x, assignment)

    z_gate, z_up = (product(pairs(x_TH), a_in) * scales.s).chunk(2, dim=1)
    gate_NI = pairs(u_TI) + product(z_gate.contiguous(), b_gate)
    up_NI = pairs(v_TI) + product(z_up.contiguous(), b_up)
    weight_N1 = assignment.spread(gate_TK).unsqueeze(1).to(u_TI.dtype)
    a_NI = between(torch.cat([gate_NI, up_NI], 1), form) * weight_N1
    seen_NI = a_NI if keep_NI is None else a_NI * keep_NI
    d_NH = product(product(seen_NI, a_down) * scales.s_down, b_down)
    return collect_rows(a_NI, assignment), collect_rows(d_NH, assignment)


class _Mix(torch.autograd.Function):
    """One expert after the other, each in a block that fits a cache. Keeps x, u, v, gates and [N,3R] of products."""

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
        form: ExpertForm,
        scales: Scales,
    ) -> tuple[Tensor, Tensor]:
        rank, pairs = b_gate.shape[2], assignment.pair_N.numel()
        m_TI, d_TH = torch.zeros_like(u_TI), torch.zeros_like(x_TH)
        z_N2R, w_NR = x_TH.new_empty(pairs, 2 * rank), x_TH.new_empty(pairs, rank)
        gate_N1, rows_N = gate_TK.flatten()[assignment.pair_N].to(u_TI.dtype)[:, None], assignment.row_N
        counts = assignment.counts_L.tolist()
        for e, at in _blocks(counts):
            rows, z, w = rows_N[at], z_N2R[at], w_NR[at]
            torch.mm(x_TH.index_select(0, rows), a_in[e].T, out=z).mul_(scales.s)
            a_nI = gated(*_before(u_TI, v_TI, rows, z, b_gate[e].T, b_up[e].T), form)[0].mul_(gate_N1[at])
            m_TI.index_add_(0, rows, a_nI)
            seen_nI = a_nI if keep_NI is None else a_nI.mul_(keep_NI[at])
            torch.mm(seen_nI, a_down[e].T, out=w).mul_(scales.s_down)
            d_TH.index_add_(0, rows, w @ b_down[e].T)
        ctx.save_for_backward(
            x_TH, u_TI, v_TI, gate_TK, a_in, b_gate, b_up, a_down, b_down, keep_NI, assignment.pair_N, z_N2R, w_NR
        )
        ctx.counts, ctx.form, ctx.scales = counts, form, scales
        return m_TI, d_TH

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dm_TI: Tensor, dd_TH: Tensor) -> tuple[Tensor | None, ...]:
        x_TH, u_TI, v_TI, gate_TK, a_in, b_gate, b_up, a_down, b_down, keep_NI, pair_N, z_N2R, w_NR = ctx.saved_tensors
        form, scales, rank = ctx.form, ctx.scales, b_gate.shape[2]
        dx_TH, du_TI, dv_TI, dgate_TK = (torch.zeros_like(t) for t in (x_TH, u_TI, v_TI, gate_TK))
        da_in, da_down = torch.zeros_like(a_in), torch.zeros_like(a_down)
        # Transposed, [E,R,O]: products over and along the long axis then run at twice the speed.
        b_gate, b_up, b_down = (b.transpose(1, 2).contiguous() for b in (b_gate, b_up, b_down))
        db_gate, db_up, db_down = (torch.zeros_like(b) for b in (b_gate, b_up, b_down))
        gate_N, rows_N = gate_TK.flatten()[pair_N], pair_N // gate_TK.shape[1]
        dgate_N, gate_N1 = torch.empty_like(gate_N), gate_N.to(u_TI.dtype)[:, None]
        for e, at in _blocks(ctx.counts):
            rows, z, w = rows_N[at], z_N2R[at], w_NR[at]
            dd_nH, da_nI = dd_TH.index_select(0, rows), dm_TI.index_select(0, rows)
            torch.mm(w.T, dd_nH, out=db_down[e])
            dw_nR = (dd_nH @ b_down[e].T).mul_(scales.s_down)
            if keep_NI is None:
                da_nI.addmm_(dw_nR, a_down[e])
            else:
                da_nI.add_((dw_nR @ a_down[e]).mul_(keep_NI[at]))
            gate_nI, up_nI = _before(u_TI, v_TI, rows, z, b_gate[e], b_up[e])
            value_nI, acted_nI = gated(gate_nI, up_nI, form)
            dgate_N[at] = (da_nI * value_nI).sum(-1)
            seen_nI = value_nI.mul_(gate_N1[at])
            torch.mm(dw_nR.T, seen_nI if keep_NI is None else seen_nI.mul_(keep_NI[at]), out=da_down[e])
            differentiate(da_nI.mul_(gate_N1[at]), gate_nI, up_nI, acted_nI, form, (gate_nI, up_nI))
            du_TI.index_add_(0, rows, gate_nI)
            dv_TI.index_add_(0, rows, up_nI)
            torch.mm(z[:, :rank].T, gate_nI, out=db_gate[e])
            torch.mm(z[:, rank:].T, up_nI, out=db_up[e])
            dz_n2R = torch.cat([gate_nI @ b_gate[e].T, up_nI @ b_up[e].T], 1).mul_(scales.s)
            torch.mm(dz_n2R.T, x_TH.index_select(0, rows), out=da_in[e])
            dx_TH.index_add_(0, rows, dz_n2R @ a_in[e])
        dgate_TK.view(-1)[pair_N] = dgate_N
        db = [b.transpose(1, 2) for b in (db_gate, db_up, db_down)]
        return (dx_TH, du_TI, dv_TI, dgate_TK, da_in, db[0], db[1], da_down, db[2], None, None, None, None)


def _blocks(counts: Sequence[int]) -> Iterator[tuple[int, slice]]:
    start = 0
    for expert, count in enumerate(counts):
        if count:
            yield expert, slice(start, start + count)
        start += count


def _before(
    u_TI: Tensor, v_TI: Tensor, rows: Tensor, z_n2R: Tensor, b_gate_RI: Tensor, b_up_RI: Tensor
) -> tuple[Tensor, Tensor]:
    """What the activation gets, [n,I] each: the shared products and one expert's own terms."""
    rank = b_gate_RI.shape[0]
    gate_nI = u_TI.index_select(0, rows).addmm_(z_n2R[:, :rank], b_gate_RI)
    return gate_nI, v_TI.index_select(0, rows).addmm_(z_n2R[:, rank:], b_up_RI)
