"""Expert products over rows sorted by expert: one loop of dense products, or one grouped product.

Shapes: N rows (token copies, sorted by local expert), L local experts, M inputs and O outputs of one projection.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Backend:
    """The chosen implementation and, for the user, why."""

    name: str
    reason: str


def choose_backend(device: torch.device, dtype: torch.dtype, *widths: int) -> Backend:
    """Probe which implementation fits ``device`` and ``dtype``; ``widths`` are the inner and outer matrix sizes."""
    if device.type != "cuda":
        return Backend("loop", "CPU: one dense product per expert is the fastest path torch has")
    if not hasattr(torch.nn.functional, "grouped_mm"):
        return Backend("loop", "this torch has no grouped_mm")
    if dtype != torch.bfloat16:
        return Backend("loop", f"grouped_mm needs bfloat16, the model is {dtype}")
    if any(width % 8 for width in widths):
        return Backend("loop", f"grouped_mm needs sizes divisible by 8, the experts have {widths}")
    if torch.cuda.get_device_capability(device) < (8, 0):
        return Backend("loop", "grouped_mm needs compute capability 8.0")
    return Backend("grouped_mm", "CUDA, bfloat16, aligned sizes")


def grouped_linear(x_NM: Tensor, weight_LOM: Tensor, counts_L: Tensor, backend: str) -> Tensor:
    """``y[n] = weight[expert(n)] @ x[n]``; ``counts_L[l]`` rows at a time belong to expert ``l``. Returns [N, O]."""
    if backend == "grouped_mm":
        ends_L = counts_L.to(device=x_NM.device).cumsum(0).to(torch.int32)
        return torch.nn.functional.grouped_mm(x_NM, weight_LOM.transpose(-2, -1), offs=ends_L)
    # unbind, not indexing: its backward stacks once, where W[e] would allocate a full zero gradient per expert.
    rows = x_NM.split(counts_L.tolist())
    return torch.cat([torch.nn.functional.linear(x, w) for x, w in zip(rows, weight_LOM.unbind(0), strict=True)])
