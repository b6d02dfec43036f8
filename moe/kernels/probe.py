"""What can run here."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch
from torch import Tensor

from moe.form import ExpertForm


@functools.cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def runs_triton(device: torch.device) -> bool:
    """Whether kernels run there: on a GPU, and on a CPU where they are interpreted (TRITON_INTERPRET=1)."""
    if not has_triton():
        return False
    if device.type == "cuda":
        return True
    if not os.environ.get("TRITON_INTERPRET"):
        return False
    from triton import knobs

    return bool(knobs.runtime.interpret)


def fuses_elementwise(h_N2I: Tensor, form: ExpertForm) -> bool:
    """Whether :mod:`moe.kernels.elementwise` has the form's activation and can run on h's device."""
    return is_plain_silu(form) and runs_triton(h_N2I.device)


def is_plain_silu(form: ExpertForm) -> bool:
    """What the Triton kernels know: gate rows first, silu, no limit."""
    return form.act == "silu" and form.limit is None and not form.interleaved


def refuses_grouped(device: torch.device, dtype: torch.dtype, *widths: int) -> str | None:
    """Why torch's grouped product cannot run; None if it can. ``widths`` are the matrices' inner and outer sizes."""
    if device.type != "cuda":
        return "CPU: one dense product per expert is the fastest path torch has"
    if not hasattr(torch.nn.functional, "grouped_mm"):
        return "this torch has no grouped_mm"
    if dtype != torch.bfloat16:
        return f"grouped_mm needs bfloat16, the model is {dtype}"
    if any(width % 8 for width in widths):
        return f"grouped_mm needs sizes divisible by 8, the experts have {widths}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "grouped_mm needs compute capability 8.0"
    return None
