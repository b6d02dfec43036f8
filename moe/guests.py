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

Shapes: T own tokens, G guests, S copies sent, K choices per token, L local experts, W ranks, B bytes, I intermediate,
H hidden, M pairs of one part.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe.aside import Aside
from moe.assignment import Assignment, sort_pairs
from moe.copies import DeduplicatedDraft, Fan, narrow_type, rows_of
from moe.exchange import Going, Headcount, begin, narrow
from moe.form import ExpertForm
from moe.kernels.combine import add_returned
from moe.kernels.grouped import room_for_exchange
from moe.kernels.minimal import refuse_second_derivative
from moe.kernels.parts import Parts
from moe.kernels.spread import may_be_early, spread
from moe.kernels.stack import Needs, Stack


class Visit:
    """One call of a layer: who goes where, as the host knows it, and what is on its way.

    Attributes:
        own_pairs, guest_pairs: pairs of a row and a local expert.
        fan, own: on the device, and needed in the forward pass only, as is ``own_rows``.
    """

    def __init__(
        self,
        how: ModuleType,
        x_TH: Tensor,
        index_TK: Tensor,
        weights_TK: Tensor,
        num_local: int,
        group: dist.ProcessGroup,
    ) -> None:
        self.group, self.num_local = group, num_local
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        self.first = rank * num_local
        self.number_type = narrow_type(ranks * num_local)  # in which expert numbers travel
        draft = DeduplicatedDraft.of(index_TK, ranks, num_local, rank)
        counts = Headcount(draft.counts_W2, group)
        bytes_TB = torch.cat([_as_bytes(weights_TK), _as_bytes(index_TK.to(self.number_type))], 1)
        leaving = [bytes_TB, x_TH.contiguous()]
        if may_be_early(
            x_TH
        ):  # copies of as many as there can be, for the host has something to do while counts travel
            leaving = [spread(rows, draft.travels, x_TH.shape[0] * (ranks - 1)) for rows in leaving]
        own_rows = how.rows_early(x_TH, draft.own)
        sent, received = counts.read()
        self.sent, self.received = rows_of(sent), rows_of(received)
        self.own_pairs = sent[rank][1]
        self.guest_pairs = sum(pairs for _, pairs in received) - self.own_pairs
        if not may_be_early(x_TH):
            leaving = [spread(rows, draft.travels, sum(self.sent)) for rows in leaving]
        copies = sum(self.sent)
        self.coming = [self.there(leaving[0][:copies]), self.there(leaving[1][:copies], narrow(group))]
        self.fan: Fan | None = draft.fan(sent)
        self.own: Assignment | None = draft.own.assignment(self.own_pairs)
        self.own_rows = None if own_rows is None else own_rows[: self.own_pairs]
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
    visit = Visit(how, x_TH.detach(), index_TK, weights_TK.detach(), stack.up_L.shape[0], group)
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
        own, fan, (bytes_coming, x_coming) = visit.own, visit.fan, visit.coming
        assert own is not None
        assert fan is not None
        own_rows = visit.own_rows
        visit.own, visit.fan, visit.own_rows, visit.coming = None, None, None, []
        aside = Aside(x_TH.device)
        with torch.autocast(x_TH.device.type, enabled=False):
            with aside.queue():
                weights_GK, index_GK = _from_bytes(bytes_coming.landed(), weights_TK, visit.number_type)
                found = sort_pairs(index_GK, visit.num_local, visit.first)
            with room_for_exchange(x_TH.device):
                h_own = _up(how, x_TH, stack, own, own_rows)
            del own_rows
            aside.join(weights_GK, index_GK, found.pair_S, found.slot_RK, found.counts_L)
            guests = found.assignment(visit.guest_pairs)
            x_GH = x_coming.landed()
            h_guests = _up(how, x_GH, stack, guests)
            returning = visit.back(_down(how, h_guests, x_GH, weights_GK, stack, guests))
            if not keep:
                del h_guests
            with room_for_exchange(x_TH.device):
                out_TH = _down(how, h_own, x_TH, weights_TK, stack, own)
            out_TH = add_returned(out_TH, returning.landed(), fan.slot_QP)
        if keep:
            kept = (x_TH, x_GH, weights_TK, weights_GK, h_own, h_guests, own.pair_N, guests.pair_N)
            ctx.save_for_backward(*kept, index_TK, index_GK, fan.source_S, *stacked)
            ctx.visit, ctx.how, ctx.form = visit, how, form
        return out_TH

    @staticmethod
    def backward(ctx: Any, dout_TH: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        visit: Visit = ctx.visit
        x_TH, x_GH, weights_TK, weights_GK, *more = ctx.saved_tensors
        h_own, h_guests, own_pairs, guest_pairs, index_TK, index_GK, source_S, *stacked = more
        needs, stack = Needs(*ctx.needs_input_grad[5:]), Stack(*stacked, ctx.form)
        coming = visit.there(dout_TH[source_S])

        def give_back(dx_GH: Tensor | None, d_weights_GK: Tensor | None) -> None:
            back_weights = None if d_weights_GK is None else visit.back(d_weights_GK)
            visit.returning = (None if dx_GH is None else visit.back(dx_GH), back_weights)

        with torch.autocast(x_TH.device.type, enabled=False):
            if visit.own_pairs + visit.guest_pairs:
                index_RK = torch.cat([index_TK, index_GK.to(index_TK.dtype)])
                joint = sort_pairs(index_RK, visit.num_local, visit.first)
                parts = Parts(
                    (x_TH, x_GH), (weights_TK, weights_GK), (h_own, h_guests), (own_pairs, guest_pairs),
                    joint.assignment(visit.own_pairs + visit.guest_pairs),
                )  # fmt: skip
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


def _as_bytes(values_TK: Tensor) -> Tensor:
    return values_TK.contiguous().view(torch.uint8)


def _from_bytes(bytes_GB: Tensor, weights_TK: Tensor, number_type: torch.dtype) -> tuple[Tensor, Tensor]:
    """Weights and expert numbers of guests, which came as :class:`_Leave` sends them."""
    width = weights_TK.shape[1] * weights_TK.element_size()
    # Copies, also of a single row, which would count as contiguous as it stands: wider types need the alignment.
    weights, numbers = (part.clone(memory_format=torch.contiguous_format) for part in bytes_GB.tensor_split([width], 1))
    return weights.view(weights_TK.dtype), numbers.view(number_type)
