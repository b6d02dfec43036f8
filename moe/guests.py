"""The fast expert layer over several ranks: own tokens are computed while others' travel, in a fixed schedule.

Every rank computes two parts one after the other: its own tokens, and the *guests*, one copy of each token of another
rank that has any expert here (as :class:`moe.dispatch.Deduplicated` sends them). So every exchange has work beside it:

=================  ==================================================================================
exchange           what runs meanwhile
=================  ==================================================================================
counts             own and leaving rows are gathered
guests come        own up projection (a shared expert before it)
results return     own down projection
their gradients    sorting and gathering for the backward pass
gradients return   the up projection's weight gradient of own tokens and guests
=================  ==================================================================================

The host waits once, for the counts. Kept for the backward pass is what :mod:`moe.kernels.minimal` keeps. The order of
all sums is a function of the routing alone.

Shapes: T own tokens, G guests, S copies sent, K choices per token, L local experts, W ranks, B bytes of a packed row,
I intermediate, H hidden, M pairs of one part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe.aside import Aside
from moe.assignment import Assignment, Sorted, sort_pairs
from moe.copies import DeduplicatedDraft, Fan, narrow_type, rows_of
from moe.exchange import Going, Headcount, begin, narrow
from moe.form import ExpertForm
from moe.kernels.combine import add_returned
from moe.kernels.grouped import room_for_exchange
from moe.kernels.minimal import refuse_second_derivative
from moe.kernels.parts import Parts
from moe.kernels.spread import may_be_early, spread
from moe.kernels.stack import Needs, Stack

_ALIGNED = 16  # bytes: rows of any type begin there


@dataclass(frozen=True)
class Packing:
    """How a token's row, its weights and its expert numbers make one row of bytes, so that there is one exchange."""

    hidden: int
    top_k: int
    row_type: torch.dtype
    weight_type: torch.dtype
    number_type: torch.dtype

    @property
    def widths(self) -> tuple[int, int, int]:
        """Bytes of the three."""
        return (
            self.hidden * self.row_type.itemsize,
            self.top_k * self.weight_type.itemsize,
            self.top_k * self.number_type.itemsize,
        )

    def pack(self, x_TH: Tensor, weights_TK: Tensor, index_TK: Tensor) -> Tensor:
        parts = [part.contiguous().view(torch.uint8) for part in (x_TH, weights_TK, index_TK.to(self.number_type))]
        rest = -sum(self.widths) % _ALIGNED
        if rest:
            parts.append(parts[0].new_zeros(x_TH.shape[0], rest))
        return torch.cat(parts, 1)

    def unpack(self, bytes_GB: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(x [G,H] where it is, weights [G,K], expert numbers [G,K])."""
        row, weight, number = self.widths
        weights, numbers = bytes_GB[:, row : row + weight + number].split([weight, number], 1)
        # Copies, also of a single row, which would count as contiguous as it stands: wider types need the alignment.
        weights, numbers = (part.clone(memory_format=torch.contiguous_format) for part in (weights, numbers))
        x_GH = bytes_GB.view(self.row_type)[:, : self.hidden]
        return x_GH, weights.view(self.weight_type), numbers.view(self.number_type)


class Visit:
    """One call of a layer: who goes where, as the host knows it, and what is on its way.

    The host works hard until the first products run, and little after that: so own tokens' up projection is queued as
    soon as its size is known, and the guests' exchange after it, on a stream that does not wait for it.

    Attributes:
        own_pairs, guest_pairs: pairs of a row and a local expert.
        fan, own, h_own: on the device, and needed in the forward pass only.
    """

    def __init__(
        self,
        how: ModuleType,
        stack: Stack,
        x_TH: Tensor,
        index_TK: Tensor,
        weights_TK: Tensor,
        group: dist.ProcessGroup,
    ) -> None:
        self.group, self.num_local = group, stack.up_L.shape[0]
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        self.first = rank * self.num_local
        draft = DeduplicatedDraft.of(index_TK, ranks, self.num_local, rank)
        counts = Headcount(draft.counts_W2, group)
        types = (x_TH.dtype, weights_TK.dtype, narrow_type(ranks * self.num_local))
        self.packing = Packing(x_TH.shape[1], index_TK.shape[1], *types)
        own_rows = how.rows_early(x_TH, draft.own)
        leaving_TB, early = self.packing.pack(x_TH, weights_TK, index_TK), may_be_early(x_TH)
        if early:  # room for as many copies as there can be: the host has something to do while counts travel
            leaving_SB = spread(leaving_TB, draft.travels, x_TH.shape[0] * (ranks - 1))
        sent, received = counts.read()
        self.sent, self.received = rows_of(sent), rows_of(received)
        self.own_pairs = sent[rank][1]
        self.guest_pairs = sum(pairs for _, pairs in received) - self.own_pairs
        if not early:
            leaving_SB = spread(leaving_TB, draft.travels, sum(self.sent))
        self.own: Assignment | None = draft.own.assignment(self.own_pairs)
        self.aside = Aside(x_TH.device)
        self.aside.follow()

        def send() -> Going:
            with self.aside.queue():
                return self.there(leaving_SB[: sum(self.sent)], narrow(group))

        def project() -> Tensor:
            with room_for_exchange(x_TH.device):
                return _up(how, x_TH, stack, self.own, None if own_rows is None else own_rows[: self.own_pairs])

        self.h_own: Tensor | None
        self.coming: Going | None
        if early:
            self.h_own, self.coming = project(), send()
        else:  # a CPU computes at once
            self.coming, self.h_own = send(), project()
        self.fan: Fan | None = draft.fan(sent)
        self.returning: tuple[Going | None, Going | None] = (None, None)

    def there(self, x_SH: Tensor, group: dist.ProcessGroup | None = None) -> Going:
        """Begin to send copies, to become guests."""
        return begin(x_SH, self.sent, self.received, group or self.group)

    def back(self, y_GH: Tensor) -> Going:
        """Begin to return guests' rows."""
        return begin(y_GH, self.received, self.sent, narrow(self.group))


def mix_with_guests(
    how: ModuleType,
    stack: Stack,
    x_TH: Tensor,
    index_TK: Tensor,
    weights_TK: Tensor,
    group: dist.ProcessGroup,
    meanwhile: Callable[[], None] | None = None,
) -> Tensor:
    """Every token through its experts, wherever they are: [T,H] in x's dtype.

    Args:
        how: the module whose products are used, a :class:`~moe.kernels.stack.PassInParts`.
        index_TK: global expert numbers; rank r of the group holds [r*L, (r+1)*L).
        meanwhile: what else to do while guests are on their way.
    """
    dtype = x_TH.dtype
    x_TH = x_TH.to(stack.up_L.dtype)
    with torch.no_grad(), torch.autocast(x_TH.device.type, enabled=False):
        visit = Visit(how, stack, x_TH, index_TK, weights_TK, group)
    x_TH, weights_TK = _Leave.apply(visit, x_TH, weights_TK)
    if meanwhile is not None:
        meanwhile()
    tensors = (x_TH, weights_TK, stack.up_L, stack.down_L, stack.up_bias_L2I, stack.down_bias_LH)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    return _Mix.apply(visit, how, keep, stack.form, index_TK, *tensors).to(dtype)


class _Leave(torch.autograd.Function):
    """Tokens and weights as they left; its backward adds the gradients that return to those of own pairs."""

    @staticmethod
    def forward(ctx: Any, visit: Visit, x_TH: Tensor, weights_TK: Tensor) -> tuple[Tensor, Tensor]:
        assert visit.fan is not None
        ctx.visit = visit
        ctx.save_for_backward(visit.fan.slot_QP)
        outputs = x_TH.view_as(x_TH), weights_TK.view_as(weights_TK)
        ctx.mark_non_differentiable(*(t for t, n in zip(outputs, ctx.needs_input_grad[1:], strict=True) if not n))
        return outputs

    @staticmethod
    def backward(ctx: Any, *d_own: Tensor | None) -> tuple[Tensor | None, ...]:
        (slot_TW,) = ctx.saved_tensors
        returning, ctx.visit.returning = ctx.visit.returning, (None, None)
        summed = (
            d if back is None or d is None else add_returned(d, back.landed(), slot_TW)
            for d, back in zip(d_own, returning, strict=True)
        )
        return (None, *summed)


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        visit: Visit,
        how: ModuleType,
        keep: bool,
        form: ExpertForm,
        index_TK: Tensor,
        x_TH: Tensor,
        weights_TK: Tensor,
        *stacked: Tensor | None,
    ) -> Tensor:
        up_L, down_L, *biases = stacked
        assert up_L is not None
        assert down_L is not None
        stack = Stack(up_L, down_L, *biases, form)
        own, fan, coming, h_own, aside = visit.own, visit.fan, visit.coming, visit.h_own, visit.aside
        assert own is not None
        assert fan is not None
        assert coming is not None
        assert h_own is not None
        visit.own, visit.fan, visit.coming, visit.h_own = None, None, None, None
        with torch.autocast(x_TH.device.type, enabled=False):
            with aside.queue():
                bytes_GB = coming.landed()
                x_GH, weights_GK, index_GK = visit.packing.unpack(bytes_GB)
                found = sort_pairs(index_GK, visit.num_local, visit.first)
            aside.join(bytes_GB, weights_GK, index_GK, *found)
            guests = found.assignment(visit.guest_pairs)
            h_guests = _up(how, x_GH, stack, guests)
            returning = visit.back(_down(how, h_guests, x_GH, weights_GK, stack, guests))
            if not keep:
                del h_guests
            with room_for_exchange(x_TH.device):
                out_TH = _down(how, h_own, x_TH, weights_TK, stack, own)
            if keep:  # for the backward pass, which begins with enough to do
                with aside.queue():
                    joint = sort_pairs(torch.cat([index_TK, index_GK.to(index_TK.dtype)]), visit.num_local, visit.first)
                aside.join(*joint)
            out_TH = add_returned(out_TH, returning.landed(), fan.slot_QP)
        if keep:
            kept = (x_TH, x_GH, weights_TK, weights_GK, h_own, h_guests, own.pair_N, guests.pair_N)
            ctx.save_for_backward(*kept, *joint, fan.source_S, *stacked)
            ctx.visit, ctx.how, ctx.form = visit, how, form
        return out_TH

    @staticmethod
    def backward(ctx: Any, dout_TH: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        visit: Visit = ctx.visit
        x_TH, x_GH, weights_TK, weights_GK, *more = ctx.saved_tensors
        h_own, h_guests, own_pairs, guest_pairs, *joint, source_S = more[:8]
        stacked = more[8:]
        needs, stack = Needs(*ctx.needs_input_grad[5:]), Stack(*stacked, ctx.form)
        coming = visit.there(dout_TH[source_S])

        def give_back(dx_GH: Tensor | None, d_weights_GK: Tensor | None) -> None:
            back_weights = None if d_weights_GK is None else visit.back(d_weights_GK)
            visit.returning = (None if dx_GH is None else visit.back(dx_GH), back_weights)

        with torch.autocast(x_TH.device.type, enabled=False):
            if visit.own_pairs + visit.guest_pairs:
                assignment = Sorted(*joint).assignment(visit.own_pairs + visit.guest_pairs)
                parts = Parts(
                    (x_TH, x_GH), (weights_TK, weights_GK), (h_own, h_guests), (own_pairs, guest_pairs), assignment
                )
                douts = dout_TH.contiguous(), coming.landed
                found = ctx.how.backward_parts(parts, douts, stack, needs, give_back)
            else:
                coming.landed()
                own, guests = (
                    needs.zeros(x, weights, stacked) for x, weights in ((x_TH, weights_TK), (x_GH, weights_GK))
                )
                give_back(guests.x, guests.weights)
                found = own
        gradients = (found.x, found.weights, found.up, found.down, found.up_bias, found.down_bias)
        return (*(None,) * 5, *gradients)


def _up(how: ModuleType, x_RH: Tensor, stack: Stack, assignment: Assignment, rows_NH: Tensor | None = None) -> Tensor:
    if assignment.pair_N.numel():
        return how.up(x_RH, stack, assignment, rows_NH)  # type: ignore[no-any-return]
    return x_RH.new_empty(0, stack.up_L2IH.shape[1])


def _down(
    how: ModuleType, h_M2I: Tensor, x_RH: Tensor, weights_RK: Tensor, stack: Stack, assignment: Assignment
) -> Tensor:
    if assignment.pair_N.numel():
        return how.down(h_M2I, weights_RK, stack, assignment)  # type: ignore[no-any-return]
    return torch.zeros_like(x_RH)
