"""The run's checkpoints as the training loop sees them: recover at the start, capture after every step, finish.

The order within step t, on every rank:

1. forward and backward, while the capture of step t-1 is copied;
2. before the optimizer changes the state: wait until it is copied (the keeper seals it, whatever becomes of this
   process), then one collective carries every rank's newest sealed step; the least of them is the committed step;
3. the optimizer step;
4. the capture of step t starts: in mode ``wal`` one part of the state and the gradients that the step consumed. It may
   overwrite only what restoring the committed step or a later one does not need, so at every instant one complete step
   lies in memory on all ranks.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from checkpointing.capture import Capturer
from checkpointing.cost import Partition
from checkpointing.keeper.client import KeeperClient
from checkpointing.phases import Board
from checkpointing.protection import Protection, dense, wal
from checkpointing.records import DTYPE_BYTES
from checkpointing.recover import Recovery
from checkpointing.recovery import RecoveryPlan, memory_suffices, plan_recovery
from checkpointing.redo import Redo
from checkpointing.restore import Target
from checkpointing.state.buffers import StateBuffer
from checkpointing.state.extras import capture_rng, restore_rng
from checkpointing.state.gradients import GradientTap
from checkpointing.state.hash import state_hash
from checkpointing.state.partitions import describe_partitions
from checkpointing.state.zero import after_restore, describe_tensors, optimizer_steps, zero_buffers
from trainer.begin_from import begin_from, data_order
from trainer.events import EventLog
from trainer.failpoints import Failpoints
from trainer.origin import Origin
from trainer.progress import Progress
from trainer.rendezvous import Process
from trainer.rotation import settle
from trainer.runfolder import checkpoints_of
from trainer.schema import Recipe


@dataclass
class Stall:
    """Seconds the training thread waited for checkpointing in the current step."""

    copied_s: float = 0.0


@dataclass
class Snapshots:
    """Connects one worker's live state to its node's keeper. Made by :func:`open_snapshots`."""

    recipe: Recipe
    process: Process
    run_dir: Path
    zero_optimizer: Any
    buffers: list[StateBuffer]
    origin: Origin
    events: EventLog
    failpoints: Failpoints
    protection: Protection | None = None
    client: KeeperClient | None = None
    capturer: Capturer | None = None
    tap: GradientTap | None = None
    committed: int = -1  # the newest step that all ranks are known to have sealed
    stall: Stall = field(default_factory=Stall)
    _captured: int = -1

    # -- recovery ------------------------------------------------------------------------------------------------

    def recover(self, progress: Progress) -> RecoveryPlan:
        """Agree with all ranks on the newest complete step, restore it, and bring ``progress`` to it. A collective."""
        self.events.write("recover_begin")
        enabled = self.recipe.checkpoint.memory.enabled
        redo = Redo(self.zero_optimizer.optimizer)
        pinning = self.capturer.pinning if self.capturer is not None else None
        pin = pinning.pin if pinning is not None else lambda slot: None
        halfway = partial(self.failpoints.reached, "recovery")
        target = Target(self.buffers, self.process.coordinate, redo, pin=pin, halfway=halfway)
        place = checkpoints_of(self.recipe, self.run_dir)
        recovery = Recovery(self.client, self.run_dir, target, enabled, self.origin.recipe, place)
        in_memory = self._gather(recovery.report_memory())
        # A slow disk is asked only when memory does not do.
        if memory_suffices(in_memory):
            reports = [{"memory": steps} for steps, _ in in_memory]
        else:
            reports = self._gather(recovery.report())
        for problem in recovery.problems:
            print(f"recovery of {self.process.coordinate}: {problem}", flush=True)
        plan = plan_recovery(reports)
        if self.process.rank == 0:
            print(f"recovery: {plan.reason}", flush=True)
            self.events.write("recovery_plan", step=plan.step, tier=plan.tier, reason=plan.reason)
        extras = recovery.apply(plan)
        if target.applied and self.process.rank == 0:
            print(f"recovery: steps {target.applied[0]} to {target.applied[-1]} redone from the log", flush=True)
        if plan.tier != "fresh":
            self.origin.check(extras["origin"])
            progress.load(extras["progress"])
            after_restore(self.zero_optimizer, progress.optimizer_steps)
            restore_rng(extras)
        elif self.recipe.checkpoint.load_from is not None:
            begin_from(self, progress)
        if self.tap is not None:
            self.tap.recount()
            if recovery.tier != "memory":
                self._begin_window(progress)
            else:
                self._renew(target, progress)
        if pinning is not None:
            pinning.pin_rest()
        self.committed = plan.step
        self.events.write("recovered", step=plan.step, tier=plan.tier, redone=target.applied)
        return plan

    def _gather(self, mine: Any) -> list[Any]:
        everyone: list[Any] = [None] * self.process.world
        dist.all_gather_object(everyone, mine)
        return everyone

    def _begin_window(self, progress: Progress) -> None:
        """A log is worth nothing without bases: capture the state whole before the first step."""
        assert self.capturer is not None
        assert self.protection is not None
        self._captured = progress.step
        self.capturer.start(progress.step, self._extras(progress), -1, self.protection.fragments)

    def _renew(self, target: Target, progress: Progress) -> None:
        """Capture again what a damaged record left with too old a base."""
        assert self.capturer is not None
        assert self.protection is not None
        fragments = self.protection.outgrown(progress.step, target.bases)
        if fragments:
            self._captured = progress.step
            self.capturer.start(progress.step, self._extras(progress), -1, fragments)

    # -- the training step ---------------------------------------------------------------------------------------

    def settle(self) -> int:
        """Wait until the last capture is copied; afterwards the state may change.

        Returns this rank's newest sealed step, which travels with the step's collective.
        """
        self.stall = Stall()
        if self.capturer is None or self._captured < 0:
            return self.committed  # nothing captured yet in this attempt: what was restored still stands
        self.stall.copied_s = self.capturer.wait_copied()
        return self.capturer.sealed_step

    def after_step(self, step: int, progress: Progress) -> None:
        """Start capturing ``step`` in the background if it is due, over what the committed step does not need."""
        log = self.tap.take() if self.tap is not None else None
        if self.capturer is None or self.protection is None:
            return
        whole = self._due_whole(step)
        if log is None and not whole:
            return
        fragments = self.protection.due(step)
        self.capturer.start(
            step, self._extras(progress), self.committed, fragments if whole else fragments[:1], log, least=1
        )
        self._captured = step

    def _due_whole(self, step: int) -> bool:
        memory, disk = self.recipe.checkpoint.memory, self.recipe.checkpoint.disk
        for_disk = (disk.every > 0 and step % disk.every == 0) or (disk.final and step == self.recipe.train.steps)
        for_memory = self.tap is None and memory.enabled and step % memory.every == 0
        return for_disk or for_memory or (self.tap is None and step == self.recipe.train.steps)

    def _extras(self, progress: Progress) -> dict[str, bytes]:
        return {**self.extras(progress), "origin": self.origin.dump()}

    def extras(self, progress: Progress) -> dict[str, bytes]:
        progress.optimizer_steps = self.tap.counts if self.tap is not None else optimizer_steps(self.zero_optimizer)
        return {"progress": progress.dump(), **capture_rng()}

    # -- the end ---------------------------------------------------------------------------------------------------

    def state_hash(self, progress: Progress) -> str:
        """See :mod:`checkpointing.state.hash`. A collective."""
        return state_hash(self.buffers, self.extras(progress), self.process.coordinate)

    def finish(self) -> None:
        """Persist the last captured step, if there is one and the recipe wants it on disk, and let the keeper go."""
        if self.capturer is None or self.client is None:
            return
        self.capturer.wait_copied()
        self.capturer.wait_sealed(self._captured)
        dist.barrier()
        self.client.finish(persist=self.recipe.checkpoint.disk.final and self._captured >= 0)
        self.capturer.close()


def open_snapshots(
    recipe: Recipe,
    process: Process,
    run_dir: Path,
    zero_optimizer: Any,
    events: EventLog,
    failpoints: Failpoints,
    origin: Origin,
    board: Board | None = None,
) -> Snapshots:
    """Attach to the node's keeper, starting one if there is none, and register this worker's state."""
    buffers = zero_buffers(zero_optimizer)
    checkpoint = recipe.checkpoint
    writes = checkpoint.disk.every > 0 or checkpoint.disk.final
    snapshots = Snapshots(recipe, process, run_dir, zero_optimizer, buffers, origin, events, failpoints)
    if not (checkpoint.memory.enabled or writes):
        return snapshots
    protection = _protect(snapshots)
    disk = asdict(checkpoint.disk) if writes else None
    client = KeeperClient.attach(
        run_dir,
        coordinate=process.coordinate,
        coordinates=[f"dp{rank:04d}" for rank in range(process.world)],
        shape=protection.shape,
        rules=protection.rules,
        fingerprint=origin.recipe,
        attempt=events.attempt,
        disk=disk,
        linger_s=checkpoint.linger_s,
        tensors=describe_tensors(zero_optimizer),
        metadata=asdict(origin) | data_order(recipe),
        partitions=describe_partitions(buffers, zero_optimizer.optimizer),
        kill=failpoints.keeper_kill(),
        disk_fault=failpoints.disk_fault(),
        board=board,
        populate=process.device.type != "cuda",
    )
    snapshots.protection, snapshots.client = protection, client
    snapshots.capturer = Capturer(client, buffers, protection.log, reached=failpoints.reached)
    return snapshots


def _protect(snapshots: Snapshots) -> Protection:
    """The recipe's mode, applied to this worker's state. Without a memory tier every capture is whole, for the disk."""
    checkpoint = snapshots.recipe.checkpoint
    if not checkpoint.memory.enabled:
        return dense(snapshots.buffers, generations=2)
    if checkpoint.mode == "dense":
        return dense(snapshots.buffers, generations=4 if checkpoint.disk.every > 0 else 3)
    snapshots.tap = GradientTap(snapshots.zero_optimizer)
    disk = checkpoint.disk.every > 0 or checkpoint.disk.final
    width = DTYPE_BYTES[snapshots.tap.dtype]
    partition = Partition(sum(b.tensor.numel() for b in snapshots.buffers) // 3, width, disk)
    rotation = settle(snapshots.recipe, snapshots.process, snapshots.run_dir, snapshots.events, partition)
    return wal(snapshots.buffers, rotation, snapshots.tap.dtype, disk)
