"""Products of several adapters over one batch: rows sorted by (expert, tenant), a frozen product under them.

A group is the rows of one tenant at one expert. On a CPU each group is multiplied on its own, so that no bit of a
tenant's rows depends on who else is in the batch; on a GPU one grouped product takes all groups, and the frozen product
all tenants' rows of an expert together.

Shapes: N rows, A tenants, L local experts (1 for a linear layer), R rank, M inputs, O outputs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora.factors import add_factored_delta, factored_delta
from moe.kernels.grouped import choose_backend, grouped_linear


@dataclass(frozen=True)
class Group:
    """Rows ``lo`` to ``hi`` belong to ``tenant`` and go through ``expert``."""

    tenant: int
    expert: int
    lo: int
    hi: int


@dataclass(frozen=True)
class Factors:
    """One tenant's A [L,R,M] and B [L,O,R]; the delta is ``scale * B A x``, with ``dropout`` on x."""

    a_LRM: Tensor
    b_LOR: Tensor
    scale: float
    dropout: float = 0.0


def groups_of(counts_LA: Sequence[Sequence[int]]) -> list[Group]:
    """The groups that have rows, given the rows of each (expert, tenant).

    >>> groups_of([[2, 0], [1, 3]])[-1]
    Group(tenant=1, expert=1, lo=3, hi=6)
    """
    groups, start = [], 0
    for expert, counts_A in enumerate(counts_LA):
        for tenant, count in enumerate(counts_A):
            if count:
                groups.append(Group(tenant, expert, start, start + count))
            start += count
    return groups


class FrozenProducts(torch.autograd.Function):
    """``y[n] = W_e x[n]``, one product for each group; W gets no gradient."""

    @staticmethod
    def forward(ctx, x_NM: Tensor, weight_LOM: Tensor, groups: Sequence[Group]) -> Tensor:
        y_NO = x_NM.new_empty(x_NM.shape[0], weight_LOM.shape[1])
        across = weight_LOM.transpose(1, 2).unbind(0)
        for g in groups:
            torch.mm(x_NM[g.lo : g.hi], across[g.expert], out=y_NO[g.lo : g.hi])
        ctx.save_for_backward(weight_LOM)
        ctx.groups = groups
        return y_NO

    @staticmethod
    def backward(ctx, dy_NO: Tensor):
        (weight_LOM,) = ctx.saved_tensors
        if not ctx.needs_input_grad[0]:
            return None, None, None
        dx_NM = dy_NO.new_empty(dy_NO.shape[0], weight_LOM.shape[2])
        back = weight_LOM.unbind(0)
        for g in ctx.groups:
            torch.mm(dy_NO[g.lo : g.hi], back[g.expert], out=dx_NM[g.lo : g.hi])
        return dx_NM, None, None


class AddDeltas(torch.autograd.Function):
    """Adds each group's ``scale_a B_ea A_ea x`` to ``y`` in place; ``factors`` are A_0, B_0, A_1, B_1, ...

    Keeps x and the [N, R] products. Gradients are whole stacks, zero for what had no rows.
    """

    @staticmethod
    def forward(ctx, y_NO: Tensor, x_NM: Tensor, groups: Sequence[Group], scales: Sequence[float], *factors: Tensor):
        ctx.mark_dirty(y_NO)
        down = [a_LRM.transpose(1, 2).unbind(0) for a_LRM in factors[::2]]
        up = [b_LOR.transpose(1, 2).unbind(0) for b_LOR in factors[1::2]]
        kept = []
        for g in groups:
            z_GR = torch.mm(x_NM[g.lo : g.hi], down[g.tenant][g.expert]).mul_(scales[g.tenant])
            y_NO[g.lo : g.hi].addmm_(z_GR, up[g.tenant][g.expert])
            kept.append(z_GR)
        ctx.save_for_backward(x_NM, *factors, *kept)
        ctx.groups, ctx.scales, ctx.num_factors = groups, scales, len(factors)
        return y_NO

    @staticmethod
    def backward(ctx, dy_NO: Tensor):
        x_NM, *rest = ctx.saved_tensors
        factors, kept = rest[: ctx.num_factors], rest[ctx.num_factors :]
        grads = [torch.zeros_like(factor) for factor in factors]
        split = [factor.unbind(0) for factor in factors]
        into = [grad.unbind(0) for grad in grads]
        dx_NM = torch.empty_like(x_NM) if ctx.needs_input_grad[1] else None
        for g, z_GR in zip(ctx.groups, kept, strict=True):
            a, b, e = 2 * g.tenant, 2 * g.tenant + 1, g.expert
            dy = dy_NO[g.lo : g.hi]
            torch.mm(dy.T, z_GR, out=into[b][e])
            dz = torch.mm(dy, split[b][e]).mul_(ctx.scales[g.tenant])
            torch.mm(dz.T, x_NM[g.lo : g.hi], out=into[a][e])
            if dx_NM is not None:
                torch.mm(dz, split[a][e], out=dx_NM[g.lo : g.hi])
        return dy_NO, dx_NM, None, None, *grads


