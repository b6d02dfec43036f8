"""Timing blocks of training steps under an arm, recoveries from memory, and loads; the figures are plain values."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.arms import Arm, Dcp, DeepSpeed, Planaria
from benchmarks.recovery_clock import watched
from benchmarks.workload import Job
from checkpointing.state.buffers import StateBuffer
from checkpointing.state.zero import zero_buffers
from trainer.events import read_events
from trainer.loop import train_step
from trainer.progress import Progress

_LONGEST_SAVE = 1000  # steps
_PIECE = 64 << 20
Figures = dict[str, Any]


class BenchmarkError(RuntimeError):
    """A measurement that would mean nothing; the message says which and why."""


class Clocked:
    """An arm in the training loop's seat for snapshots, with a clock on what the training thread gives to it.

    On a GPU ``settle`` is called while the device computes: what a thread waits there need not cost the step as much.
    """

    def __init__(self, arm: Arm, job: Job) -> None:
        self._arm, self._job = arm, job
        self.saving = arm.every_step
        self.stall_s = self.untimed_s = 0.0
        self.saved: list[int] = []

    @property
    def committed(self) -> int:
        return self._arm.committed

    @committed.setter
    def committed(self, step: int) -> None:
        self._arm.committed = step

    def settle(self) -> int:
        started = time.perf_counter()
        safe = self._arm.settle()
        self.stall_s += time.perf_counter() - started
        return safe

    def reserve(self, step: int) -> None:
        started = time.perf_counter()
        self._arm.reserve(step)
        self.stall_s += time.perf_counter() - started

    def after_step(self, step: int, progress: Progress) -> None:
        if not self.saving:
            return
        started = time.perf_counter()
        if not self._arm.every_step:
            self.saved = fingerprint(zero_buffers(self._job.zero_optimizer))
            self.untimed_s += time.perf_counter() - started
            started = time.perf_counter()
        self._arm.after_step(step, progress)
        self.stall_s += time.perf_counter() - started


class Stepper:
    """Steps a job under one arm, one block long."""

    def __init__(self, job: Job, arm: Arm) -> None:
        self._job, self._arm = job, arm
        self.clocked = Clocked(arm, job)
        self.durations: list[float] = []
        self.stalls: list[float] = []

    def __enter__(self) -> Stepper:
        self._arm.prepare()
        self._job.run.meter.take()
        dist.barrier()
        self._arm.attach()
        self._job.run.snapshots = self.clocked  # type: ignore[assignment]
        self._job.run.progress = self._arm.progress
        return self

    def __exit__(self, *_: object) -> None:
        self._arm.detach()

    def step(self, timed: bool = True) -> int:
        """One optimizer step; returns its number, counted within the arm."""
        run, number = self._job.run, self._arm.progress.step + 1
        self.clocked.stall_s = self.clocked.untimed_s = 0.0
        started = time.perf_counter()
        train_step(run, number)
        run.phases.enter("capture", number)
        self.clocked.after_step(number, run.progress)
        if timed:
            self.durations.append(time.perf_counter() - started - self.clocked.untimed_s)
            self.stalls.append(self.clocked.stall_s)
        return number


def run_block(job: Job, arm: Arm) -> Figures:
    """Seconds per step (``durations``) and, of these, seconds that the training thread waited (``stalls``).

    An arm that saves in every step is timed in its steady state. One that saves at times is given one save, and is
    timed from it until all ranks know that it is safe on disk. ``drain_s`` is how long the last save took when nothing
    else ran.
    """
    config = job.config
    with Stepper(job, arm) as stepper:
        for _ in range(config.warm):
            stepper.step(timed=False)
        if arm.every_step:
            for _ in range(config.timed):
                stepper.step()
        else:
            stepper.clocked.saving = True
            number = stepper.step()
            stepper.clocked.saving = False
            while arm.committed < number:
                stepper.step()
                if len(stepper.durations) > _LONGEST_SAVE:
                    raise BenchmarkError(f"{arm.name}: a save was not safe after {_LONGEST_SAVE} steps")
        drain_s = arm.drain()
        figures = {"arm": arm.name, "durations": stepper.durations, "stalls": stepper.stalls, "drain_s": drain_s}
        saved = stepper.clocked.saved
    return figures | ({"saved": saved} if saved else {})


def fingerprint(buffers: list[StateBuffer]) -> list[int]:
    """A sum over each buffer's bits: tells whether a load brought back what was saved. Quick where the buffer lies."""
    return [int(b.tensor.detach().view(torch.int32).sum(dtype=torch.int64)) for b in buffers]


