"""The exchange itself: rows to the ranks of a group and back, with gradients, begun in one place and ended in another.

:func:`send` and :func:`arrive` turn tokens into the rows that this rank's experts see, :func:`send_back` and
:func:`come_back` turn rows into tokens. Both are linear and each is the other's adjoint, so the backward of one runs
the other. What is computed between the two halves, forward or backward, runs while the bytes are on their way; results
do not depend on how long that takes.

The same code runs on gloo and NCCL. Ranks without rows take part in every exchange, in the same order as all others.

Shapes: T tokens, C choices per copy, S copies sent, R rows (T or 0 that stay, then those received), Q rows of which
copies are made, H features.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe.aside import Aside
from moe.copies import Counts, Fan, Route


def all_to_all(
    out: Tensor, x: Tensor, received: Sequence[int], sent: Sequence[int], group: dist.ProcessGroup
) -> dist.Work:
    """Begin to exchange rows. Whatever experts send to other ranks, but for the counts, goes through here."""
    if x.dtype == torch.int16:  # which neither gloo nor NCCL knows
        out, x = out.view(torch.uint8), x.view(torch.uint8)
    return dist.all_to_all_single(out, x, list(received), list(sent), group=group, async_op=True)


class Going:
    """Rows on their way here, begun by :func:`begin`."""

    def __init__(self, rows: Tensor, leaving: Tensor, work: dist.Work) -> None:
        # The rows that leave must not be freed before the exchange is over.
        self._rows, self._leaving, self._work = rows, leaving, work

    def landed(self) -> Tensor:
        """The rows, after waiting for them: the host with gloo, the current stream with NCCL."""
        self._work.wait()
        return self._rows


def begin(x_SH: Tensor, sent: Sequence[int], received: Sequence[int], group: dist.ProcessGroup) -> Going:
    """Begin to exchange rows."""
    x_SH = x_SH.contiguous()
    rows = x_SH.new_empty((sum(received), x_SH.shape[1]))
    return Going(rows, x_SH, all_to_all(rows, x_SH, received, sent, group))


_WIDTH = 16  # thread blocks that NCCL may take; for sending and receiving it takes half of them and one
# Its name since torch 2.13, and before.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Headcount:
    """Counts on their way to the host: every rank's :attr:`~moe.copies.Draft.counts_W2`.

    On a GPU all of it is queued at once, ``aside``, so that the host finds them when it has queued what does not need
    them."""

    def __init__(self, sent_W2: Tensor, rank: int, group: dist.ProcessGroup, aside: Aside) -> None:
        self._rank, ranks = rank, sent_W2.shape[0]
        with aside.queue():
            gathered = sent_W2.new_empty(ranks * ranks, 2)
            self._work = _all_gather(gathered, sent_W2, group=group, async_op=True)
            self._counts_WW2 = gathered.view(ranks, ranks, 2)
            self._copied: torch.Event | None = None
            if gathered.is_cuda:
                self._work.wait()  # the stream, not the host
                self._counts_WW2 = _pinned(self._counts_WW2.shape, gathered.dtype)
                self._counts_WW2.copy_(gathered.view(ranks, ranks, 2), non_blocking=True)
                self._copied = aside.event()

    def read(self) -> tuple[Counts, Counts]:
        """What is sent and received. The one wait of a layer's forward pass: for counts, and nothing queued later."""
        if self._copied is None:
            self._work.wait()
        else:
            self._copied.synchronize()
        counts_WW2 = self._counts_WW2.tolist()
        return counts_WW2[self._rank], [counts_W2[self._rank] for counts_W2 in counts_WW2]


