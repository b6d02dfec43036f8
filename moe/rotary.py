"""Rotary position embedding as one operation, and one back, where transformers' attention takes forty.

The host has to queue each of them (figures: docs/measurements.md).

Shapes: B rows, S positions, N heads of queries, M of keys, D numbers of a head.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moe.kernels.probe import runs_triton

_NAME = "apply_rotary_pos_emb"
_TYPES = (torch.bfloat16, torch.float16)  # the kernel rounds each product as these do
Apply = Callable[..., tuple[Tensor, Tensor]]


def fuse_rotary(model: nn.Module) -> int:
    """Have the attention of a model's family run our kernel wherever it can, with the same bits, gradients included.

    The function is the module's in which the family's attention is written, for all models of the process. Returns in
    how many such modules it is ours now.
    """
    found = {type(module).__module__ for module in model.modules() if type(module).__name__.endswith("Attention")}
    fused = 0
    for module in (sys.modules[name] for name in sorted(found)):
        theirs = getattr(module, _NAME, None)
        if isinstance(theirs, _Fused):
            fused += 1
        elif theirs is not None and _turns_halves(theirs):
            setattr(module, _NAME, _Fused(theirs))
            fused += 1
    return fused


class _Fused:
    """Called as transformers' function; ``theirs`` where the kernel cannot run."""

    def __init__(self, theirs: Apply) -> None:
        self.theirs = theirs
        functools.update_wrapper(self, theirs)

    def __call__(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **options: Any) -> Any:
        if args or options or not _can(q, k, cos, sin):
            return self.theirs(q, k, cos, sin, *args, **options)
        return _Rotate.apply(q, k, cos, sin)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_BNSD: Tensor, k_BMSD: Tensor, cos_BSD: Tensor, sin_BSD: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos_BSD, sin_BSD)
        return _rotated(q_BNSD, k_BMSD, cos_BSD, sin_BSD, back=False)

    @staticmethod
    def backward(ctx, d_q_BNSD: Tensor, d_k_BMSD: Tensor) -> tuple[Tensor, Tensor, None, None]:
        return *_rotated(d_q_BNSD, d_k_BMSD, *ctx.saved_tensors, back=True), None, None


def _rotated(q_BNSD: Tensor, k_BMSD: Tensor, cos_BSD: Tensor, sin_BSD: Tensor, back: bool) -> tuple[Tensor, Tensor]:
    from moe.kernels.rotary import rotate

    # Heads lie side by side in memory, as the projections made them.
    q_BSND, k_BSMD = (x.transpose(1, 2).contiguous() for x in (q_BNSD, k_BMSD))
    flat = [x.flatten(0, 1) for x in (q_BSND, k_BSMD, cos_BSD, sin_BSD)]
    q_TND, k_TMD = rotate(*flat, back)
    return q_TND.view(q_BSND.shape).transpose(1, 2), k_TMD.view(k_BSMD.shape).transpose(1, 2)


def _can(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
    same = q.dtype == k.dtype == cos.dtype == sin.dtype and q.dtype in _TYPES
    if not same or q.dim() != 4 or k.dim() != 4 or not runs_triton(q.device):
        return False
    batch, length, size = q.shape[0], q.shape[2], q.shape[3]
    angles = cos.dim() == 3 and cos.shape in ((batch, length, size), (1, length, size)) and cos.shape == sin.shape
    sizes = k.shape[0] == batch and k.shape[2:] == q.shape[2:] and size % 2 == 0
    return (
        angles
        and sizes
        and cos.is_contiguous()
        and sin.is_contiguous()
        and not (cos.requires_grad or sin.requires_grad)
    )


def _turns_halves(theirs: Apply) -> bool:
    """Whether it is ``x cos + (-x_high, x_low) sin``, asked by trying: families differ, and versions of one."""
    generator, shapes = torch.Generator().manual_seed(0), ((1, 2, 3, 8), (1, 1, 3, 8), (1, 3, 8), (1, 3, 8))
    q, k, cos, sin = (torch.rand(shape, generator=generator).bfloat16() for shape in shapes)
    try:
        q_found, k_found = theirs(q, k, cos, sin)
        return torch.equal(q_found, _turned(q, cos, sin)) and torch.equal(k_found, _turned(k, cos, sin))
    except Exception:  # it wants other arguments or shapes, or gives another number of results
        return False


def _turned(x_BNSD: Tensor, cos_BSD: Tensor, sin_BSD: Tensor) -> Tensor:
    low, high = x_BNSD.chunk(2, -1)
    return x_BNSD * cos_BSD[:, None] + torch.cat([-high, low], -1) * sin_BSD[:, None]
