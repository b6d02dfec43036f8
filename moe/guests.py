"""The fast expert layer over several ranks: own tokens are computed while others' travel, in a fixed schedule.

Every rank computes two parts one after the other: its own tokens, and the *guests*, one copy of each token of another
rank that has any expert here (as :class:`moe.dispatch.Deduplicated` sends them). So every exchange has work beside it:

=================  ==================================================================================
exchange           what runs meanwhile
=================  ==================================================================================
counts, guests     own up projection, and a shared expert
results return     own down projection
their gradients    gathering for the backward pass
gradients return   the up projection's weight gradient of own tokens and guests
=================  ==================================================================================

The host waits once, for the counts. Kept for the backward pass is what :mod:`moe.kernels.minimal` keeps. The order of
all sums is a function of the routing alone.

Shapes: T own tokens, G guests, S copies sent, K choices per token, L local experts, W ranks, B bytes of a packed row,
I intermediate, H hidden, M pairs of one part.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from moe.aside import Aside
from moe.assignment import Assignment, Sorted, join, sort_pairs
from moe.copies import DeduplicatedDraft, narrow_type, rows_of
from moe.exchange import Going, Headcount, begin, narrow
from moe.form import ExpertForm
from moe.kernels.combine import add_returned
from moe.kernels.grouped import room_for_exchange
from moe.kernels.minimal import refuse_second_derivative, without_autocast
from moe.kernels.parts import Parts
from moe.kernels.spread import may_be_early, spread
from moe.kernels.stack import Needs, Stack
from moe.traffic import Traffic

_ALIGNED = 16  # bytes: rows of any type begin there
_KEPT_SPARE = 8  # rows for each one of nothing that is kept for backward, at least


@dataclass(frozen=True)
class Packing:
    """How a token's row, its weights and its expert numbers make one row of bytes, so that there is one exchange.

    Each of the three begins where any type may, and so is read where it is.
    """

    widths: tuple[int, int, int]
    types: tuple[torch.dtype, torch.dtype, torch.dtype]

    @functools.cached_property
    def _columns(self) -> list[tuple[int, int]]:
        """First and last byte of each, and of what comes behind them."""
        sizes = [width * dtype.itemsize for width, dtype in zip(self.widths, self.types, strict=True)]
        starts = itertools.accumulate((-(-size // _ALIGNED) * _ALIGNED for size in sizes), initial=0)
        return [(at, at + size) for at, size in zip(starts, [*sizes, 0], strict=True)]

    def views(self, rows_XB: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [X,H], weights and expert numbers [X,K] of packed rows."""
        x, weights, numbers = (
            rows_XB[:, at:end].view(dtype) for (at, end), dtype in zip(self._columns[:3], self.types, strict=True)
        )
        return x, weights, numbers

    def spread(self, rows: tuple[Tensor, Tensor, Tensor], travels: Sorted, size: int) -> Tensor:
        """The packed row of each copy, [size,B]; ``size`` as for :func:`moe.kernels.spread.spread`, or still more."""
        out_SB = torch.empty(size, self._columns[-1][0], dtype=torch.uint8, device=rows[0].device)
        if may_be_early(out_SB):
            from moe.kernels import elementwise

            elementwise.spread_together(rows, travels.slot_RK, travels.ends_L, self.views(out_SB))
        else:
            for out, part in zip(self.views(out_SB), rows, strict=True):
                copies = spread(part, travels, min(size, travels.pair_S.numel()))
                out[: copies.shape[0]].copy_(copies)
        return out_SB


_packing = functools.cache(Packing)


