"""Which implementation runs an expert layer: chosen by a probe, or fixed by the recipe, always with a reason.

``reference``: one pair at a time. ``grouped_mm``: a composition of differentiable pieces, with room for any adapter.
``minimal``: a function that saves little; an adapter may bring its own. ``triton``: the same with gather and activation
inside the products.
"""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass
from types import ModuleType
from typing import Literal

import torch

from moe.form import ExpertForm
from moe.kernels.activation import has_derivative
from moe.kernels.grouped import Backend
from moe.kernels.probe import has_triton, is_plain_silu, refuses_grouped

NAMES = ("reference", "grouped_mm", "minimal", "triton")


class BackendError(ValueError):
    """The backend that was asked for cannot run here."""


Adapted = Literal["no", "pieces", "whole"]


@dataclass(frozen=True)
class Site:
    """What the choice depends on. ``adapted``: whether an adapter is on these experts, and whether it adds to the
    ``pieces`` only or can compute the ``whole`` layer, as it can while the weights are frozen."""

    device: torch.device
    dtype: torch.dtype
    hidden: int
    inner: int
    form: ExpertForm
    biased: bool = False
    adapted: Adapted = "no"

    @property
    def widths(self) -> tuple[int, int, int]:
        return self.hidden, self.inner, 2 * self.inner


@functools.cache
def choose(site: Site, wanted: str = "auto") -> Backend:
    """Raises BackendError if ``wanted`` (``auto`` or one of :data:`NAMES`) cannot run at ``site``, saying why."""
    if wanted == "auto":
        refused = _refuses_fused(site)
        if refused:
            return Backend("grouped_mm", f"{refused}; {_products(site)}")
        return Backend("minimal", f"saves x, pre-activations and scores only; {_products(site)}")
    if wanted not in NAMES:
        raise BackendError(f"experts_backend {wanted!r} is unknown; choose auto, {', '.join(NAMES)}")
    refused = _refusal(site, wanted)
    if refused:
        raise BackendError(f"experts_backend {wanted!r} cannot run here: {refused}; choose auto to have one found")
    if wanted == "triton":
        return Backend(wanted, "chosen by the recipe; gather and activation inside the products")
    return Backend(wanted, f"chosen by the recipe; {_products(site)}")


def _products(site: Site) -> str:
    return refuses_grouped(site.device, site.dtype, *site.widths) or "torch's grouped_mm: CUDA, bfloat16, aligned sizes"


def _refuses_fused(site: Site) -> str | None:
    if site.adapted == "pieces":
        return "its adapter needs the sorted rows and the activation, which only the unfused path has"
    if not has_derivative(site.form):
        return f"the derivative of {site.form.act!r} is not known"
    return None


def _refusal(site: Site, wanted: str) -> str | None:
    if wanted == "grouped_mm":
        return None
    if wanted == "minimal":
        return _refuses_fused(site)
    if site.adapted != "no":
        return "it has no room for an adapter on the experts"
    if wanted == "reference":
        return None
    return _refuses_triton(site)


def _refuses_triton(site: Site) -> str | None:
    if not has_triton():
        return "triton is not installed"
    if not is_plain_silu(site.form) or site.form.transposed or site.biased:
        return "its kernels know plain silu experts only (gate rows first, no biases, not transposed)"
    if not _interpreted():
        if site.device.type != "cuda":
            return "it needs a CUDA device (or TRITON_INTERPRET=1, which is slow)"
        if site.dtype != torch.bfloat16:
            return f"it needs bfloat16, the model is {site.dtype}"
        if torch.cuda.get_device_capability(site.device) < (8, 0):
            return "it needs compute capability 8.0"
    return None


def _interpreted() -> bool:
    from triton import knobs

    return bool(knobs.runtime.interpret)


@functools.cache
def passes(site: Site, name: str) -> ModuleType:
    """The module whose products a fused backend uses, see :class:`moe.kernels.stack.Pass`."""
    if name == "triton":
        return importlib.import_module("moe.kernels.fused")
    refused = refuses_grouped(site.device, site.dtype, *site.widths)
    return importlib.import_module("moe.kernels.loops" if refused else "moe.kernels.batched")
