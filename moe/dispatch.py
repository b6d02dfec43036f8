"""How token copies reach the rank that holds their expert, and come back.

The T*K (token, choice) pairs are sorted by expert with a stable sort, so the order of rows, and with it every
bit of the result, is a function of the routing alone.

Shapes: T tokens, K experts per token, E experts, L local experts, S rows sent, N rows received, H hidden,
R ranks of the group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from moe.stats import expert_counts


@dataclass(frozen=True)
class DispatchPlan:
    """What ``gather`` needs to undo ``scatter``."""

    num_tokens: int
    inverse_S: Tensor
    arrival_N: Tensor | None = None
    send_splits: tuple[int, ...] = ()
    recv_splits: tuple[int, ...] = ()


def _combine(y_SH: Tensor, weights_TK: Tensor, plan: DispatchPlan) -> Tensor:
    """Weighted sum over each token's choices. A gather, not an index_add: the order of additions is fixed."""
    num_choices = weights_TK.shape[1]
    y_TKH = y_SH[plan.inverse_S].view(plan.num_tokens, num_choices, y_SH.shape[-1])
    return (y_TKH * weights_TK.unsqueeze(-1).to(y_TKH.dtype)).sum(1)


def _inverse(order_S: Tensor) -> Tensor:
    inverse_S = torch.empty_like(order_S)
    inverse_S[order_S] = torch.arange(order_S.numel(), device=order_S.device)
    return inverse_S


class AllToAllDispatch:
    """Experts are spread over ``group``: rank r holds experts [r*L, (r+1)*L). The same code runs on gloo and NCCL.

    Ranks without tokens take part in every exchange. One host synchronisation per call: the split sizes.
    """

    def __init__(self, num_experts: int, group: dist.ProcessGroup) -> None:
        self.num_experts = num_experts
        self.group = group
        self.ranks = dist.get_world_size(group)

    def scatter(self, x_TH: Tensor, index_TK: Tensor) -> tuple[Tensor, Tensor, DispatchPlan]:
        """Returns (rows [N, H] sorted by local expert, rows per local expert [L], plan)."""
        num_local = self.num_experts // self.ranks
        flat_S = index_TK.flatten()
        order_S = torch.argsort(flat_S, stable=True)
        sent_RL = expert_counts(flat_S, self.num_experts).view(self.ranks, num_local)
        received_RL = torch.empty_like(sent_RL)
        dist.all_to_all_single(received_RL, sent_RL, group=self.group)
        send_splits, recv_splits = torch.stack([sent_RL.sum(1), received_RL.sum(1)]).tolist()

        rows_SH = x_TH[order_S // index_TK.shape[1]]
        arrived_NH = _AllToAll.apply(rows_SH, recv_splits, send_splits, self.group)
        # Rows arrive ordered by (source rank, local expert); the experts want them by (local expert, source rank).
        local_L = torch.arange(num_local, device=x_TH.device)
        expert_N = local_L.repeat(self.ranks).repeat_interleave(received_RL.flatten(), output_size=sum(recv_splits))
        arrival_N = torch.argsort(expert_N, stable=True)
        plan = DispatchPlan(x_TH.shape[0], _inverse(order_S), arrival_N, tuple(send_splits), tuple(recv_splits))
        return arrived_NH[arrival_N], received_RL.sum(0), plan

    def gather(self, y_NH: Tensor, weights_TK: Tensor, plan: DispatchPlan) -> Tensor:
        assert plan.arrival_N is not None
        returned_NH = y_NH[_inverse(plan.arrival_N)]
        y_SH = _AllToAll.apply(returned_NH, list(plan.send_splits), list(plan.recv_splits), self.group)
        return _combine(y_SH, weights_TK, plan)


class _AllToAll(torch.autograd.Function):
    """Uneven all-to-all over rows; its backward is the same exchange with the split lists swapped."""

    @staticmethod
    def forward(ctx, x: Tensor, out_splits: list[int], in_splits: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.out_splits, ctx.in_splits, ctx.group = out_splits, in_splits, group
        out = x.new_empty((sum(out_splits), *x.shape[1:]))
        dist.all_to_all_single(out, x.contiguous(), out_splits, in_splits, group=group)
        return out

    @staticmethod
    def backward(ctx, d_out: Tensor) -> tuple[Tensor, None, None, None]:
        d_x = d_out.new_empty((sum(ctx.in_splits), *d_out.shape[1:]))
        dist.all_to_all_single(d_x, d_out.contiguous(), ctx.in_splits, ctx.out_splits, group=ctx.group)
        return d_x, None, None, None