def spoil(buffers: list[StateBuffer]) -> None:
    """Overwrite the state, so that a load that does nothing shows."""
    for buffer in buffers:
        buffer.tensor.fill_(0.5)


def slowest(seconds: Figures) -> Figures:
    """Of each figure the largest over all ranks: a job goes on when the last rank does. A collective."""
    everyone: list[Figures] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, seconds)
    return {name: max(one[name] for one in everyone) for name in seconds}


def run_recoveries(job: Job, arm: Planaria) -> list[Figures]:
    """Train an unbroken run of steps, then lose the state and recover it from the keeper's memory, several times.

    Each figure is the slowest rank's. ``attach_s`` maps the memory and ``verify_s`` waits for the keeper's proof; both
    overlap with a restarted worker's imports in a real restart. ``restore_s`` is the time from the beginning of the
    first of that wait, verifying again (``check_s``), registering (``pin_s``), copying and redo (``redo_s``, which
    holds the copying of logs and of later bases) to the end of the last; :mod:`benchmarks.recovery_clock`. They
    overlap. ``apply_s`` is its end, once the plan is known. Afterwards weights are made from the masters, and further
    slots are registered beside the first step; ``total_s`` waits until the device answers. ``copy_s`` is what copying
    as many bytes (``nbytes``) takes from slots that are registered already, and nothing else.

    Raises BenchmarkError if what was recovered is not, bit for bit, what was lost.
    """
    protection = arm.snapshots.protection
    assert protection is not None
    with Stepper(job, arm) as stepper:
        for _ in range(2 * len(protection.fragments) + 4):
            stepper.step()
        arm.drain()
    buffers = zero_buffers(job.zero_optimizer)
    lost, step = fingerprint(buffers), arm.progress.step
    found = []
    for _ in range(job.config.recoveries):
        arm.leave()
        spoil(buffers)
        _wait_for_all()
        started = time.perf_counter()
        arm.come_back()
        attached = time.perf_counter()
        with watched() as clock:
            plan = arm.snapshots.recover(arm.progress)
            _wait_for_device()
        ended = time.perf_counter()
        arm.detach()
        if plan.step != step or fingerprint(buffers) != lost:
            raise BenchmarkError(f"{arm.name}: recovered step {plan.step} of {step}, or other bits than were lost")
        redone = len(read_events(arm.snapshots.run_dir)[-1].get("redone", []))
        log = protection.log.nbytes if protection.log is not None else 0
        nbytes = sum(f.nbytes for f in protection.fragments) + redone * log
        times = {"total_s": ended - started, "attach_s": attached - started, **clock.seconds()}
        found.append(
            slowest(times | {"copy_s": _copy_from_slots(arm, nbytes)})
            | {"redone": redone, "nbytes": nbytes, "exact": True}
        )
    return found


def _copy_from_slots(arm: Planaria, nbytes: int) -> float:
    """Seconds to bring ``nbytes`` of the arena's registered memory to the device that the state lies on."""
    client, device = arm.snapshots.client, arm.job.process.device
    assert client is not None
    arm.pin()
    memory = torch.frombuffer(client.arena.memory, dtype=torch.uint8)
    piece = torch.empty(min(_PIECE, nbytes), dtype=torch.uint8, device=device)
    _wait_for_device()
    started = time.perf_counter()
    left = nbytes
    for place in client.arena.places:  # slot by slot: no copy may span two registrations
        for at in range(place.offset, place.offset + place.nbytes, _PIECE):
            part = memory[at : at + min(_PIECE, place.offset + place.nbytes - at, left)]
            if left:
                piece[: part.numel()].copy_(part, non_blocking=True)
            left -= part.numel() if left else 0
    _wait_for_device()
    return time.perf_counter() - started


def run_loads(job: Job, arm: DeepSpeed | Dcp, saved: list[int], repeats: int) -> list[Figures]:
    """Spoil the state and load the arm's last save, which was just written and lies in the page cache.

    ``exact``: whether the loaded bits are those that were saved.
    """
    found = []
    for _ in range(repeats):
        spoil(zero_buffers(job.zero_optimizer))
        _wait_for_all()
        started = time.perf_counter()
        arm.load()
        _wait_for_device()
        took = {"total_s": time.perf_counter() - started}
        exact = fingerprint(zero_buffers(job.zero_optimizer)) == saved
        found.append(slowest(took) | {"exact": bool(1 - slowest({"wrong": int(not exact)})["wrong"])})
    return found


def _wait_for_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _wait_for_all() -> None:
    _wait_for_device()
    dist.barrier()
