"""Copying live state into slots beside the training step.

Bytes move as :mod:`checkpointing.copies` says. Where a capture's memory was found before it starts, its copies are
queued by the thread that starts it: from a thread of their own, each call would take the interpreter lock from the
training thread, which gets it back late. What is left for the background is to wait for them, to close the records and
to tell the keeper.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import torch

from checkpointing.copies import Batch, Copies, Delivered, DeviceCopies, Freight, HostCopies, Move
from checkpointing.keeper.client import Grant, KeeperClient
from checkpointing.keeper.protocol import KeeperError
from checkpointing.pinning import Pinning
from checkpointing.record_sums import Part, Record
from checkpointing.records import PAGE, Header, Kind, RecordError, encode_table, extras_entries, finish, whole_pages
from checkpointing.slots import ArenaShape, Pool
from checkpointing.state.buffers import StateBuffer
from checkpointing.state.fragments import META_BYTES, Fragment, LogLayout
from checkpointing.state.gradients import StepLog

_PLANS = 512  # kept: more than a rotation's parts in all its slots; experts' would be millions
_SIGN_OF_LIFE_S = 5.0
# How long a capture from a device waits for memory that is being found, most often a millisecond: less than a device is
# busy with the update that was queued before.
_NEARLY_RESERVED_S = 0.005
Reached = Callable[[str, int], None]
Plan = tuple[Record, list[Move]]


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
    rank's small state, and the slots, once its copies are queued."""

    step: int
    fragments: Sequence[Fragment]
    least: int
    log: StepLog | None
    persist: Sequence[int] | None
    extras: dict[str, bytes]
    committed: int
    event: torch.cuda.Event | None = None
    grant: Grant | None = None

    @property
    def wanted(self) -> Wanted:
        return Wanted(self.step, self.committed, len(self.fragments), self.least, _kinds(self.log is not None))


