"""Copying live state into slots beside the training step.

On CPU a thread copies with memmove, which releases the GIL and, unlike a tensor copy, starts no second pool of compute
threads. On CUDA each slot is registered once as pinned memory and a side stream copies, piece by piece. All pieces are
queued by one call: each call of its own would take the interpreter lock from the training thread, which gets it back
late. A copy engine serves its queue in order, so a training step that reads a single number back would wait for all of
them; after each piece the stream therefore runs a kernel of no other use, and while the engine waits for that it serves
others. The stream has priority: such a kernel would else wait for room on a busy device, and the copies with it.
Queueing a piece holds up a training thread that queues kernels, so pieces are small only where a step reads numbers
back in its midst (figures: docs/measurements.md).
"""

from __future__ import annotations

import ctypes
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import torch

from checkpointing.keeper.client import Grant, KeeperClient
from checkpointing.keeper.protocol import KeeperError
from checkpointing.pinning import Pinning
from checkpointing.record_sums import Part, Record, device_sums
from checkpointing.records import PAGE, Header, Kind, RecordError, encode_table, extras_entries, finish, whole_pages
from checkpointing.slots import ArenaShape, Pool
from checkpointing.state.buffers import StateBuffer
from checkpointing.state.fragments import META_BYTES, Fragment, LogLayout
from checkpointing.state.gradients import StepLog

# So long does a read of the training step wait at most: 0.6 ms over PCIe 5, and 4.9 ms where it rarely reads.
_PIECE, _LARGE_PIECE = 32 << 20, 256 << 20
_PLANS = 512  # kept: more than a rotation's parts in all its slots; experts' would be millions
_SIGN_OF_LIFE_S = 5.0
Reached = Callable[[str, int], None]
Move = tuple[torch.Tensor, torch.Tensor]
Plan = tuple[list[Part], list[Move]]
Run = tuple[torch.cuda.Event | None, list[Move]]  # what to copy after an event of the device


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """A flat tensor's memory as uint8, sharing storage."""
    return tensor.detach().view(torch.uint8)


def arena_shape(
    fragments: Sequence[Fragment], log: LogLayout | None, *, bases: int, logs: int, extras: int
) -> ArenaShape:
    """The memory that one worker needs: so many slots for base records, each as large as the largest fragment, for logs
    and for extras."""
    base = Pool(bases, max(len(f.table) for f in fragments), max(f.nbytes for f in fragments))
    if log is None:
        return ArenaShape(base, Pool(0, 0, 0), extras)
    return ArenaShape(base, Pool(logs, len(log.table), log.nbytes), extras)


def _kinds(log: bool) -> tuple[Kind, ...]:
    """Of a capture's records besides bases."""
    return (Kind.LOG, Kind.EXTRAS) if log else (Kind.EXTRAS,)


@dataclass(frozen=True)
class Wanted:
    """Slots for a capture: so many ``bases`` or at least ``least``, and one of each of ``kinds``."""

    step: int
    committed: int
    bases: int
    least: int
    kinds: tuple[Kind, ...]


@dataclass
class Job:
    """One capture: which fragments (the first ``least`` of them at least), the step's log, which parts go to disk, this
    rank's small state."""

    step: int
    fragments: Sequence[Fragment]
    least: int
    log: StepLog | None
    persist: Sequence[int] | None
    extras: dict[str, bytes]
    committed: int
    event: torch.cuda.Event | None = None