@functools.cache
def _pinned(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Memory that is read before it is written again."""
    return torch.empty(shape, dtype=dtype, pin_memory=True)


@functools.cache
def narrow(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """A group of the same ranks for exchanges that run beside products: it takes at most :data:`_WIDTH`
    multiprocessors, of those that they leave free (:data:`moe.kernels.grouped.ROOM`). All ranks of the group must call
    it for the first time together."""
    if dist.get_backend(group) != "nccl":
        return group
    options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    options.config.max_ctas = _WIDTH
    return dist.new_group(dist.get_process_group_ranks(group), pg_options=options, use_local_synchronization=True)


class Flight:
    """What is on its way between the two halves of an exchange; the same object serves the backward pass.

    Args:
        route: this rank's part.
        group: the ranks that take part.
    """

    def __init__(self, route: Route, group: dist.ProcessGroup) -> None:
        self.route, self.group = route, group
        # Whether tokens and weights need gradients: the same on all ranks, for they run the same model.
        self.wanted = (False, False)
        self.coming_back: list[Tensor | None] = []
        self._works: list[dist.Work] = []
        self._leaving: list[Tensor] = []

    def spread(self, x_QH: Tensor, fan: Fan) -> Tensor:
        """Begin to send copies of ``x``: [R,H], those that stay at once, the others after :meth:`land`."""
        return self.exchange(x_QH[: self.route.stay], fan.copies(x_QH))

    def exchange(self, stay: Tensor, copies: Tensor) -> Tensor:
        stays, received = stay.shape[0], self.route.received
        rows = copies.new_empty((stays + sum(received), copies.shape[1]))
        rows[:stays] = stay
        self._begin(rows[stays:], copies, received, self.route.sent)
        return rows

    def give_back(self, y_RH: Tensor) -> Tensor:
        """Begin to return the rows that were received: [S+1,H] after :meth:`land`, the last one zero."""
        back_SH = y_RH.new_empty((sum(self.route.sent) + 1, y_RH.shape[1]))
        back_SH[-1:] = 0
        self._begin(back_SH[:-1], y_RH[self.route.stay :].contiguous(), self.route.sent, self.route.received)
        return back_SH

    def gather(self, y_RH: Tensor, back_SH: Tensor, fan: Fan) -> Tensor:
        """Each row's sum over its copies, here and returned: [Q,H]."""
        total_QH = fan.total(back_SH)
        return y_RH[: self.route.stay] + total_QH if self.route.stay else total_QH

    def _begin(self, out: Tensor, x: Tensor, received: Sequence[int], sent: Sequence[int]) -> None:
        self._leaving.append(x)
        self._works.append(all_to_all(out, x, received, sent, self.group))

    def land(self) -> None:
        """Wait for all of it: the host with gloo, the current stream with NCCL."""
        for work in self._works:
            work.wait()
        self._works.clear()
        self._leaving.clear()


class _Send(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, flight: Flight, x_TH: Tensor, weights_QC: Tensor) -> tuple[Tensor, Tensor]:
        ctx.flight = flight
        flight.wanted = (ctx.needs_input_grad[1], ctx.needs_input_grad[2])
        x_RH, weights_RC = flight.spread(x_TH, flight.route.rows), flight.spread(weights_QC, flight.route.weights)
        _mark(ctx, flight, x_RH, weights_RC)
        return x_RH, weights_RC

    @staticmethod
    def backward(ctx: Any, *d_rows: Tensor) -> tuple[Tensor | None, ...]:
        flight: Flight = ctx.flight
        flight.land()
        fans = (flight.route.rows, flight.route.weights)
        returned, flight.coming_back = flight.coming_back, []
        gathered = (
            None if back is None else flight.gather(d, back, fan)
            for d, back, fan in zip(d_rows, returned, fans, strict=True)
        )
        return (None, *gathered)


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, flight: Flight, x_RH: Tensor, weights_RC: Tensor) -> tuple[Tensor, Tensor]:
        ctx.flight = flight
        flight.land()
        outputs = x_RH.view_as(x_RH), weights_RC.view_as(weights_RC)
        _mark(ctx, flight, *outputs)
        return outputs

    @staticmethod
    def backward(ctx: Any, *d_rows: Tensor) -> tuple[Tensor | None, ...]:
        flight: Flight = ctx.flight
        flight.coming_back = [
            flight.give_back(d) if wanted else None for d, wanted in zip(d_rows, flight.wanted, strict=True)
        ]
        return (None, *d_rows)


def _mark(ctx: Any, flight: Flight, *rows: Tensor) -> None:
    ctx.mark_non_differentiable(*(row for row, wanted in zip(rows, flight.wanted, strict=True) if not wanted))


class _SendBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, flight: Flight, y_RH: Tensor) -> Tensor:
        ctx.flight = flight
        flight.coming_back = [flight.give_back(y_RH)]
        return y_RH.view_as(y_RH)

    @staticmethod
    def backward(ctx: Any, d_y_RH: Tensor) -> tuple[None, Tensor]:
        ctx.flight.land()
        return None, d_y_RH


class _ComeBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, flight: Flight, y_RH: Tensor) -> Tensor:
        ctx.flight = flight
        flight.land()
        (back_SH,) = flight.coming_back
        flight.coming_back = []
        assert back_SH is not None
        return flight.gather(y_RH, back_SH, flight.route.rows)

    @staticmethod
    def backward(ctx: Any, d_out_TH: Tensor) -> tuple[None, Tensor]:
        flight: Flight = ctx.flight
        # In flight until the other half has landed: between the two nobody else sees it.
        return None, flight.spread(d_out_TH, flight.route.rows)


def send(flight: Flight, x_TH: Tensor, weights_QC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Begin to send: (x [R,H], weights [R,C], expert numbers [R,C]), to be read after :func:`arrive` only."""
    x_RH, weights_RC = _Send.apply(flight, x_TH, weights_QC)
    return x_RH, weights_RC, flight.exchange(flight.route.stay_TC, flight.route.experts_SC)


def arrive(flight: Flight, x_RH: Tensor, weights_RC: Tensor) -> tuple[Tensor, Tensor]:
    """Wait for what :func:`send` began."""
    return _Arrive.apply(flight, x_RH, weights_RC)


def send_back(flight: Flight, y_RH: Tensor) -> Tensor:
    """Begin to return one row for each received. The result is for :func:`come_back` only."""
    return _SendBack.apply(flight, y_RH)


def come_back(flight: Flight, y_RH: Tensor) -> Tensor:
    """Wait for what :func:`send_back` began, and sum each token's rows: [T,H]."""
    return _ComeBack.apply(flight, y_RH)