class Capturer:
    """Copies fragments of the buffers and the step's log into fresh slots after a step, in the background.

    Args:
        client: attached to the keeper.
        buffers: the buffers that fragments point into.
        log: the layout of log records; None if steps are not logged.
        reached: a drill's failpoint, called with ("copy", step) before a capture's first byte is copied, ("capture",
            step) when half of them are, ("copied", step) when all are and the records say so, ("told", step) when the
            keeper has been told. On a GPU "capture" is reached when all is queued, as is "copy" if memory was reserved.
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
        self._copies: Copies = HostCopies() if self._device is None else DeviceCopies(self._device, reads_back)
        self._plans: dict[tuple[int, tuple[int, ...]], Plan] = {}
        self._condition = threading.Condition()
        self._sealed_step = client.restored_step
        self._started = 0  # captures; a step may have several
        self._queued = 0  # those whose copies a device will come to
        self._copied = 0
        self._error: BaseException | None = None
        self._reserving = False
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

        Meant for a moment at which the device is busy for a while: what is done here in the background takes the
        interpreter lock, which a step that queues kernels would miss.
        """
        self._reserving = True
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
    ) -> float:
        """Begin to capture these fragments of the state as it is now, once the capture before is copied, and return.

        Args:
            extras: this rank's small state.
            committed: the newest step that all ranks of the job can restore; what that needs is not overwritten.
            fragments: if memory for all is not to be had at once, the first ``least`` will do.
            log: what the step consumed.
            persist: the parts that a checkpoint on disk of this step holds anew, see ``KeeperClient.copied``.
        Returns the seconds waited. Raises the error of an earlier capture; this one's is raised by :meth:`wait_copied`.
        """
        waited_s = self.wait_copied()
        event = None
        if self._device is not None:
            event = torch.cuda.current_stream(self._device.index).record_event()  # a device takes longer to look up
        self._started += 1
        enough = len(fragments) if least is None else least
        job = Job(step, fragments, enough, log, persist, extras, committed, event)
        try:
            if (grant := self._take_reserved(job.wanted)) is not None:
                self._queue(job, grant)
        except Exception as error:
            self._fail(error)
        else:
            self._jobs.put(job)
        return waited_s

    def hold(self) -> float:
        """Call before state is changed: nothing changes it before the last started capture holds its own copy.

        On a device that is the device's affair: it waits there. A log's gradients, which nobody changes, may be on
        their way still. Returns the seconds that the host waited; :meth:`held_s` tells the device's. Raises as
        :meth:`wait_copied` does.
        """
        waited_s = self._wait(lambda: self._queued >= self._started)
        return waited_s if self._copies.hold() else waited_s + self.wait_copied()

    def held_s(self) -> float:
        """Seconds that the device stood still for the last :meth:`hold`. Waits until it has gone on."""
        return self._copies.held_s()

    def wait_copied(self) -> float:
        """Wait until the last started capture holds its own copy of everything.

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
        self._copies.close()
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
                    reserved = job, self._acquire(job)
                    with self._condition:
                        assert self._reserved is None, "what was reserved is not captured yet"
                        self._reserved = reserved
                        self._condition.notify_all()
                else:
                    self._capture(job)
            except BaseException as error:
                self._fail(error)

    def _fail(self, error: BaseException) -> None:
        with self._condition:
            self._error = self._error or error
            self._condition.notify_all()

    def _acquire(self, wanted: Wanted) -> Grant:
        grant = self._client.acquire(wanted.step, wanted.committed, wanted.bases, wanted.least, wanted.kinds)
        for slot in [*grant.bases, *grant.others.values()]:
            self.pinning.pin(slot)
        return grant

    def _take_reserved(self, wanted: Wanted) -> Grant | None:
        """What was found for this capture, if anything was by now, or on a device soon is."""
        with self._condition:
            if self._reserving and self._device is not None:
                self._condition.wait_for(lambda: self._reserved or self._error, _NEARLY_RESERVED_S)
            found, self._reserved, self._reserving = self._reserved, None, False
        if found is None:
            return None
        reserved, grant = found
        assert reserved == wanted, f"{reserved} was reserved, and {wanted} is captured"
        return grant

    def _queue(self, job: Job, grant: Grant) -> None:
        """Begin to copy. The bytes of the log were there before the optimizer changed the state."""
        batches: list[Batch] = []
        records: list[Record] = []
        if job.log is not None:
            slot, parts = grant.others[Kind.LOG], self._log_parts(job.log)
            events: Sequence[torch.cuda.Event | None] = job.log.ready or [job.event] * len(parts)
            for event, part in zip(events, parts, strict=True):
                batches.append(Batch(event, self._moves(slot, Kind.LOG, part)))
            records.append(Record(slot, parts, job.log.sums))
        for slot, fragment in zip(grant.bases, job.fragments, strict=False):
            record, moves = self._base_plan(slot, fragment)
            batches.append(Batch(job.event, moves))
            records.append(record)
        self._copies.queue(Freight(batches, records, job.log.factors if job.log is not None else (), job.event))
        if job.log is not None:
            job.log.release()
        job.grant = grant
        with self._condition:
            self._queued += 1
            self._condition.notify_all()

    def _capture(self, job: Job) -> None:
        grant = job.grant or self._take_reserved(job.wanted) or self._acquire(job.wanted)
        self._reached("copy", job.step)
        if job.grant is None:
            self._queue(job, grant)
        delivered = self._copies.finish(lambda: self._reached("capture", job.step))
        for slot, fragment in zip(grant.bases, job.fragments, strict=False):
            self._close_record(slot, Kind.BASE, grant, job.step, fragment.table, fragment.nbytes)
        if job.log is not None:
            self._close_log(grant, job.step, job.log, delivered)
        self._write_extras(grant, job.step, job.extras)
        self._reached("copied", job.step)
        sealed = self._client.copied(job.step, grant, job.persist, delivered.digests)
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
            plan = self._plans[slot, fragment.parts] = Record(slot, parts), moves
        return plan

    def _log_parts(self, log: StepLog) -> list[Part]:
        assert self._log is not None
        for grad, elements in zip(log.grads, self._log.elements, strict=not log.skipped):
            if grad.numel() != elements or str(grad.dtype) != f"torch.{self._log.dtype}":
                raise RecordError(f"a gradient of {grad.numel()} x {grad.dtype} is not of the log's layout")
        return [(bytes_of(grad), offset) for grad, offset in zip(log.grads, self._log.offsets, strict=not log.skipped)]

    def _moves(self, slot: int, kind: Kind, part: Part) -> list[Move]:
        source, offset = part
        start, piece, size = self._place(slot, kind) + offset, self._copies.piece, source.numel()
        ends = [(at, min(at + piece, size)) for at in range(0, size, piece)]
        return [(source[at:end], self._memory[start + at : start + end]) for at, end in ends]

    # Closing records

    def _close_log(self, grant: Grant, step: int, log: StepLog, delivered: Delivered) -> None:
        assert self._log is not None
        slot, meta = grant.others[Kind.LOG], log.meta(delivered.numbers)
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