class Capturer:
    """Copies fragments of the buffers and the step's log into fresh slots after a step, in the background.

    Args:
        client: attached to the keeper.
        buffers: the buffers that fragments point into.
        log: the layout of log records; None if steps are not logged.
        reached: a drill's failpoint, called with ("copy", step) before a capture's first byte is copied, ("capture",
            step) when half of them are, ("copied", step) when all are and the records say so, ("told", step) when the
            keeper has been told.
        reads_back: whether the training step reads numbers back from the device while it computes.
    """

    def __init__(
        self,
        client: KeeperClient,
        buffers: Sequence[StateBuffer],
        log: LogLayout | None = None,
        reached: Reached | None = None,
        reads_back: bool = False,
    ) -> None:
        self._client, self._buffers, self._log = client, buffers, log
        self._reached = reached or (lambda point, step: None)
        devices = {b.tensor.device for b in buffers if b.tensor.is_cuda}
        assert len(devices) <= 1, "one worker's state lies on one device"
        self._device = next(iter(devices), None)
        self._memory = torch.frombuffer(client.arena.memory, dtype=torch.uint8)
        self.pinning = Pinning(client.arena, self._device)
        self._stream = None if self._device is None else torch.cuda.Stream(self._device, priority=-1)
        self._piece = _PIECE if reads_back else _LARGE_PIECE
        # What the kernels between pieces copy: to another dtype, since that takes a kernel.
        self._gap = (torch.zeros(1, device=self._device), torch.zeros(1, dtype=torch.int32, device=self._device))
        self._sums = device_sums(self._device)
        self._plans: dict[tuple[int, tuple[int, ...]], Plan] = {}
        self._condition = threading.Condition()
        self._sealed_step = client.restored_step
        self._started = 0  # captures; a step may have several
        self._copied = 0
        self._error: BaseException | None = None
        self._reserved: tuple[Wanted, Grant] | None = None
        self._jobs: queue.SimpleQueue[Job | Wanted | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="capture", daemon=True)
        self._thread.start()

    @property
    def sealed_step(self) -> int:
        """The newest step that the keeper has sealed for this worker, -1 if none."""
        return self._sealed_step

    def reserve(self, step: int, committed: int, log: bool) -> None:
        """Have the slots found for the capture of one fragment that starts next, and return; arguments as of ``start``.

        Meant for a moment at which the training thread waits for the device: what is done here in the background takes
        the interpreter lock, which a step that queues kernels would miss.
        """
        self._jobs.put(Wanted(step, committed, 1, 1, _kinds(log)))

    def start(
        self,
        step: int,
        extras: dict[str, bytes],
        committed: int,
        fragments: Sequence[Fragment],
        log: StepLog | None = None,
        least: int | None = None,
        persist: Sequence[int] | None = None,
    ) -> None:
        """Begin to capture these fragments of the state as it is now, and return.

        Args:
            extras: this rank's small state.
            committed: the newest step that all ranks of the job can restore; what that needs is not overwritten.
            fragments: if memory for all is not to be had at once, the first ``least`` will do.
            log: what the step consumed.
            persist: the parts that a checkpoint on disk of this step holds anew, see ``KeeperClient.copied``.
        Raises the error of an earlier capture.
        """
        self._raise_error()
        assert self._copied == self._started, "call wait_copied() before the next start()"
        event = None
        if self._stream is not None:
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(self._device))
        self._started += 1
        enough = len(fragments) if least is None else least
        self._jobs.put(Job(step, fragments, enough, log, persist, extras, committed, event))

    def wait_copied(self) -> float:
        """Wait until the last started capture holds its own copy of everything: call before state is changed.

        The keeper knows of it then, and seals it even if this process dies at once. Returns the seconds waited. Raises
        the error of the capture, or KeeperError if the keeper is silent for minutes.
        """
        return self._wait(lambda: self._copied >= self._started)

    def wait_sealed(self, step: int) -> float:
        """Wait until ``step`` is sealed. Returns the seconds waited; raises what the keeper reported."""
        return self._wait(lambda: self._sealed_step >= step)

    def close(self) -> None:
        """End after the captures that were started; if the client is closed already, they end with it.

        After a failure close the client first: a capture may be waiting for memory that no one will free.
        """
        self._jobs.put(None)
        self._thread.join()
        self.pinning.close()
        # These views would keep the arena mapped.
        self._plans.clear()
        self._memory = torch.empty(0, dtype=torch.uint8)

    def _wait(self, condition: Callable[[], bool]) -> float:
        started = time.perf_counter()
        since, ended = time.monotonic(), False
        while not ended:
            with self._condition:
                ended = self._condition.wait_for(lambda: condition() or self._error is not None, _SIGN_OF_LIFE_S)
            if not ended:
                self._client.check_heard(since)
        self._raise_error()
        return time.perf_counter() - started

    def _raise_error(self) -> None:
        if self._error is not None:
            raise KeeperError(f"capturing failed: {self._error}") from self._error

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                if isinstance(job, Wanted):
                    self._reserved = job, self._acquire(job)
                else:
                    self._capture(job)
            except BaseException as error:
                self._fail(error)

    def _fail(self, error: BaseException) -> None:
        with self._condition:
            self._error = self._error or error
            self._condition.notify_all()

    def _acquire(self, wanted: Wanted) -> Grant:
        assert self._reserved is None, "what was reserved is not captured yet"
        grant = self._client.acquire(wanted.step, wanted.committed, wanted.bases, wanted.least, wanted.kinds)
        for slot in [*grant.bases, *grant.others.values()]:
            self.pinning.pin(slot)
        return grant

    def _grant(self, job: Job) -> Grant:
        wanted = Wanted(job.step, job.committed, len(job.fragments), job.least, _kinds(job.log is not None))
        if self._reserved is None:
            return self._acquire(wanted)
        (reserved, grant), self._reserved = self._reserved, None
        assert reserved == wanted, f"{reserved} was reserved, and {wanted} is captured"
        return grant

    def _capture(self, job: Job) -> None:
        grant = self._grant(job)
        granted = list(zip(grant.bases, job.fragments, strict=False))
        self._reached("copy", job.step)
        records: list[Record] = []
        runs: list[Run] = []
        summed = job.event
        if job.log is not None:
            # First, since the gradients were there before the optimizer changed the state.
            slot, parts = grant.others[Kind.LOG], self._log_parts(job.log)
            events = job.log.ready or [job.event] * len(parts)
            summed = job.log.summed or job.event
            runs += [(event, self._moves(slot, Kind.LOG, part)) for event, part in zip(events, parts, strict=True)]
            records.append((slot, parts, job.log.sums))
        for slot, fragment in granted:
            parts, moves = self._base_plan(slot, fragment)
            runs.append((job.event, moves))
            records.append((slot, parts, ()))
        begun = self._sums.queue_records(records, job.event, summed) if self._sums is not None else []
        self._copy(runs, job)
        sums = self._sums.take_records(begun) if self._sums is not None else {}
        for slot, fragment in granted:
            self._close_record(slot, Kind.BASE, grant, job.step, fragment.table, fragment.nbytes)
        if job.log is not None:
            self._close_log(grant, job.step, job.log)
            job.log = None  # gradients stay in memory only until they are copied
        self._write_extras(grant, job.step, job.extras)
        self._reached("copied", job.step)
        sealed = self._client.copied(job.step, grant, job.persist, sums)
        self._reached("told", job.step)
        with self._condition:
            self._copied += 1
            self._condition.notify_all()
        sealed.add_done_callback(lambda done: self._on_sealed(job.step, done))

    # What goes where

    def _place(self, slot: int, kind: Kind) -> int:
        """Where the payload of a slot starts in the arena."""
        shape = self._client.arena.shape
        pool = shape.base if kind is Kind.BASE else shape.log
        return self._client.arena.places[slot].offset + pool.payload_offset

    def _base_plan(self, slot: int, fragment: Fragment) -> Plan:
        """Made once: what takes the interpreter's lock beside a training step makes it slower by as much.

        A capturer sees one cut of the state only, so a fragment's parts tell its pieces.
        """
        plan = self._plans.get((slot, fragment.parts))
        if plan is None:
            if len(self._plans) == _PLANS:
                self._plans.clear()
            parts = [(bytes_of(self._buffers[p.buffer].tensor[p.lo : p.hi]), p.offset) for p in fragment.pieces]
            moves = [move for part in parts for move in self._moves(slot, Kind.BASE, part)]
            plan = self._plans[slot, fragment.parts] = parts, moves
        return plan

    def _log_parts(self, log: StepLog) -> list[Part]:
        assert self._log is not None
        for grad, elements in zip(log.grads, self._log.elements, strict=not log.skipped):
            if grad.numel() != elements or str(grad.dtype) != f"torch.{self._log.dtype}":
                raise RecordError(f"a gradient of {grad.numel()} x {grad.dtype} is not of the log's layout")
        return [(bytes_of(grad), offset) for grad, offset in zip(log.grads, self._log.offsets, strict=not log.skipped)]

    def _moves(self, slot: int, kind: Kind, part: Part) -> list[Move]:
        source, offset = part
        start = self._place(slot, kind) + offset
        target = self._memory[start : start + source.numel()]
        return list(zip(source.split(self._piece), target.split(self._piece), strict=True))

    def _copy(self, runs: list[Run], job: Job) -> None:
        half = sum(len(moves) for _, moves in runs) // 2
        if self._stream is None:
            for number, (source, target) in enumerate(move for _, moves in runs for move in moves):
                if number == half:
                    self._reached("capture", job.step)
                ctypes.memmove(target.data_ptr(), source.data_ptr(), source.numel())
            return
        copied = torch.cuda.Event(blocking=True)  # sleeps; another would spin on a core that launches kernels
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            for after, moves in runs:
                assert after is not None
                self._stream.wait_event(after)
                before = max(half, 0)
                self._queue(moves[:before])
                if 0 <= half < len(moves):
                    self._reached("capture", job.step)
                self._queue(moves[before:])
                half -= len(moves)
            assert job.event is not None
            self._stream.wait_event(job.event)  # the log's factors are there only then
            copied.record(self._stream)
        copied.synchronize()

    def _queue(self, moves: list[Move]) -> None:
        if not moves:
            return
        number, number_again = self._gap
        sources = [tensor for source, _ in moves for tensor in (source, number)]
        targets = [tensor for _, target in moves for tensor in (target, number_again)]
        torch._foreach_copy_(targets, sources, non_blocking=True)

    # Closing records

    def _close_log(self, grant: Grant, step: int, log: StepLog) -> None:
        assert self._log is not None
        slot = grant.others[Kind.LOG]
        # On the side stream: another would wait for the training step that is queued behind it.
        with torch.cuda.stream(self._stream):
            meta = log.meta()
        if len(meta) > META_BYTES:
            raise RecordError(f"{len(meta):,} bytes of optimizer settings do not fit the log's {META_BYTES:,}")
        view = self._client.arena.slots[slot]
        at = self._client.arena.shape.log.payload_offset + self._log.meta_offset
        view[at : at + META_BYTES] = meta.ljust(META_BYTES)
        table = self._log.skipped_table if log.skipped else self._log.table
        self._close_record(slot, Kind.LOG, grant, step, table, self._log.nbytes)

    def _write_extras(self, grant: Grant, step: int, extras: dict[str, bytes]) -> None:
        entries = extras_entries(extras)
        table, payload = encode_table(entries), b"".join(extras.values())
        offset = PAGE + whole_pages(len(table))
        index = grant.others[Kind.EXTRAS]
        slot = self._client.arena.slots[index]
        if offset + len(payload) > len(slot):
            raise RecordError(f"extras of {len(payload):,} bytes do not fit their slot of {len(slot):,}")
        slot[offset : offset + len(payload)] = payload
        header = Header(Kind.EXTRAS, step, self._client.attempt, grant.sequence, len(table), offset, len(payload))
        finish(slot, header, table)

    def _close_record(self, slot: int, kind: Kind, grant: Grant, step: int, table: bytes, nbytes: int) -> None:
        shape = self._client.arena.shape
        offset = (shape.base if kind is Kind.BASE else shape.log).payload_offset
        header = Header(kind, step, self._client.attempt, grant.sequence, len(table), offset, nbytes)
        finish(self._client.arena.slots[slot], header, table)

    def _on_sealed(self, step: int, done: Future[None]) -> None:
        error = done.exception()
        if error is not None:
            self._fail(error)
            return
        with self._condition:
            self._sealed_step = max(self._sealed_step, step)
            self._condition.notify_all()
