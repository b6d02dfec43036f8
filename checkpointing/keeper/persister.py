"""Writing sealed steps to disk: one at a time, on one thread, never in the way of captures."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from checkpointing.carry import Older, Part, Selection, split
from checkpointing.heldout import losses_of
from checkpointing.keeper.arenas import Slot
from checkpointing.keeper.diskfault import DiskFault
from checkpointing.keeper.faults import Faults
from checkpointing.keeper.health import DiskHealth
from checkpointing.keeper.launch import Lease
from checkpointing.keeper.protocol import KeeperRefused
from checkpointing.manifest import read_manifest
from checkpointing.records import Kind, RecordError, payload_of, table_of, verify
from checkpointing.recovery import RecoveryError
from checkpointing.remote import LocationError
from checkpointing.storage import Place, place_of
from checkpointing.store import (
    abandon_newer,
    clean_unfinished,
    list_checkpoints,
    retain,
    set_aside,
    step_path,
    write_checkpoint,
)
from checkpointing.store import verify as verify_files
from checkpointing.tensorfile import Section, Written


@dataclass(frozen=True)
class Persist:
    """A step to write: the sealed slots of each coordinate, which nobody overwrites until it is done."""

    step: int
    attempt: int
    slots: Mapping[str, Sequence[Slot]]
    tensors: Mapping[str, Any]
    metadata: Mapping[str, Any]
    keep_last: int
    permanent_every: int
    partitions: Mapping[str, str]  # of each coordinate, how they lie
    experts: Mapping[str, Selection]  # of each coordinate in mode pec, empty in others


class Persister:
    """A running write and at most one queued. The queued one is soft: a capture that needs its memory gets it.

    Methods are called by the loop's thread only. ``call`` has the loop call a function, ``event`` writes a row from any
    thread, ``on_done`` is called by the loop after each write with the job and a problem or "".
    """

    def __init__(
        self,
        lease: Lease,
        call: Callable[[Callable[[], None]], None],
        event: Callable[..., None],
        on_done: Callable[[Persist, str], None],
        hashers: Executor,
        health: DiskHealth,
        faults: Faults,
    ) -> None:
        self.directory: Place = lease.run_dir / "checkpoints"
        self.health = health
        self.fault: DiskFault | None = None
        self.running: Persist | None = None
        self.queued: Persist | None = None
        self.newest = max((step for step, _ in list_checkpoints(self.directory)), default=-1)
        # A running write whose step has been discarded: that step may be written anew.
        self._void: Persist | None = None
        self._opened: Place | None = None
        self._lease, self._call, self._event, self._on_done, self._hashers = lease, call, event, on_done, hashers
        self._faults = faults
        self._thread = ThreadPoolExecutor(1, "persist")

    def use(self, disk: Mapping[str, Any] | None, fault: Mapping[str, Any] | None) -> None:
        """Write as a worker says from now on; what an earlier keeper left unfinished there is removed first."""
        self.fault = DiskFault.parse(fault)
        if disk is None:
            return
        self.health.hung_after_s = disk.get("hung_after_s", self.health.hung_after_s)
        url = disk.get("url")
        self.directory = place_of(url) if url else self._lease.run_dir / "checkpoints"
        if self.directory != self._opened:
            self._opened = self.directory
            self._thread.submit(self._open, self.directory)

    def _open(self, directory: Place) -> None:
        try:
            self._check_lease()
            clean_unfinished(directory)
            newest = max((step for step, _ in list_checkpoints(directory)), default=-1)
        except (OSError, RecoveryError) as error:
            self._event("disk_failed", error=f"{directory}: what a killed writer left is not removed: {error}")
            return
        self._call(lambda: self._found(newest))

    def _found(self, newest: int) -> None:
        self.newest = max(self.newest, newest)

    @property
    def idle(self) -> bool:
        return self.running is None and self.queued is None

    def knows(self, step: int) -> bool:
        """Whether a step is being written or waits for it."""
        jobs = [job for job in (self.running, self.queued) if job is not None and job is not self._void]
        return any(job.step == step for job in jobs)

    def submit(self, job: Persist) -> None:
        for slots in job.slots.values():
            for slot in slots:
                slot.users += 1
        if self.running is not None:
            self.health.behind(job.step)
            self.drop_queued("a newer step is due while an earlier one is still being written")
            self.queued = job
        else:
            self._start(job)

    def queued_slots(self) -> set[int]:
        """``id()`` of the slots that :meth:`drop_queued` would give back."""
        slots = self.queued.slots.values() if self.queued is not None else ()
        return {id(slot) for held in slots for slot in held}

    def discard(self, after_step: int) -> None:
        """Set newer checkpoints aside: training goes on from ``after_step`` and will write these steps anew.

        On the writer's thread, so that it comes after a write that is running and before all later ones.
        """
        if self.queued is not None and self.queued.step > after_step:
            self.drop_queued("the run was taken back to an earlier step")
        if self.running is not None and self.running.step > after_step:
            self._void = self.running
        self.newest = min(self.newest, after_step)
        self._thread.submit(self._abandon, after_step)

    def _abandon(self, after_step: int) -> None:
        try:
            self._check_lease()
            for path in abandon_newer(self.directory, after_step):
                self._event("disk_abandoned", path=str(path), reason=f"the run was taken back to step {after_step}")
        except (OSError, RecoveryError) as error:
            self._event("disk_failed", error=f"checkpoints after step {after_step} are not set aside: {error}")

    def _check_lease(self) -> None:
        if not self._lease.holds():
            raise RecoveryError(f"{self._lease.run_dir} was removed, or is another run's now; nothing is written there")

    def drop_queued(self, reason: str) -> bool:
        """Give the queued step's memory back. False if none is queued."""
        job, self.queued = self.queued, None
        if job is None:
            return False
        _release(job)
        self._event("disk_skipped", job.step, job.attempt, reason=reason)
        return True

    def _start(self, job: Persist) -> None:
        self.running = job
        self.health.started(job.step)
        self._thread.submit(self._work, job)

    def _work(self, job: Persist) -> None:
        try:
            problem = self._write(job)
        except BaseException as error:
            problem = f"{type(error).__name__}: {error}"
        self._call(lambda: self._finished(job, problem))

    def _finished(self, job: Persist, problem: str) -> None:
        _release(job)
        self.running = None
        pause_s = self.health.ended(problem)
        if problem:
            self._event("disk_failed", job.step, job.attempt, error=problem, retry_after_s=pause_s)
        else:
            self.newest = max(self.newest, job.step if job is not self._void else -1)
        queued, self.queued = self.queued, None
        if queued is not None:
            self._start(queued)
        self._on_done(job, problem)

    def _write(self, job: Persist) -> str:
        """Write, read back, retain; on the persister's thread. Returns a problem or nothing."""
        started = time.perf_counter()
        self._check_lease()
        final = step_path(self.directory, job.step)
        if final.exists() and not verify_files(final):
            if read_manifest(final)["metadata"].get("recipe") == job.metadata["recipe"]:
                self._event("disk_kept", job.step, job.attempt, path=str(final))
                return ""
            set_aside(final, "abandoned")
        parts: dict[str, list[Section]] = {}
        carried: dict[str, tuple[Place, Written]] = {}
        older = Older.find(self.directory, job.step, job.metadata["recipe"]) if job.experts else None
        for coordinate, slots in job.slots.items():
            sealed = [self._part(job, coordinate, slot) for slot in slots]
            if coordinate in job.experts:
                files, shared = split(job.step, coordinate, sealed, job.experts[coordinate], older)
                parts |= files
                carried |= shared
            else:
                parts[coordinate] = [part.section for part in sealed]
        write_checkpoint(
            self.directory,
            job.step,
            parts,
            job.tensors,
            job.metadata,
            lambda written, total: self._progress(job, written, total),
            job.partitions,
            carried,
        )
        nbytes = sum(entry.nbytes for records in parts.values() for part in records for entry in part.entries)
        self._event("disk_written", job.step, job.attempt,
                     seconds=time.perf_counter() - started, bytes=nbytes)  # fmt: skip
        try:
            self._check_lease()
            losses = losses_of(self._lease.run_dir)
            removed = retain(self.directory, job.keep_last, final, job.permanent_every, losses)
        except RecoveryError as error:
            return str(error)
        if removed:
            self._event("disk_removed", job.step, job.attempt, steps=removed)
        return ""

    def _part(self, job: Persist, coordinate: str, slot: Slot) -> Part:
        try:
            header = verify(slot.view, self._hashers)
        except RecordError as error:
            raise RecordError(f"{coordinate}, slot {slot.index}: {error}; nothing was written") from None
        # Parts of a window, and its log, are of other steps than the checkpoint, and say so in their keys.
        own = header.kind is Kind.EXTRAS or (header.kind is Kind.BASE and header.step == job.step)
        table = table_of(slot.view, header)
        section = Section(table.entries, payload_of(slot.view, header), None if own else header.step)
        return Part(header.kind, header.step, table.parts, section)

    def _progress(self, job: Persist, written: int, total: int) -> None:
        self._check_lease()
        self.health.progress(written, total)
        if self.fault is not None:
            self.fault.strike(job.step, written, total)
        if 2 * written >= total:
            self._faults.reached("disk", job.step)


def check_place(disk: Mapping[str, Any] | None) -> None:
    """Raises KeeperRefused for a URL that this keeper cannot use."""
    try:
        place_of((disk or {}).get("url") or "")
    except LocationError as error:
        raise KeeperRefused(str(error)) from None


def _release(job: Persist) -> None:
    for slots in job.slots.values():
        for slot in slots:
            slot.release()
