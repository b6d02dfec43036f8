"""Copies of experts over the link: what goes first, in which pieces, and what it costs.

Nothing here has a thread. Demanded experts are handed to the link at once and whole. Prefetches wait in a queue, the
nearer layer first, and are handed over in pieces of some MB whenever the runtime calls, only so many bytes at a time;
so a demand waits for no more than those. A prefetch that turns out to be wanted is promoted, one that has not begun
can be cancelled. Waiting is left to the device: what is computed later runs after the copy, while the host goes on.

Two links stand behind one protocol: a CUDA stream (:mod:`inference.cuda_link`), and one with a simulated clock, which
moves the bytes only when their time has come; so tests on a CPU see what is read too early.

A source may be packed (:mod:`inference.packed`): then its bytes cross, and the link makes the block of them. It travels
whole, since its pieces mean nothing.

Shapes: B elements of a block, N bytes of a packed one.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Protocol

import torch
from torch import Tensor

from inference.errors import InferenceError
from inference.packed import unpack
from moe.refs import ExpertRef

CHUNK_BYTES = 8 << 20  # within 3 % of the full rate of a PCIe 5 link; 1 MB loses 13 %
WINDOW_BYTES = 16 << 20

Mark = Any


class Urgency(IntEnum):
    """In which order queued copies go."""

    DEMAND = 0
    NEXT = 1
    LATER = 2


class Link(Protocol):
    """Copies in the order in which they are given, beside what the device computes.

    A source of uint8 [N] is a packed block: what arrives in the target is the block.
    """

    def copy(self, target_B: Tensor, source_B: Tensor) -> None:
        """Begin a copy; the source must stay as it is until it is done."""

    def mark(self) -> Mark:
        """A mark behind everything given so far."""

    def done(self, mark: Mark) -> bool: ...

    def wait(self, mark: Mark) -> None:
        """What the device computes from here on finds the copies before the mark done."""

    def settle(self, mark: Mark) -> None:
        """Returns when the copies before the mark are done: the host waits."""

    def fence(self) -> None:
        """Copies given from here on begin after what the device was asked to compute so far."""

    @property
    def stall_s(self) -> float:
        """Seconds for which computing had to wait for copies."""


class Source(Protocol):
    """Where experts come from."""

    def block(self, ref: ExpertRef) -> Tensor | None:
        """The expert's block, or its packed bytes, in memory that the link can read directly; None: not yet."""

    def staged(self, ref: ExpertRef, settle: Callable[[Mark], None]) -> tuple[Tensor, Callable[[Mark], None]]:
        """The expert read into a staging buffer, and whom to tell the mark behind which the buffer is free again."""

    def close(self) -> None:
        """Give the memory back. No copy may be under way."""


@dataclass
class TransferCounts:
    """Bytes that cross the link, by why; a promoted prefetch counts as one. ``promoted``, ``cancelled``: prefetches."""

    demanded_bytes: int = 0
    prefetched_bytes: int = 0
    staged_bytes: int = 0
    promoted: int = 0
    cancelled: int = 0
    waits: int = 0


@dataclass(eq=False)
class Transfer:
    """One expert on its way into ``target_B``."""

    ref: ExpertRef
    target_B: Tensor
    urgency: Urgency
    given: int = 0  # elements handed to the link
    source_B: Tensor | None = None  # or packed, [N]
    mark: Mark | None = None  # behind the last piece
    order: int = 0  # among complete ones, in which they arrive
    cancelled: bool = False

    @property
    def begun(self) -> bool:
        return self.given > 0

    @property
    def complete(self) -> bool:
        """All of it was handed to the link; not that it has arrived."""
        return self.mark is not None

    @property
    def nbytes(self) -> int:
        """That cross the link."""
        assert self.source_B is not None
        return self.source_B.nbytes


