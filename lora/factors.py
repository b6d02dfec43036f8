"""Low-rank factors of stacked weights, and how they start.

Shapes: E experts (L of them local), N rows, R rank, M inputs, O outputs.
"""

from __future__ import annotations

import hashlib
import importlib
import math
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from lora.fused import refuses_fused
from moe.kernels.grouped import choose_backend, grouped_linear


def uniform_init(shape: Sequence[int], key: str) -> Tensor:
    """``kaiming_uniform(a=sqrt(5))`` over the last axis, drawn from a stream that ``key`` alone decides.

    One stream per factor of one global expert: the values cannot depend on how many experts a rank
    holds, on what was drawn before, or on the device.
    """
    bound = 1.0 / math.sqrt(shape[-1])
    return torch.empty(tuple(shape), dtype=torch.float32).uniform_(-bound, bound, generator=_stream(key))


def start_init(shape: Sequence[int], how: Literal["kaiming"] | float, key: str) -> Tensor:
    """:func:`uniform_init`, or a normal with standard deviation ``how`` from the same kind of stream."""
    if isinstance(how, str):
        return uniform_init(shape, key)
    return torch.empty(tuple(shape), dtype=torch.float32).normal_(0.0, how, generator=_stream(key))


def _stream(key: str) -> torch.Generator:
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little") >> 1
    return torch.Generator(device="cpu").manual_seed(seed)


def stacked_init(
    num_local: int, first: int, shape: Sequence[int], key: str, how: Literal["kaiming"] | float = "kaiming"
) -> Tensor:
    """[L, *shape]: one independent stream per global expert ``first .. first + num_local``."""
    return torch.stack([start_init(shape, how, f"{key}/expert {first + i}") for i in range(num_local)])


def _groups(rows: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    start = 0
    for expert, count in enumerate(rows):
        if count:
            yield expert, start, start + count
        start += count


class FactoredDelta(torch.autograd.Function):
    """``y[n] = scale * B_e A_e x[n]`` for rows sorted by expert e; never builds ``B_e A_e``.

    Keeps x, A, B and the [N, R] product for backward. Gradients of A and B are whole stacks: zero,
    not missing, for experts without rows and for calls without rows, because ranks that skip a
    gradient leave the others waiting in its reduction.
    """

    @staticmethod
    def forward(ctx, x_NM: Tensor, a_LRM: Tensor, b_LOR: Tensor, rows: Sequence[int], scale: float) -> Tensor:
        assert sum(rows) == x_NM.shape[0], (sum(rows), tuple(x_NM.shape))
        z_NR = x_NM.new_empty(x_NM.shape[0], a_LRM.shape[1])
        y_NO = x_NM.new_empty(x_NM.shape[0], b_LOR.shape[1])
        for e, lo, hi in _groups(rows):
            torch.mm(x_NM[lo:hi], a_LRM[e].T, out=z_NR[lo:hi])
            z_NR[lo:hi].mul_(scale)
            torch.mm(z_NR[lo:hi], b_LOR[e].T, out=y_NO[lo:hi])
        ctx.save_for_backward(x_NM, a_LRM, b_LOR, z_NR)
        ctx.rows, ctx.scale = tuple(rows), scale
        return y_NO

    @staticmethod
    def backward(ctx, dy_NO: Tensor):
        x_NM, a_LRM, b_LOR, z_NR = ctx.saved_tensors
        needs_x, needs_a, needs_b = ctx.needs_input_grad[:3]
        dx_NM = torch.empty_like(x_NM) if needs_x else None
        da_LRM = torch.zeros_like(a_LRM) if needs_a else None
        db_LOR = torch.zeros_like(b_LOR) if needs_b else None
        for e, lo, hi in _groups(ctx.rows):
            dy = dy_NO[lo:hi]
            if needs_b:
                torch.mm(dy.T, z_NR[lo:hi], out=db_LOR[e])
            if needs_a or needs_x:
                dz = (dy @ b_LOR[e]).mul_(ctx.scale)
            if needs_a:
                torch.mm(dz.T, x_NM[lo:hi], out=da_LRM[e])
            if needs_x:
                torch.mm(dz, a_LRM[e], out=dx_NM[lo:hi])
        return dx_NM, da_LRM, db_LOR, None, None


def factored_delta(x_NM: Tensor, a_LRM: Tensor, b_LOR: Tensor, counts_L: Tensor, scale: float) -> Tensor:
    """``scale * B_e A_e x`` [N, O] for rows sorted by expert, ``counts_L[l]`` of them for local expert l.

    A factor with one entry in place of L is shared by all experts.
    """
    if not refuses_fused(x_NM.device, x_NM.dtype, a_LRM.shape[1]):
        return _fused(None, x_NM, a_LRM, b_LOR, counts_L, scale)
    local = counts_L.shape[0]
    a_LRM, b_LOR = (t.to(x_NM.dtype).expand(local, -1, -1) for t in (a_LRM, b_LOR))
    backend = choose_backend(x_NM.device, x_NM.dtype, a_LRM.shape[2], b_LOR.shape[1]).name
    if backend == "loop":
        return FactoredDelta.apply(x_NM, a_LRM, b_LOR, counts_L.tolist(), scale)
    z_NR = grouped_linear(x_NM, aligned(a_LRM, 1), counts_L, backend) * scale
    return grouped_linear(z_NR, aligned(b_LOR, 2), counts_L, backend)


def add_factored_delta(
    y_NO: Tensor, x_NM: Tensor, a_LRM: Tensor, b_LOR: Tensor, counts_L: Tensor, scale: float
) -> Tensor:
    """``y`` plus :func:`factored_delta`; y may be overwritten."""
    if not refuses_fused(x_NM.device, x_NM.dtype, a_LRM.shape[1]):
        return _fused(y_NO, x_NM, a_LRM, b_LOR, counts_L, scale)
    return y_NO + factored_delta(x_NM, a_LRM, b_LOR, counts_L, scale)


def _fused(y_NO: Tensor | None, x_NM: Tensor, a_LRM: Tensor, b_LOR: Tensor, counts_L: Tensor, scale: float) -> Tensor:
    delta = importlib.import_module("lora.factored_fused").FusedDelta
    return delta.apply(y_NO, x_NM, a_LRM.to(x_NM.dtype), b_LOR.to(x_NM.dtype), counts_L, scale)


def aligned(factor: Tensor, axis: int) -> Tensor:
    """``factor`` with its rank, which is that axis, filled up with zeros to a multiple of 8, as grouped products want.

    Both factors of a product have to be: the delta stays what it was, and so do the gradients of what was there.
    """
    lacking = -factor.shape[axis] % 8
    return F.pad(factor, (0, 0) * (factor.dim() - 1 - axis) + (0, lacking)) if lacking else factor
