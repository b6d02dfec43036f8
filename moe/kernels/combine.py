"""Add up each row's pairs: a gather, so the order of additions is fixed and there are no atomics.

Shapes: R rows, K choices per row, N sorted pairs, S rows that came back from W ranks, H hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe.assignment import Assignment
from moe.kernels import probe

_CHUNK = 2048  # rows


def empty_pairs(like_XH: Tensor, width: int, assignment: Assignment) -> Tensor:
    """[N,width], or [N+1,width] with a last row of zeros that choices without a local expert point at."""
    pairs = assignment.pair_N.numel()
    rows_NH = like_XH.new_empty(pairs + (not assignment.complete), width)
    if not assignment.complete:
        rows_NH[pairs] = 0
    return rows_NH


def combine(y_NH: Tensor, assignment: Assignment) -> Tensor:
    """Sum over each row's choices, in fp32 if y is narrower: [N,H] -> [R,H]. y may have the row of zeros already."""
    return sum_pairs(y_NH, assignment.slot_RK, assignment)


def sum_pairs(y_NH: Tensor, slot_RK: Tensor, assignment: Assignment) -> Tensor:
    """:func:`combine` of some of the rows, whose slots are given."""
    if y_NH.dtype != torch.float64 and probe.runs_triton(y_NH.device):
        from moe.kernels.elementwise import gather_sum

        return gather_sum(y_NH, slot_RK, assignment.pair_N.numel())
    if not assignment.complete and y_NH.shape[0] == assignment.pair_N.numel():
        y_NH = torch.cat([y_NH, y_NH.new_zeros(1, y_NH.shape[1])])
    if y_NH.dtype in (torch.float32, torch.float64):
        # torch's only gather and sum in one pass; it has no gradient here, and needs none.
        return torch.nn.functional.embedding_bag(slot_RK, y_NH, mode="sum")
    out_RH = y_NH.new_empty(slot_RK.shape[0], y_NH.shape[1])
    for at in range(0, slot_RK.shape[0], _CHUNK):
        part_RK = slot_RK[at : at + _CHUNK]
        summed_RH = y_NH[part_RK.flatten()].view(*part_RK.shape, -1).sum(1, dtype=torch.float32)
        out_RH[at : at + _CHUNK] = summed_RH
    return out_RH


def add_returned(base_RH: Tensor, y_SH: Tensor, slot_RW: Tensor) -> Tensor:
    """Each row and those of ``y`` that its slots point at, summed; slot S points at none."""
    if y_SH.dtype != torch.float64 and probe.runs_triton(y_SH.device):
        from moe.kernels.elementwise import gather_sum

        return gather_sum(y_SH, slot_RW, y_SH.shape[0], base_RH)
    y_SH = torch.cat([y_SH, y_SH.new_zeros(1, y_SH.shape[1])])
    return base_RH + y_SH[slot_RW.flatten()].view(*slot_RW.shape, y_SH.shape[1]).sum(1)