class TransferEngine:
    """Feeds a link.

    Args:
        chunk_bytes: of one piece of a prefetch.
        window_bytes: how much of prefetches may be on the link at a time; what a demand waits for at most. An expert
            that is larger and travels whole has it for itself.

    Attributes:
        failure: what broke a layer call off, set by whoever carries calls out: what is on the link is not known any
            more, so :meth:`check` refuses all others.
    """

    def __init__(
        self, link: Link, source: Source, *, chunk_bytes: int = CHUNK_BYTES, window_bytes: int = WINDOW_BYTES
    ) -> None:
        assert 0 < chunk_bytes <= window_bytes, (chunk_bytes, window_bytes)
        self.link, self.source = link, source
        self.counts = TransferCounts()
        self.failure: InferenceError | None = None
        self._chunk_bytes, self._window_bytes = chunk_bytes, window_bytes
        self._queue: list[tuple[Urgency, int, Transfer]] = []
        self._order = self._complete = 0
        self._flying: deque[tuple[Mark, int]] = deque()
        self._flying_bytes = 0

    def check(self) -> None:
        """Raises InferenceError if a transfer failed before."""
        if self.failure is not None:
            raise InferenceError(f"the runtime must be started again, since a transfer failed: {self.failure}")

    def demand(self, ref: ExpertRef, target_B: Tensor) -> Transfer:
        """Copy an expert that is wanted now. Raises InferenceError if it cannot be read or copied."""
        transfer = Transfer(ref, target_B, Urgency.DEMAND)
        self._give(transfer, target_B.numel())
        return transfer

    def demand_all(self, wanted: Sequence[tuple[ExpertRef, Tensor]]) -> list[Transfer]:
        """:meth:`demand` of several that are waited for together: one mark, behind the last."""
        if not wanted:
            return []
        sources: list[Tensor] = []
        for ref, _ in wanted:
            source_B = self.source.block(ref)
            if source_B is None:
                return [self.demand(*one) for one in wanted]
            sources.append(source_B)
        try:
            for (_, target_B), source_B in zip(wanted, sources, strict=True):  # the link first, what is noted later
                self.link.copy(target_B, source_B)
            mark = self.link.mark()
        except RuntimeError as error:
            raise _failed(", ".join(str(ref) for ref, _ in wanted), error) from error
        transfers = []
        for (ref, target_B), source_B in zip(wanted, sources, strict=True):
            self._complete += 1
            self.counts.demanded_bytes += source_B.nbytes
            given = target_B.numel()
            transfers.append(Transfer(ref, target_B, Urgency.DEMAND, given, source_B, mark, self._complete))
        return transfers

    def prefetch(self, ref: ExpertRef, target_B: Tensor, urgency: Urgency) -> Transfer:
        """Queue an expert that may be wanted; :meth:`pump` hands it over."""
        assert urgency > Urgency.DEMAND
        transfer = Transfer(ref, target_B, urgency)
        self._order += 1
        heapq.heappush(self._queue, (urgency, self._order, transfer))
        return transfer

    def promote(self, transfer: Transfer) -> None:
        """A prefetch is wanted now: the rest of it goes at once."""
        if not transfer.complete:
            self.counts.promoted += 1
            self._give(transfer, transfer.target_B.numel() - transfer.given)

    def cancel(self, transfer: Transfer) -> bool:
        """Forget a prefetch that has not begun; False if it has."""
        if transfer.begun or transfer.cancelled:
            return transfer.cancelled
        transfer.cancelled = True
        self.counts.cancelled += 1
        return True

    def pump(self, *, whole: bool = False) -> None:
        """Hand queued prefetches to the link as far as the window allows, or the whole queue. Call it often."""
        while self._flying and self.link.done(self._flying[0][0]):
            self._flying_bytes -= self._flying.popleft()[1]
        while self._queue:
            transfer = self._queue[0][2]
            if transfer.cancelled or transfer.complete:
                heapq.heappop(self._queue)
                continue
            piece, nbytes = self._next_piece(transfer)
            if not whole and self._flying and self._flying_bytes + nbytes > self._window_bytes:
                return
            nbytes = self._give(transfer, piece)
            mark = transfer.mark or self.link.mark()
            self._flying.append((mark, nbytes))
            self._flying_bytes += nbytes

    def _next_piece(self, transfer: Transfer) -> tuple[int, int]:
        """Elements of a prefetch that go at once, and the bytes that they take over the link.

        What is packed goes whole, and what is staged: a buffer is not kept for an expert that may stop halfway.
        """
        left, itemsize = transfer.target_B.numel() - transfer.given, transfer.target_B.itemsize
        if not self._direct(transfer):
            return left, left * itemsize
        if is_packed(transfer.source_B):
            return left, transfer.nbytes
        piece = min(left, max(self._chunk_bytes // itemsize, 1))
        return piece, piece * itemsize

    def wait(self, transfers: Sequence[Transfer]) -> None:
        """What is computed from here on finds these experts whole."""
        for transfer in transfers:
            assert not transfer.cancelled, transfer
            self.promote(transfer)
        if transfers:
            last = max(transfers, key=lambda transfer: transfer.order)  # all others arrive before it
            if not self._arrived(last):
                self.counts.waits += 1
                self._guard(last, self.link.wait, last.mark)

    def arrived(self, transfer: Transfer) -> bool:
        """Whether the last piece has arrived. Raises InferenceError if the link failed."""
        return transfer.complete and self._arrived(transfer)

    def _arrived(self, transfer: Transfer) -> bool:
        return bool(self._guard(transfer, self.link.done, transfer.mark))

    def _direct(self, transfer: Transfer) -> bool:
        """Whether the link can read the expert where it is."""
        if transfer.source_B is None:
            transfer.source_B = self.source.block(transfer.ref)
        return transfer.source_B is not None

    def _give(self, transfer: Transfer, elements: int) -> int:
        """Bytes that this takes over the link."""
        release = None
        if not self._direct(transfer):
            transfer.source_B, release = self.source.staged(transfer.ref, self.link.settle)
            self.counts.staged_bytes += transfer.target_B.nbytes
        assert transfer.source_B is not None
        if is_packed(transfer.source_B):
            nbytes, pair = transfer.nbytes, (transfer.target_B, transfer.source_B)
        else:
            piece = slice(transfer.given, transfer.given + elements)
            nbytes, pair = elements * transfer.target_B.itemsize, (transfer.target_B[piece], transfer.source_B[piece])
        self._guard(transfer, self.link.copy, *pair)
        transfer.given += elements
        if transfer.urgency == Urgency.DEMAND:
            self.counts.demanded_bytes += nbytes
        else:
            self.counts.prefetched_bytes += nbytes
        if transfer.given == transfer.target_B.numel():
            transfer.mark = self._guard(transfer, self.link.mark)
            self._complete += 1
            transfer.order = self._complete
        if release is not None:
            release(transfer.mark)
        return nbytes

    def _guard(self, transfer: Transfer, call: Callable[..., Any], *args: Any) -> Any:
        try:
            return call(*args)
        except RuntimeError as error:  # CUDA's errors are
            raise _failed(str(transfer.ref), error) from error


def is_packed(source: Tensor) -> bool:
    """Whether a source is the bytes of a packed block."""
    return source.dtype == torch.uint8


def _failed(which: str, error: RuntimeError) -> InferenceError:
    return InferenceError(
        f"{which}: copying gate_up_proj and down_proj to the device failed: {error}; the device's state is unknown: "
        "start again"
    )


class SimulatedLink:
    """A link on a clock that the test moves: bytes are moved when their time has come, not before.

    Args:
        rate: bytes per second.
        latency_s: of each piece.

    Attributes:
        now: seconds.
    """

    def __init__(self, rate: float = 50e9, latency_s: float = 0.0) -> None:
        self.rate, self.latency_s = rate, latency_s
        self.now = self.busy_until = 0.0
        self._stall_s = 0.0
        self._flying: deque[tuple[float, Tensor, Tensor]] = deque()

    @property
    def stall_s(self) -> float:
        return self._stall_s

    def copy(self, target_B: Tensor, source_B: Tensor) -> None:
        self.busy_until = max(self.now, self.busy_until) + self.latency_s + source_B.nbytes / self.rate
        self._flying.append((self.busy_until, target_B, source_B))

    def mark(self) -> float:
        return self.busy_until

    def done(self, mark: float) -> bool:
        return mark <= self.now

    def wait(self, mark: float) -> None:
        self._stall_s += max(mark - self.now, 0.0)
        self._until(mark)

    def settle(self, mark: float) -> None:
        self._until(mark)

    def fence(self) -> None:
        """Computing takes no time here but what the test says: it is done."""

    def advance(self, seconds: float) -> None:
        """Time passes; what has arrived by then is moved."""
        self._until(self.now + seconds)

    def _until(self, mark: float) -> None:
        self.now = max(self.now, mark)
        while self._flying and self._flying[0][0] <= self.now:
            _, target_B, source_B = self._flying.popleft()
            target_B.copy_(unpack(source_B, target_B.numel()) if is_packed(source_B) else source_B)