class Visit:
    """One call of a layer: who goes where, as the host knows it, and what is on its way.

    Until the guests' products are queued it is the host that binds. So once there was a call (:mod:`moe.traffic`), the
    rows that leave and own tokens' up projection are queued before the host knows how many there are, and between two
    ranks rows leave, too, on a stream that does not wait for that product. :meth:`send` waits for the counts, as late
    as may be, and sends what has not left.

    Attributes:
        own_pairs, guest_pairs: pairs of a row and a local expert; known when counts are, as ``sent`` and ``received``.
        draft: needed in the forward pass only.
    """

    def __init__(
        self,
        how: ModuleType,
        stack: Stack,
        x_TH: Tensor,
        index_TK: Tensor,
        weights_TK: Tensor,
        traffic: Traffic,
    ) -> None:
        self._traffic, self.group, self.num_local = traffic, traffic.group, stack.up_L.shape[0]
        self.first = traffic.rank * self.num_local
        self.draft: DeduplicatedDraft | None = DeduplicatedDraft.of(
            index_TK, traffic.ranks, self.num_local, traffic.rank
        )
        types = (x_TH.dtype, weights_TK.dtype, narrow_type(traffic.ranks * self.num_local))
        self.packing = _packing((x_TH.shape[1], weights_TK.shape[1], index_TK.shape[1]), types)
        self.aside = Aside(x_TH.device)
        self._rows_NH: Tensor | None = None
        self._h_own: Tensor | None = None
        self._leaving_SB: Tensor | None = None
        self._coming: list[Going] = []
        self._ahead = 0
        if how.queues_early(x_TH):
            self._queue_early(how, stack, x_TH, weights_TK)
        self._counts: Headcount | None = Headcount(self.draft.counts_W2, traffic.rank, self.group, self.aside)
        self.returning: tuple[Going | None, Going | None] = (None, None)

    def _queue_early(self, how: ModuleType, stack: Stack, x_TH: Tensor, weights_TK: Tensor) -> None:
        """For the last call's number of rows: gathering own rows and packing those that leave, before the product takes
        most multiprocessors; own tokens' product, beside which others travel; and sending, on which all ranks decide
        alike."""
        assert self.draft is not None
        traffic, own, index_TK = self._traffic, self.draft.own, self.draft.index_TK
        most = index_TK.shape[0] * min(traffic.ranks - 1, index_TK.shape[1])
        places, leaving = min(traffic.pairs, index_TK.numel()), max(min(traffic.leaving, most), traffic.ahead)
        if places:
            self._rows_NH = spread(x_TH, own, places)
        if leaving:
            with self.aside.queue():
                self._leaving_SB = self.packing.spread((x_TH, weights_TK, index_TK), self.draft.travels, leaving)
        if self._rows_NH is not None and stack.up_bias_L2I is None:
            self._h_own = _up_beside(how, x_TH, stack, own.early(places), self._rows_NH)
            self._rows_NH = None
        if traffic.ahead:
            assert self._leaving_SB is not None
            self._ahead, splits = traffic.ahead, traffic.splits()
            with self.aside.queue():
                self._coming.append(begin(self._leaving_SB[: self._ahead], splits, splits, narrow(self.group)))

    def send(self, how: ModuleType, stack: Stack, x_TH: Tensor, weights_TK: Tensor) -> None:
        """Begin to send guests that have not left, and compute own tokens' pre-activations if they are not there."""
        if self._counts is None:
            return
        assert self.draft is not None
        sent, received = self._counts.read()
        self._counts = None
        self.sent, self.received = rows_of(sent), rows_of(received)
        self.own_pairs = pairs = sent[self._traffic.rank][1]
        self.guest_pairs = sum(pairs for _, pairs in received) - pairs
        self._send_rest(x_TH, weights_TK)
        self._traffic.note(pairs, self.sent, self.received)
        rows_NH, self._rows_NH = _first(self._rows_NH, pairs), None
        self._h_own = _first(self._h_own, pairs)  # what is too small goes before the right one comes
        if self._h_own is None:
            self._h_own = _up_beside(how, x_TH, stack, self.draft.own.assignment(pairs), rows_NH)

    def _send_rest(self, x_TH: Tensor, weights_TK: Tensor) -> None:
        """What has not left ahead. Two ranks find the same: nothing is exchanged, or something one way at least. More
        ranks always exchange."""
        ahead, rows_SB, leaving = self._ahead, self._leaving_SB, sum(self.sent)
        self._leaving_SB = None
        if ahead and ahead >= max(leaving, sum(self.received)):
            return
        assert self.draft is not None
        rest = [[max(0, rows - ahead) for rows in counts] for counts in (self.sent, self.received)]
        with self.aside.queue():
            if rows_SB is None or rows_SB.shape[0] < leaving:
                rows_SB = self.packing.spread((x_TH, weights_TK, self.draft.index_TK), self.draft.travels, leaving)
            self._coming.append(begin(rows_SB[ahead:leaving], *rest, narrow(self.group)))

    def arrived(self) -> tuple[DeduplicatedDraft, Tensor, Tensor]:
        """The plan, own tokens' pre-activations and the packed guests, which are not kept here any longer."""
        draft, h_own, coming = self.draft, self._h_own, [part.landed() for part in self._coming]
        assert draft is not None
        assert h_own is not None
        self.draft = self._h_own = None
        self._coming = []
        came_GB = _first(coming[0] if len(coming) == 1 else torch.cat(coming), sum(self.received))
        assert came_GB is not None
        return draft, h_own, came_GB

    def there(self, x_SH: Tensor) -> Going:
        """Begin to send rows to where guests went."""
        return begin(x_SH, self.sent, self.received, self.group)

    def back(self, y_GH: Tensor) -> Going:
        """Begin to return guests' rows."""
        return begin(y_GH, self.received, self.sent, narrow(self.group))


