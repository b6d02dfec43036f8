"""Bytes of live state on their way into slots.

On CPU a thread copies with memmove, which releases the GIL and, unlike a tensor copy, starts no second pool of compute
threads. On CUDA slots are registered as pinned memory, and a side stream copies piece by piece. A copy engine serves
its queue in order, so a training step that reads a single number back would wait for all of them; between pieces the
stream therefore runs a kernel of no other use, and while the engine waits for that it serves others. The stream has
priority: such a kernel would else wait for room on a busy device, and the copies with it. Queueing a piece takes the
training thread's time, so pieces are small only where a step reads numbers back in its midst (figures:
docs/measurements.md).
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from checkpointing.record_sums import Record, Run, device_sums

# So long does a read of the training step wait at most: 0.6 ms over PCIe 5, and 5 ms where it reads only its loss and
# its gradients' norm, when the copies of the step before are mostly done and the device is busy with the update.
_PIECE, _LARGE_PIECE = 32 << 20, 256 << 20
Move = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Batch:
    """What to copy after an event of the device: pairs of a source and a target."""

    after: torch.cuda.Event | None
    moves: Sequence[Move]


@dataclass(frozen=True)
class Freight:
    """What one capture copies.

    Attributes:
        batches: bytes. Those that are there before ``after`` are a log's: nobody changes them, so that others may be
            copied between them.
        records: what the bytes are, for whoever takes their digests.
        numbers: tensors [1] that are wanted as numbers.
        after: the event of the device after which records and numbers are there.
    """

    batches: Sequence[Batch]
    records: Sequence[Record]
    numbers: Sequence[Tensor]
    after: torch.cuda.Event | None


@dataclass(frozen=True)
class Delivered:
    """``numbers`` as wanted, and ``digests`` that need not be taken any more, by slot: see
    :func:`checkpointing.records.seal`."""

    numbers: list[float]
    digests: dict[int, dict[int, bytes]] = field(default_factory=dict)


class Copies(Protocol):
    """One freight at a time."""

    piece: int
    """Bytes of a move at most."""

    def queue(self, freight: Freight) -> None:
        """Begin; returns at once. Sources must stay as they are: those that are there before the freight's ``after``
        until :meth:`finish` returns, the others until then or behind :meth:`hold`. Nobody needs to hold on to them."""

    def hold(self) -> bool:
        """Have the device go no further in its current stream before all that may change is copied. False if there is
        no device: the host must wait then."""

    def held_s(self) -> float:
        """How long the device stood still for the last :meth:`hold`; waits for its end. 0 if nothing held it."""

    def finish(self, halfway: Callable[[], None]) -> Delivered:
        """Wait until everything is copied. ``halfway`` is called when half of it is, or all is queued on a device."""

    def close(self) -> None:
        """Wait for what may have been queued and never finished: its slots are about to go."""


class HostCopies:
    """Copies when it is waited for, on the thread that waits."""

    piece = _LARGE_PIECE

    def queue(self, freight: Freight) -> None:
        self._freight = freight

    def hold(self) -> bool:
        return False

    def held_s(self) -> float:
        return 0.0

    def finish(self, halfway: Callable[[], None]) -> Delivered:
        moves = [move for batch in self._freight.batches for move in batch.moves]
        for number, (source, target) in enumerate(moves):
            if number == len(moves) // 2:
                halfway()
            ctypes.memmove(target.data_ptr(), source.data_ptr(), source.numel())
        numbers = torch.cat(list(self._freight.numbers)).tolist() if self._freight.numbers else []
        del self._freight
        return Delivered(numbers)

    def close(self) -> None:
        """Nothing is ever under way while nobody waits."""


class DeviceCopies:
    """Copies on a side stream of ``device``; the GPU takes digests, too, if it can."""

    def __init__(self, device: torch.device, reads_back: bool) -> None:
        self.piece = _PIECE if reads_back else _LARGE_PIECE
        self.stream = torch.cuda.Stream(device, priority=-1)
        # What the kernels between pieces copy: to another dtype, since that takes a kernel.
        self._gap = (torch.zeros(1, device=device), torch.zeros(1, dtype=torch.int32, device=device))
        self._since_gap = 0  # bytes queued since such a kernel
        self._sums = device_sums(device)
        self._digested: list[Run] = []
        self._numbers = torch.empty(0, dtype=torch.float32, pin_memory=True)
        self._late = torch.cuda.Event()
        self._copied = torch.cuda.Event(blocking=True)  # sleeps; another would spin on a core that launches kernels
        self._hold = tuple(torch.cuda.Event(enable_timing=True, blocking=True) for _ in range(2))
        self._holds = False

    def queue(self, freight: Freight) -> None:
        early = [(batch.after, move) for batch in freight.batches if batch.after is not freight.after
                 for move in batch.moves]  # fmt: skip
        late = [move for batch in freight.batches if batch.after is freight.after for move in batch.moves]
        # As much as is copied while the device comes to ``after``; the rest when what may not wait is done.
        now, then = _parted(early)
        with torch.cuda.stream(self.stream):
            self._copy_in_turn(now)
            # Then the digests, or copies would be done before they are.
            self._wait(freight.after)
            self._digested = self._sums.queue_records(freight.records) if self._sums is not None else []
            for sums in (sums for record in freight.records for sums in record.sums if sums is not None):
                sums.record_stream(self.stream)
            self._copy(late)
            self._late.record(self.stream)
            if len(freight.numbers) != len(self._numbers):
                self._numbers = torch.empty(len(freight.numbers), dtype=torch.float32, pin_memory=True)
            numbers = zip(freight.numbers, self._numbers.split(1), strict=False)
            self._copy([move for _, move in then], list(numbers))
            self._copied.record(self.stream)

    def _copy_in_turn(self, moves: Sequence[tuple[torch.cuda.Event | None, Move]]) -> None:
        """Each after its event; those of one event at once."""
        for after, group in itertools.groupby(moves, lambda one: one[0]):
            self._wait(after)
            self._copy([move for _, move in group])

    def _wait(self, event: torch.cuda.Event | None) -> None:
        if event is not None:
            self.stream.wait_event(event)

    def _copy(self, moves: Sequence[Move], last: Sequence[Move] = ()) -> None:
        through: list[Move] = []
        for move in moves:
            move[0].record_stream(self.stream)  # its memory is not given to others before
            if self._since_gap + move[0].numel() > self.piece:
                through.append(self._gap)
                self._since_gap = 0
            through.append(move)
            self._since_gap += move[0].numel()
        if pairs := [*through, *last]:
            sources, targets = zip(*pairs, strict=True)
            torch._foreach_copy_(targets, sources, non_blocking=True)

    def hold(self) -> bool:
        current = torch.cuda.current_stream(self.stream.device)
        begin, end = self._hold
        begin.record(current)
        current.wait_event(self._late)
        end.record(current)
        self._holds = True
        return True

    def held_s(self) -> float:
        if not self._holds:
            return 0.0
        begin, end = self._hold
        end.synchronize()
        self._holds = False
        return float(begin.elapsed_time(end)) / 1000

    def finish(self, halfway: Callable[[], None]) -> Delivered:
        halfway()
        self._copied.synchronize()
        digests = self._sums.take_records(self._digested) if self._sums is not None else {}
        return Delivered(self._numbers.tolist(), digests)

    def close(self) -> None:
        self.stream.synchronize()


def _parted(moves: Sequence[tuple[torch.cuda.Event | None, Move]]) -> tuple[list[Any], list[Any]]:
    """The first half of the bytes, as near as moves allow, and the rest.

    An update reads and writes some 30 bytes of device memory for each number of a log's two: a copy over PCIe moves a
    third to a half of the log meanwhile.
    """
    total, at = sum(source.numel() for _, (source, _) in moves), 0
    for number, (_, (source, _)) in enumerate(moves):
        if 2 * at + source.numel() > total:
            return list(moves[:number]), list(moves[number:])
        at += source.numel()
    return list(moves), []
