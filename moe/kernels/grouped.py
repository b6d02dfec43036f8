"""Expert products over rows sorted by expert: one loop of dense products, or one grouped product.

Shapes: N rows (token copies, sorted by local expert), L local experts, M inputs and O outputs of one projection.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from moe.kernels.probe import refuses_grouped

MOST_GROUPS = 1023  # of one of torch's grouped products on CUDA
# What torch says of the setting that room_for_exchange uses, once in each process.
warnings.filterwarnings("ignore", message="Setting the SM carveout for matmuls is a temporary")
ROOM = 16  # multiprocessors that an exchange of tokens gets, see :func:`room_for_exchange`


@dataclass(frozen=True)
class Backend:
    """The chosen implementation and, for the user, why."""

    name: str
    reason: str


def choose_backend(device: torch.device, dtype: torch.dtype, *widths: int) -> Backend:
    """Probe which product fits ``device`` and ``dtype``; ``widths`` are the inner and outer matrix sizes."""
    refused = refuses_grouped(device, dtype, *widths)
    return Backend("loop", refused) if refused else Backend("grouped_mm", "CUDA, bfloat16, aligned sizes")


@contextmanager
def room_for_exchange(device: torch.device) -> Iterator[None]:
    """Products queued inside leave some multiprocessors to an exchange that runs beside them.

    torch's grouped product gives every multiprocessor its share of tiles at the start. Where an exchange holds some of
    them, their share would begin when it ends, and the product would take the time of both.
    """
    if device.type != "cuda" or not ROOM:
        yield
        return
    before = torch._C._get_sm_carveout_experimental()
    torch._C._set_sm_carveout_experimental(ROOM)
    try:
        yield
    finally:
        torch._C._set_sm_carveout_experimental(before)


def group_ends(counts_L: Tensor) -> Tensor:
    """Where each expert's rows end, as torch's grouped product wants it; nothing is read back."""
    return counts_L.cumsum(0).to(torch.int32)


def grouped_linear(x_NM: Tensor, weight_LOM: Tensor, counts_L: Tensor, backend: str) -> Tensor:
    """``y[n] = weight[expert(n)] @ x[n]``; ``counts_L[l]`` rows at a time belong to expert ``l``. Returns [N, O]."""
    if backend == "grouped_mm":
        ends_L = group_ends(counts_L.to(device=x_NM.device))
        if ends_L.numel() > MOST_GROUPS:
            return _in_chunks(x_NM, weight_LOM, ends_L)
        return torch.nn.functional.grouped_mm(x_NM, weight_LOM.transpose(-2, -1), offs=ends_L)
    # unbind, not indexing: its backward stacks once, where W[e] would allocate a full zero gradient per expert.
    rows = x_NM.split(counts_L.tolist())
    return torch.cat([torch.nn.functional.linear(x, w) for x, w in zip(rows, weight_LOM.unbind(0), strict=True)])


def _in_chunks(x_NM: Tensor, weight_LOM: Tensor, ends_L: Tensor) -> Tensor:
    """More groups than one product takes: one after another over some of the groups, on all rows.

    Where a chunk's rows begin only the device knows. Rows of other chunks are zeroed, not left out: what they hold, be
    it not a number, must not reach a weight's gradient.
    """
    rows, y_NO = torch.arange(x_NM.shape[0], device=x_NM.device)[:, None], None
    for first in range(0, ends_L.numel(), MOST_GROUPS):
        ends_C = ends_L[first : first + MOST_GROUPS]
        inside = rows < ends_C[-1]
        if first:
            inside &= rows >= ends_L[first - 1]
        # The first group has the rows before the chunk, too, and the last one those behind it.
        offs_C = torch.cat([ends_C[:-1], torch.full_like(ends_C[-1:], x_NM.shape[0])])
        across = weight_LOM[first : first + MOST_GROUPS].transpose(-2, -1)
        part_NO = torch.nn.functional.grouped_mm(x_NM.where(inside, 0), across, offs=offs_C)
        y_NO = part_NO if y_NO is None else part_NO.where(inside, y_NO)
    assert y_NO is not None
    return y_NO