def _first(rows: Tensor | None, number: int) -> Tensor | None:
    """The first rows of what may have more; None if it has fewer. What is kept keeps few others in memory."""
    if rows is None or rows.shape[0] < number:
        return None
    return rows[:number].clone() if rows.shape[0] > number + -(-number // _KEPT_SPARE) else rows[:number]


def mix_with_guests(
    how: ModuleType,
    stack: Stack,
    x_TH: Tensor,
    index_TK: Tensor,
    weights_TK: Tensor,
    traffic: Traffic,
    meanwhile: Callable[[], None] | None = None,
) -> Tensor:
    """Every token through its experts, wherever they are: [T,H] in x's dtype.

    Args:
        how: the module whose products are used, a :class:`~moe.kernels.stack.PassInParts`.
        index_TK: global expert numbers; rank r of the group holds [r*L, (r+1)*L).
        traffic: of this layer in its group; all ranks of it make the same calls in the same order.
        meanwhile: what else to do while guests are on their way.
    """
    dtype = x_TH.dtype
    x_TH = x_TH.to(stack.up_L.dtype)
    with torch.no_grad(), without_autocast(x_TH.device.type):
        visit = Visit(how, stack, x_TH, index_TK, weights_TK, traffic)
        if meanwhile is not None:
            visit.send(how, stack, x_TH, weights_TK)
    x_TH, weights_TK = _Leave.apply(visit, x_TH, weights_TK)
    if meanwhile is not None:
        meanwhile()
    tensors = (x_TH, weights_TK, stack.up_L, stack.down_L, stack.up_bias_L2I, stack.down_bias_LH)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    return _Mix.apply(visit, how, keep, stack.form, *tensors).to(dtype)


class _Leave(torch.autograd.Function):
    """Tokens and weights as they left; its backward adds the gradients that return to those of own pairs."""

    @staticmethod
    def forward(ctx: Any, visit: Visit, x_TH: Tensor, weights_TK: Tensor) -> tuple[Tensor, Tensor]:
        assert visit.draft is not None
        ctx.visit = visit
        ctx.save_for_backward(visit.draft.travels.slot_RK)
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
        x_TH: Tensor,
        weights_TK: Tensor,
        *stacked: Tensor | None,
    ) -> Tensor:
        up_L, down_L, *biases = stacked
        assert up_L is not None
        assert down_L is not None
        stack = Stack(up_L, down_L, *biases, form)
        with without_autocast(x_TH.device.type):
            visit.send(how, stack, x_TH, weights_TK)
            with visit.aside.queue():
                draft, h_own, came_GB = visit.arrived()
                x_GH, weights_GK, index_GK = visit.packing.views(came_GB)
                guests = sort_pairs(index_GK, visit.num_local, visit.first)
            visit.aside.join(came_GB, *guests)
            there, here = guests.assignment(visit.guest_pairs), draft.own.assignment(visit.own_pairs)
            h_guests = _up(how, x_GH, stack, there)
            returning = visit.back(_down(how, h_guests, x_GH, weights_GK, stack, there))
            if not keep:
                del h_guests
            with room_for_exchange(x_TH.device):
                out_TH = _down(how, h_own, x_TH, weights_TK, stack, here)
            out_TH = add_returned(out_TH, returning.landed(), draft.travels.slot_RK)
        if keep:
            kept = (x_TH, x_GH, weights_TK, weights_GK, h_own, h_guests)
            ctx.save_for_backward(*kept, *draft.own, *guests, *draft.travels, *stacked)
            ctx.visit, ctx.how, ctx.form = visit, how, form
        return out_TH

    @staticmethod
    def backward(ctx: Any, dout_TH: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        visit: Visit = ctx.visit
        x_TH, x_GH, weights_TK, weights_GK, *more = ctx.saved_tensors
        h_own, h_guests, own, guests, travels, stacked = *more[:2], more[2:6], more[6:10], more[10:14], more[14:]
        needs, stack = Needs(*ctx.needs_input_grad[4:]), Stack(*stacked, ctx.form)
        coming = visit.there(spread(dout_TH.contiguous(), Sorted(*travels), sum(visit.sent)))

        def give_back(dx_GH: Tensor | None, d_weights_GK: Tensor | None) -> None:
            back_weights = None if d_weights_GK is None else visit.back(d_weights_GK)
            visit.returning = (None if dx_GH is None else visit.back(dx_GH), back_weights)

        with without_autocast(x_TH.device.type):
            if visit.own_pairs + visit.guest_pairs:
                here, there = Sorted(*own).assignment(visit.own_pairs), Sorted(*guests).assignment(visit.guest_pairs)
                pairs, weights = (here.pair_N, there.pair_N), (weights_TK, weights_GK)
                parts = Parts((x_TH, x_GH), weights, (h_own, h_guests), pairs, join(here, there))
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
        return (*(None,) * 4, *gradients)


def _up(how: ModuleType, x_RH: Tensor, stack: Stack, assignment: Assignment, rows_NH: Tensor | None = None) -> Tensor:
    if assignment.pair_N.numel():
        return how.up(x_RH, stack, assignment, rows_NH)  # type: ignore[no-any-return]
    return x_RH.new_empty(0, stack.up_L2IH.shape[1])


def _up_beside(how: ModuleType, x_RH: Tensor, *more: Any) -> Tensor:
    """:func:`_up` beside an exchange."""
    with room_for_exchange(x_RH.device):
        return _up(how, x_RH, *more)


def _down(
    how: ModuleType,
    h_M2I: Tensor,
    x_RH: Tensor,
    weights_RK: Tensor,
    stack: Stack,
    assignment: Assignment,
) -> Tensor:
    if assignment.pair_N.numel():
        return how.down(h_M2I, weights_RK, stack, assignment)  # type: ignore[no-any-return]
    return torch.zeros_like(x_RH)
