"""Linear layers of a transformers model as few large products; modules with adapters are called as they are.

Shapes: R rows, M inputs, O outputs, H hidden, I intermediate.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe.kernels.probe import runs_triton

Function = Callable[[Tensor], Tensor]
_ADDED = (torch.bfloat16, torch.float16, torch.float32)  # what the kernel of a sum and its norm adds up in float32


def is_plain(module: nn.Module) -> bool:
    """Whether it is a linear layer and nothing else: no adapter in its place or on it."""
    return type(module) is nn.Linear and not module._forward_hooks and not module._forward_pre_hooks


@dataclass(frozen=True)
class Linear:
    """``W x + b`` with the weights [O,M] of a module."""

    weight_OM: Tensor
    bias_O: Tensor | None

    def __call__(self, x_RM: Tensor) -> Tensor:
        return F.linear(x_RM, self.weight_OM, self.bias_O)


@dataclass(frozen=True)
class _Apart:
    """Several modules on one input, their outputs side by side."""

    modules: tuple[nn.Module, ...]

    def __call__(self, x_RM: Tensor) -> Tensor:
        return torch.cat([module(x_RM) for module in self.modules], dim=-1)


def linear(module: nn.Module) -> Function:
    return Linear(module.weight, module.bias) if is_plain(module) else module


def joined(modules: Sequence[nn.Module]) -> Function:
    """Linear layers with one input as one product; apart if one of them has an adapter.

    The modules' weights become views of the joined one, so nothing is held twice.
    """
    if not all(is_plain(module) for module in modules):
        return _Apart(tuple(modules))
    weight_OM = _beside([module.weight.detach() for module in modules])
    bias_O = None
    if any(module.bias is not None for module in modules):
        parts = [weight_OM.new_zeros(m.out_features) if m.bias is None else m.bias.detach() for m in modules]
        bias_O = _beside(parts)
    start = 0
    for module in modules:
        end = start + module.out_features
        module.weight = nn.Parameter(weight_OM[start:end], requires_grad=False)
        if module.bias is not None:
            module.bias = nn.Parameter(bias_O[start:end], requires_grad=False)
        start = end
    return Linear(weight_OM, bias_O)


def _beside(parts: Sequence[Tensor]) -> Tensor:
    """Tensors joined along their first dimension; without a copy where another model over the same weights did it."""
    first, end = parts[0], parts[0].data_ptr()
    for part in parts:
        same = part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not same or part.data_ptr() != end or not part.is_contiguous():
            return torch.cat(list(parts))
        end += part.nbytes
    return first.as_strided((sum(map(len, parts)), *first.shape[1:]), first.stride())


class Norm:
    """Root mean square normalisation (Zhang and Sennrich, arXiv 1910.07467), as transformers' modules do it."""

    def __init__(self, weight_H: Tensor, eps: float) -> None:
        self.weight_H, self.eps = weight_H, eps
        self._shape, self._share = tuple(weight_H.shape[-1:]), 1 / weight_H.shape[-1]
        self._eps = torch.tensor(eps, dtype=weight_H.dtype)
        # torch's own is one kernel on a GPU, but six small operations on a CPU, where each costs more than its work.
        self._short = weight_H.device.type == "cpu" and weight_H.dtype in (torch.float32, torch.float64)
        self._add_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]] | None = None
        if weight_H.dim() == 1 and weight_H.dtype in _ADDED and runs_triton(weight_H.device):
            self._add_norm = importlib.import_module("inference.decode_kernels").add_norm

    @classmethod
    def of(cls, module: nn.Module, dtype: torch.dtype) -> Norm:
        eps = getattr(module, "variance_epsilon", None)
        return cls(module.weight.detach().to(dtype), float(module.eps if eps is None else eps))

    def behind(self, x_RH: Tensor, added_RH: Tensor) -> tuple[Tensor, Tensor]:
        """(the sum, its norm)."""
        if self._add_norm is not None:
            return self._add_norm(x_RH, added_RH, self.weight_H, self.eps)
        x_RH = x_RH + added_RH
        return x_RH, self(x_RH)

    def __call__(self, x: Tensor) -> Tensor:
        """Over the last axis. ``weight_H`` may have more axes, [.,H]: other weights for other heads."""
        if self._short:
            norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
            return x * torch.addcmul(self._eps, norm, norm, value=self._share).rsqrt_() * self.weight_H
        if self.weight_H.dim() == 1:
            return F.rms_norm(x, self._shape, self.weight_H, self.eps)
        return F.rms_norm(x, self._shape, None, self.eps) * self.weight_H


class GatedMLP:
    """``down(act(gate x) * up x)`` with gate and up in one product."""

    def __init__(self, module: nn.Module) -> None:
        self._gate_up = joined((module.gate_proj, module.up_proj))
        self._down = linear(module.down_proj)
        self._act = module.act_fn

    def __call__(self, x_RH: Tensor) -> Tensor:
        gate_RI, up_RI = self._gate_up(x_RH).chunk(2, dim=-1)
        return self._down(self._act(gate_RI) * up_RI)


def feed_forward(module: nn.Module) -> Function:
    """A layer's feed-forward block [R,H] -> [R,H]: ours for a plain gated one, else the module itself.

    A mixture's block is transformers' own: gate, shared experts and whatever adapters are beside it.
    """
    own = type(module).__module__.startswith("transformers.") and not module._forward_hooks
    if own and all(
        isinstance(getattr(module, name, None), nn.Linear) for name in ("gate_proj", "up_proj", "down_proj")
    ):
        return GatedMLP(module)

    def block(x_RH: Tensor) -> Tensor:
        out = module(x_RH[None])
        return (out[0] if isinstance(out, tuple) else out)[0]

    return block
