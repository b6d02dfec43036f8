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
# name -> (value, gradient from the value's gradient and the input)
_KNOWN: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "silu": (torch.nn.functional.silu, _aten.silu_backward),
    "gelu": (torch.nn.functional.gelu, _aten.gelu_backward),
    "gelu_pytorch_tanh": (
        lambda g: torch.nn.functional.gelu(g, approximate="tanh"),
        lambda d, g: _aten.gelu_backward(d, g, approximate="tanh"),
    ),
    "relu": (torch.relu, lambda d, g: d * (g > 0)),
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
    a_NI = h_N2I.new_empty(h_N2I.shape[0], h_N2I.shape[1] // 2)
    for rows in _chunks(h_N2I):
        value, _, _ = _value_and_factors(h_N2I[rows].to(score_N.dtype), form)
        a_NI[rows] = value.mul_(score_N[rows, None])
    return a_NI


def scaled_backward(
    da_NI: Tensor, h_N2I: Tensor, score_N: Tensor, form: ExpertForm, dh_N2I: Tensor
) -> tuple[Tensor, Tensor]:
    """The derivative of :func:`scaled`, and its value once more.

    Args:
        da_NI: gradient of the scaled activation; overwritten by the scaled activation.
        dh_N2I: receives the gradient of h; may be h itself.

    Returns (scaled activation [N,I], gradient of the score [N]).
    """
    ds_N = torch.empty_like(score_N)
    for rows in _chunks(h_N2I):
        score_N1 = score_N[rows, None]
        da = da_NI[rows].to(score_N.dtype)
        value, to_gate, to_up = _value_and_factors(h_N2I[rows].to(score_N.dtype), form)
        torch.sum(da * value, -1, out=ds_N[rows])
        da = da * score_N1
        d_gate, d_up = to_gate(da), to_up(da)
        da_NI[rows] = value.mul_(score_N1)
        gate_out, up_out = split(dh_N2I[rows], form)
        gate_out.copy_(d_gate)
        up_out.copy_(d_up)
    return da_NI, ds_N


_Factor = Callable[[Tensor], Tensor]


def _value_and_factors(h_N2I: Tensor, form: ExpertForm) -> tuple[Tensor, _Factor, _Factor]:
    """``between(h)`` [N,I], and what turns its gradient into the gate's and the up projection's."""
    gate_NI, up_NI = split(h_N2I, form)
    if form.limit is None:
        act, act_backward = _KNOWN[form.act]
        acted_NI = act(gate_NI)
        return acted_NI * up_NI, lambda d: act_backward(d * up_NI, gate_NI), lambda d: d * acted_NI
    limit, alpha = form.limit, form.alpha
    g_NI, u_NI = gate_NI.clamp(max=limit), up_NI.clamp(min=-limit, max=limit)
    sigmoid_NI = torch.sigmoid(g_NI * alpha)
    glu_NI = g_NI * sigmoid_NI
    slope_NI = sigmoid_NI * (1 + alpha * g_NI * (1 - sigmoid_NI)) * (gate_NI <= limit)
    return (u_NI + 1) * glu_NI, lambda d: d * (u_NI + 1) * slope_NI, lambda d: d * glu_NI * (up_NI.abs() <= limit)


def _chunks(h_N2I: Tensor) -> Iterator[slice]:
    rows = h_N2I.shape[0]
    step = _CHUNK if h_N2I.dtype in (torch.bfloat16, torch.float16) else max(rows, 1)
    return (slice(at, min(at + step, rows)) for at in range(0, rows, step))