def add_deltas(y_NO: Tensor, x_NM: Tensor, tenants: Sequence[Factors], counts_LA: Tensor, groups: Sequence[Group]):
    """``y`` plus every tenant's delta of ``x``; y may be overwritten.

    Args:
        counts_LA: rows of each (expert, tenant), int64, on the device; read on a GPU.
        groups: the same as the host knows it; read on a CPU.
    """
    if x_NM.is_cuda:
        return add_factored_delta(y_NO, x_NM, *_stacked(tenants), counts_LA.flatten(), _scale(tenants))
    flat = [factor for tenant in tenants for factor in (tenant.a_LRM, tenant.b_LOR)]
    return AddDeltas.apply(y_NO, x_NM, groups, [tenant.scale for tenant in tenants], *flat)


def _stacked_deltas(x_NM: Tensor, tenants: Sequence[Factors], counts_LA: Tensor) -> Tensor:
    """One grouped product over virtual experts (e, a), scaled where a single adapter is: after A, not in B's digits.

    All tenants have the same banks, so ranks and scales are the same.
    """
    return factored_delta(x_NM, *_stacked(tenants), counts_LA.flatten(), _scale(tenants))


def _stacked(tenants: Sequence[Factors]) -> tuple[Tensor, Tensor]:
    a_VRM = torch.stack([tenant.a_LRM for tenant in tenants], 1).flatten(0, 1)
    return a_VRM, torch.stack([tenant.b_LOR for tenant in tenants], 1).flatten(0, 1)


def _scale(tenants: Sequence[Factors]) -> float:
    (scale,) = {tenant.scale for tenant in tenants}
    return scale


def frozen_products(x_NM: Tensor, weight_LOM: Tensor, counts_LA: Tensor, groups: Sequence[Group]) -> Tensor:
    """``W_e x`` of every row, [N,O]."""
    if not x_NM.is_cuda:
        return FrozenProducts.apply(x_NM, weight_LOM, groups)
    backend = choose_backend(x_NM.device, x_NM.dtype, *weight_LOM.shape[1:]).name
    return grouped_linear(x_NM, weight_LOM, counts_LA.sum(1), backend)


def dropped(x_NM: Tensor, tenants: Sequence[Factors], rows: Sequence[Tensor | slice], streams: Sequence[str]) -> Tensor:
    """``x`` after each tenant's dropout.

    A tenant's mask is drawn from a stream of its own, in the order of its own rows: it is the same whoever else is in
    the batch, and when an activation-checkpointed layer runs again.

    Args:
        rows: where each tenant's rows are.
        streams: what each tenant's draws at this place and in this pass are keyed by.
    """
    if not any(tenant.dropout for tenant in tenants):
        return x_NM
    scale_NM = torch.ones_like(x_NM)
    for tenant, at, stream in zip(tenants, rows, streams, strict=True):
        if tenant.dropout:
            like = scale_NM[at]
            seed = int.from_bytes(hashlib.sha256(stream.encode()).digest()[:8], "little") >> 1
            generator = torch.Generator(device=x_NM.device).manual_seed(seed)
            keep = torch.rand(like.shape, generator=generator, device=x_NM.device) >= tenant.dropout
            scale_NM[at] = keep.to(x_NM.dtype) / (1.0 - tenant.dropout)
    return x_NM * scale_NM
