"""Whether the Triton kernels of low-rank products can run here, and if not, why."""

from __future__ import annotations

import functools

import torch

from lora.fold import Way
from moe.form import ExpertForm
from moe.kernels.probe import has_triton, is_plain_silu

MAX_RANK = 64
MAX_WIDTH = 256  # of all experts' ranks together, where one program has them all


@functools.cache
def refuses_fused(device: torch.device, dtype: torch.dtype, rank: int, width: int = 0) -> str | None:
    """Why they cannot; None if they can. ``width``: of what one program holds at once, a soft bank's ranks together."""
    if device.type != "cuda":
        return "the fused kernels need a CUDA device"
    if not has_triton():
        return "the fused kernels need triton, which is not installed"
    if dtype != torch.bfloat16:
        return f"the fused kernels need bfloat16, the model is {dtype}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "the fused kernels need compute capability 8.0"
    if rank > MAX_RANK:
        return f"the fused kernels take ranks up to {MAX_RANK}, this one is {rank}"
    if width > MAX_WIDTH:
        return f"the fused kernels take {MAX_WIDTH} ranks of a soft bank together, these are {width}"
    return None


def refuses_fused_experts(
    device: torch.device, dtype: torch.dtype, form: ExpertForm, biased: bool, way: Way, dropout: float, rank: int
) -> str | None:
    """Why :mod:`lora.expert_fused` cannot run a layer's experts; None if it can. ``dropout``: what is on, of a pair."""
    if way == "fold":
        return "fold was asked for"
    if dropout:
        return "the fused kernels know no dropout of experts' inputs"
    if not is_plain_silu(form) or biased:
        return "the fused kernels know plain silu experts without biases only"
    return refuses_fused(device, dtype, rank)
