"""What stands between an expert's two projections, for every family, and its derivative.

Half-precision rows are computed in fp32, some thousand at a time, so that no fp32 copy of them all is made.

Shapes: N rows, I intermediate. Their 2I axis holds gate and up, as :class:`~moe.form.ExpertForm` says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from transformers.activations import ACT2FN

from moe.form import ExpertForm

_CHUNK = 8192  # rows
_aten = torch.ops.aten
_Gradient = Callable[[Tensor, Tensor, Tensor], Tensor]
# name -> (value, gradient: from the value's gradient and the input, into a tensor that may be the input)
_KNOWN: dict[str, tuple[Callable[[Tensor], Tensor], _Gradient]] = {
    "silu": (torch.nn.functional.silu, lambda d, g, out: _aten.silu_backward.grad_input(d, g, grad_input=out)),
    "gelu": (torch.nn.functional.gelu, lambda d, g, out: _aten.gelu_backward.grad_input(d, g, grad_input=out)),
    "gelu_pytorch_tanh": (
        lambda g: torch.nn.functional.gelu(g, approximate="tanh"),
        lambda d, g, out: _aten.gelu_backward.grad_input(d, g, approximate="tanh", grad_input=out),
    ),
    "relu": (torch.relu, lambda d, g, out: torch.mul(d, g > 0, out=out)),
}


def split(h_N2I: Tensor, form: ExpertForm) -> tuple[Tensor, Tensor]:
    """Views of the gate's and the up projection's half, each [N,I]."""
    if form.interleaved:
        return h_N2I[..., ::2], h_N2I[..., 1::2]
    gate_NI, up_NI = h_N2I.chunk(2, dim=-1)
    return gate_NI, up_NI


def between(h_N2I: Tensor, form: ExpertForm) -> Tensor:
    """The up projection's output [N,2I] to the down projection's input [N,I]. Autograd knows its derivative."""
    gate_NI, up_NI = split(h_N2I, form)
    if form.limit is None:
        return ACT2FN[form.act](gate_NI) * up_NI
    gate_NI = gate_NI.clamp(max=form.limit)
    up_NI = up_NI.clamp(min=-form.limit, max=form.limit)
    return (up_NI + 1) * (gate_NI * torch.sigmoid(gate_NI * form.alpha))


def has_derivative(form: ExpertForm) -> bool:
    """Whether :func:`scaled_backward` knows the form's activation."""
    return form.limit is not None or form.act in _KNOWN


def scaled(h_N2I: Tensor, score_N: Tensor, form: ExpertForm) -> Tensor:
    """``score * between(h)`` [N,I] in h's dtype."""
    if h_N2I.dtype == score_N.dtype:
        return gated(*split(h_N2I, form), form)[0].mul_(score_N[:, None])
    a_NI = h_N2I.new_empty(h_N2I.shape[0], h_N2I.shape[1] // 2)
    for rows in _chunks(h_N2I.shape[0]):
        a_NI[rows] = scaled(h_N2I[rows].to(score_N.dtype), score_N[rows], form)
    return a_NI


def scaled_backward(
    da_NI: Tensor, h_N2I: Tensor, score_N: Tensor, form: ExpertForm, dh_N2I: Tensor
) -> tuple[Tensor, Tensor]:
    """The derivative of :func:`scaled`, and its value once more.

    Args:
        da_NI: gradient of the scaled activation; its memory is used.
        dh_N2I: receives the gradient of h; may be h itself.

    Returns (scaled activation [N,I], gradient of the score [N]).
    """
    if h_N2I.dtype == score_N.dtype:
        gate_NI, up_NI = split(h_N2I, form)
        value_NI, acted_NI = gated(gate_NI, up_NI, form)
        ds_N = (da_NI * value_NI).sum(-1)
        score_N1 = score_N[:, None]
        differentiate(da_NI.mul_(score_N1), gate_NI, up_NI, acted_NI, form, split(dh_N2I, form))
        return value_NI.mul_(score_N1), ds_N
    ds_N = torch.empty_like(score_N)
    for rows in _chunks(h_N2I.shape[0]):
        da, h = da_NI[rows].to(score_N.dtype), h_N2I[rows].to(score_N.dtype)
        da_NI[rows], ds_N[rows] = scaled_backward(da, h, score_N[rows], form, h)
        dh_N2I[rows] = h
    return da_NI, ds_N


def gated(gate_NI: Tensor, up_NI: Tensor, form: ExpertForm) -> tuple[Tensor, Tensor]:
    """``between(h)``, and the activated gate."""
    if form.limit is None:
        acted_NI = _KNOWN[form.act][0](gate_NI)
        return acted_NI * up_NI, acted_NI
    gate_NI = gate_NI.clamp(max=form.limit)
    acted_NI = gate_NI * torch.sigmoid(gate_NI * form.alpha)
    return (up_NI.clamp(min=-form.limit, max=form.limit) + 1) * acted_NI, acted_NI


def differentiate(
    d_NI: Tensor, gate_NI: Tensor, up_NI: Tensor, acted_NI: Tensor, form: ExpertForm, into: tuple[Tensor, Tensor]
) -> None:
    """From the gradient of ``between(h)`` to the gate's and the up projection's; ``into`` may be those themselves."""
    d_gate_NI, d_up_NI = into
    if form.limit is None:
        to_gate_NI = d_NI * up_NI
        _KNOWN[form.act][1](to_gate_NI, gate_NI, d_gate_NI)
        torch.mul(d_NI, acted_NI, out=d_up_NI)
        return
    limit, alpha = form.limit, form.alpha
    g_NI = gate_NI.clamp(max=limit)
    sigmoid_NI = torch.sigmoid(g_NI * alpha)
    slope_NI = sigmoid_NI * (1 + alpha * g_NI * (1 - sigmoid_NI)) * (gate_NI <= limit)
    to_gate_NI = d_NI * (up_NI.clamp(min=-limit, max=limit) + 1) * slope_NI
    torch.mul(d_NI * acted_NI, up_NI.abs() <= limit, out=d_up_NI)
    d_gate_NI.copy_(to_gate_NI)


def _chunks(rows: int) -> Iterator[slice]:
    return (slice(at, min(at + _CHUNK, rows)) for at in range(0, rows, _CHUNK))
