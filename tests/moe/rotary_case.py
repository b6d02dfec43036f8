"""A family's rotary embedding beside ours, on a GPU or interpreted."""

import sys

import torch

from moe.rotary import _can, _Fused


def module_of(model):
    return sys.modules[next(type(m).__module__ for m in model.modules() if type(m).__name__.endswith("Attention"))]


def cases():
    """B, S, N, M, D, and rows of angles."""
    return [(2, 40, 4, 2, 16, 1), (3, 7, 5, 1, 6, 3), (1, 1, 1, 1, 2, 1), (2, 9, 64, 2, 96, 2), (0, 4, 2, 2, 8, 1)]


def compare(module, case, dtype, device):
    batch, length, queries, keys, size, rows = case
    generator = torch.Generator().manual_seed(sum(case))
    draw = lambda *shape: torch.randn(shape, generator=generator).to(device, dtype)  # noqa: E731
    # As a model has them: q's heads side by side, k's in some other order.
    q, k = draw(batch, length, queries, size).transpose(1, 2), draw(batch, keys, length, size)
    angle = torch.rand(rows, length, size, generator=generator).to(device) * 6
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    back = draw(batch, length, queries, size).transpose(1, 2), draw(batch, keys, length, size)
    theirs = getattr(module.apply_rotary_pos_emb, "theirs", module.apply_rotary_pos_emb)
    assert _can(q, k, cos, sin)
    results = []
    for function in (theirs, _Fused(theirs)):
        mine = [x.detach().requires_grad_() for x in (q, k)]
        out = function(*mine, cos, sin)
        torch.autograd.backward(out, back)
        results.append([*out, *(x.grad for x in mine)])
    for want, got in zip(*results, strict=True):
        assert torch.equal(got, want)
    assert results[1][0].transpose(1, 2).is_contiguous()
