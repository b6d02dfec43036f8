"""The run's checkpoints as the training loop sees them: recover at the start, capture after every step, finish.

The order within step t, on every rank:

1. forward and backward, while the capture of step t-1 is copied;
2. before the optimizer changes the state: wait until it is copied, then one collective carries every rank's newest
   sealed step. A GPU does the waiting itself, so that the host can queue what follows;
3. the optimizer step, and the host waits for what the collective brought: the least of the sealed steps is committed.
   The capture of step t may have what restoring that or a later step does not need: one always is in memory, complete;
4. wait until the keeper knows of step t-1, which it seals then, whatever becomes of this process. The capture of
   step t starts: in mode ``wal`` one part of the state and the gradients that the step consumed.
"""

from __future__ import annotations

import functools
import os
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from checkpointing.capture import Capturer
from checkpointing.cost import Partition, does_not_fit
from checkpointing.keeper.client import KeeperClient
from checkpointing.moments import state_width
from checkpointing.partial import Ages
from checkpointing.phases import Board
from checkpointing.protection import Protection, dense, pec, wal
from checkpointing.records import DTYPE_BYTES
from checkpointing.recover import Recovery, exchange_reports
from checkpointing.recovery import RecoveryPlan, check_readable, plan_recovery
from checkpointing.redo import Redo
from checkpointing.restore import Target
from checkpointing.state.buffers import StateBuffer
from checkpointing.state.extras import capture_rng, restore_rng
from checkpointing.state.fragments import Fragment
from checkpointing.state.gradients import GradientTap
from checkpointing.state.hash import state_hash
from checkpointing.state.partitions import describe_partitions
from checkpointing.state.zero import after_restore, describe_tensors, optimizer_steps, zero_buffers
from moe.bias import EXTRA, BiasBalance
from moe.refs import ExpertRef
from trainer.begin_from import begin_from, data_order
from trainer.events import EventLog
from trainer.failpoints import Failpoints
from trainer.mode_plan import budget_of
from trainer.origin import Origin
from trainer.partial_experts import PartialExperts
from trainer.progress import Progress
from trainer.rendezvous import Process
from trainer.rotation import settle
from trainer.runfolder import checkpoints_of
from trainer.schema import Recipe


@dataclass
class Stall:
    """Seconds for which the current step's thread waited for checkpointing, and its device."""

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
    partial: PartialExperts | None = None  # in mode pec, also after it has turned exact
    protection: Protection | None = None
    bias: BiasBalance | None = None
    client: KeeperClient | None = None
    capturer: Capturer | None = None
    tap: GradientTap | None = None
    committed: int = -1  # the newest step that all ranks are known to have sealed
    stall: Stall = field(default_factory=Stall)
    _captured: int = -1
    _last_extras: dict[str, bytes] = field(default_factory=dict)

    # -- recovery ------------------------------------------------------------------------------------------------

    def recover(self, progress: Progress) -> RecoveryPlan:
        """Agree with all ranks on the newest complete step, restore it, and bring ``progress`` to it. A collective."""
        self.events.write("recover_begin")
        redo, pinning = Redo(self.zero_optimizer.optimizer), self.capturer.pinning if self.capturer else None
        halfway = functools.partial(self.failpoints.reached, "recovery")
        target = Target(self.buffers, self.process.coordinate, redo, pinning=pinning, halfway=halfway)
        memory, place = self.recipe.checkpoint.memory, checkpoints_of(self.recipe, self.run_dir)
        with Recovery(self.client, self.run_dir, target, memory.enabled, self.origin.recipe, place) as recovery:
            plan = self._agree(recovery)
            ages = self._report_ages(recovery, plan) if self.partial is not None else {}
            extras = recovery.apply(plan)
        if target.applied and self.process.rank == 0:
            print(f"recovery: steps {target.applied[0]} to {target.applied[-1]} redone from the log", flush=True)
        if plan.tier != "fresh":
            self.origin.check(extras["origin"])
            progress.load(extras["progress"])
            after_restore(self.zero_optimizer, progress.optimizer_steps)
            restore_rng(extras)
            if self.bias is not None:
                self.bias.load(extras[EXTRA])
        elif self.recipe.checkpoint.load_from is not None:
            begin_from(self, progress)
        if self.tap is not None:
            self.tap.recount()
        replaced = self._decide(plan, extras, ages) if self.partial is not None else False
        if replaced or (recovery.tier != "memory" and (self.tap is not None or self._lossy)):
            self._begin_window(progress)
        elif self.tap is not None:
            self._renew(target, progress)
        if self.capturer is not None:
            self.capturer.pinning.pin_rest()
        self.committed = plan.step
        self.events.write("recovered", step=plan.step, tier=plan.tier, redone=target.applied)
        return plan

    def _agree(self, recovery: Recovery) -> RecoveryPlan:
        reports, unreadable = exchange_reports(recovery, self._gather)
        for problem in recovery.problems:
            print(f"recovery of {self.process.coordinate}: {problem}", flush=True)
        plan = plan_recovery(reports)
        check_readable(plan, unreadable)
        if self.process.rank == 0:
            print(f"recovery: {plan.reason}", flush=True)
            self.events.write("recovery_plan", step=plan.step, tier=plan.tier, reason=plan.reason)
        return plan

    def _gather(self, mine: Any) -> list[Any]:
        everyone: list[Any] = [None] * self.process.world
        with self.capturer.pinning.paused() if self.capturer is not None else nullcontext():
            dist.all_gather_object(everyone, mine)
        return everyone

    def _begin_window(self, progress: Progress) -> None:
        """Neither a log nor some experts are worth anything without the rest: capture all before the first step."""
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

    def _report_ages(self, recovery: Recovery, plan: RecoveryPlan) -> dict[ExpertRef, int]:
        """As of which step every expert will be restored: a part of the plan, so said before it is carried out."""
        ages: dict[ExpertRef, int] = {}
        for theirs in self._gather(recovery.expert_steps(plan)):
            for ref, step in theirs.items():
                ages[ref] = min(step, ages.get(ref, step))
        lines = Ages(ages).lines(plan.step)
        if self.process.rank == 0 and ages:
            print("\n".join(f"recovery: {line}" for line in lines), flush=True)
            self.events.write("expert_ages", step=plan.step, tier=plan.tier, lines=lines)
        return ages

    def _decide(self, plan: RecoveryPlan, extras: dict[str, bytes], ages: dict[ExpertRef, int]) -> bool:
        """Count what the recovery lost and decide how to go on. Returns whether memory was replaced by an empty one."""
        partial, client = self.partial, self.client
        assert partial is not None
        assert client is not None
        before = (partial.exact, partial.meter.k)
        if plan.tier != "fresh":
            partial.recovered(plan.step, extras, ages)
        stored = partial.exact
        decision = partial.decide()
        if self.process.rank == 0:
            print(f"partial experts: {decision.reason}", flush=True)
            self.events.write("plt", step=max(plan.step, 0), reason=decision.reason, **partial.figures())
            if partial.exact != stored or (plan.tier == "fresh" and partial.exact):
                self.events.write("mode_changed", step=max(plan.step, 0), mode=partial.exact, reason=decision.reason)
        settled = before == (partial.exact, partial.meter.k)
        if not settled:
            self.protection = _protect(self)
        wanted = self.protection
        assert wanted is not None
        differs = client.arena.shape != wanted.shape or client.rules != wanted.rules
        replace = any(self._gather(differs))
        if replace or not settled:
            assert self.capturer is not None
            self.capturer.close()
            if replace:
                client.reshape(wanted.shape, wanted.rules)
            self.capturer = _capturer(self, client, wanted)
        if replace:
            dist.barrier()  # from here on the former memory is freed when all hold a step in the new
        return replace

    # -- the training step ---------------------------------------------------------------------------------------

    def settle(self) -> int:
        """Call before the state changes: nothing changes it before the last capture is copied.

        Returns this rank's newest sealed step, which travels with the step's collective.
        """
        self.stall = Stall()
        if self.capturer is None or self._captured < 0:
            return self.committed  # nothing captured yet in this attempt: what was restored still stands
        self.stall.copied_s = self.capturer.hold()
        return self.capturer.sealed_step

    def reserve(self, step: int) -> None:
        """Have memory found for the capture of ``step``, once ``committed`` is that of this step."""
        due = self._due(self.protection, step) if self.protection is not None and not self._lossy else []
        if self.capturer is not None and len(due) == 1:  # more are had the likelier the later they are asked for
            self.capturer.reserve(step, self.committed, log=self.tap is not None)

    def after_step(self, step: int, progress: Progress) -> None:
        """Start capturing ``step`` in the background if it is due, over what the committed step does not need."""
        log = self.tap.take() if self.tap is not None else None
        if self.capturer is None or self.protection is None:
            return
        self.stall.copied_s += self.capturer.held_s()
        if self._lossy:
            self._capture_experts(step, progress)
        elif fragments := self._due(self.protection, step):
            self.stall.copied_s += self.capturer.start(step, self._extras(progress), self.committed, fragments, log, 1)
            self._captured = step

    @property
    def _lossy(self) -> bool:
        return self.partial is not None and self.partial.exact is None

    def _capture_experts(self, step: int, progress: Progress) -> None:
        """What is no expert's, and the experts whose turn it is. A collective."""
        partial, protection = self.partial, self.protection
        assert partial is not None
        assert protection is not None
        assert protection.experts is not None
        assert self.capturer is not None
        if not partial.is_due(step):
            return
        chosen = partial.capture(step)
        on_disk = protection.experts.numbers(partial.persist(step)) if partial.is_due_on_disk(step) else []
        if step == self.recipe.train.steps and self.recipe.checkpoint.disk.final:
            on_disk = []  # the last step is completed before it is written
        fragments = protection.experts.of(chosen)
        self.events.write("pec_bytes", step, bytes=protection.experts.nbytes(chosen), experts=len(chosen))
        self._last_extras = self._extras(progress)
        self.stall.copied_s += self.capturer.start(step, self._last_extras, self.committed, fragments, persist=on_disk)
        self._captured = step

    def _capture_the_rest(self, progress: Progress) -> None:
        """What the last step's capture left out, in turns that fit the memory: the run ends with nothing lost."""
        partial, protection, capturer = self.partial, self.protection, self.capturer
        step = max(self._captured, self.committed)  # restored at its last step, a run captures nothing more
        assert partial is not None
        assert protection is not None
        assert protection.experts is not None
        assert capturer is not None
        assert self.client is not None
        rest = partial.left_out(step)
        if not rest:
            return
        last = self._last_extras or self._extras(progress)
        partial.capture_rest(step)
        fragments = protection.experts.of(rest)[protection.experts.fresh :]
        turn = max(1, (protection.shape.base.count - len(protection.fragments)) // 2)
        for at in range(0, max(len(fragments), 1), turn):
            extras = last | partial.extras()
            capturer.start(step, extras, step, fragments[at : at + turn], persist=[])
            capturer.wait_copied()
        self.client.quiesce()
        capturer.wait_sealed(step)  # raises what went wrong with it

    def _due(self, protection: Protection, step: int) -> list[Fragment]:
        """What to capture after ``step``: all for the disk; else one part if steps are logged, all or none if not."""
        memory, disk, last = self.recipe.checkpoint.memory, self.recipe.checkpoint.disk, step == self.recipe.train.steps
        for_disk, fragments = (disk.every > 0 and step % disk.every == 0) or (disk.final and last), protection.due(step)
        if self.tap is not None:
            return fragments if for_disk else fragments[:1]
        return fragments if for_disk or last or (memory.enabled and step % memory.every == 0) else []

    def _extras(self, progress: Progress) -> dict[str, bytes]:
        partial = self.partial.extras() if self.partial is not None else {}
        return {**self.extras(progress), **partial, "origin": self.origin.dump()}

    def extras(self, progress: Progress) -> dict[str, bytes]:
        progress.optimizer_steps = self.tap.counts if self.tap is not None else optimizer_steps(self.zero_optimizer)
        return {"progress": progress.dump(), **capture_rng(), **({EXTRA: self.bias.dump()} if self.bias else {})}

    # -- the end ---------------------------------------------------------------------------------------------------

    def state_hash(self, progress: Progress) -> str:
        """See :mod:`checkpointing.state.hash`. A collective."""
        return state_hash(self.buffers, self.extras(progress), self.process.coordinate)

    def finish(self, progress: Progress, keep: bool = True) -> None:
        """Persist the last step, if there is one and the recipe wants it on disk, and let the keeper go.

        Without ``keep`` nothing is written: the run had ended before.
        """
        if self.capturer is None or self.client is None:
            return
        self.capturer.wait_copied()
        self.capturer.wait_sealed(self._captured)
        dist.barrier()
        final = keep and self.recipe.checkpoint.disk.final
        if self._lossy and final:
            self._capture_the_rest(progress)
            dist.barrier()
        # What was restored counts, too: a run killed after its last capture has nothing more to capture.
        self.client.finish(persist=final and max(self._captured, self.committed) >= 0)
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
    partial: PartialExperts | None = None,
) -> Snapshots:
    """Attach to the node's keeper, starting one if there is none, and register this worker's state."""
    buffers = zero_buffers(zero_optimizer)
    checkpoint = recipe.checkpoint
    writes = checkpoint.disk.every > 0 or checkpoint.disk.final
    snapshots = Snapshots(recipe, process, run_dir, zero_optimizer, buffers, origin, events, failpoints, partial)
    if partial is not None:
        partial.decide()  # said with the recovery, which may change it
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
        any_shape=partial is not None,
        populate=process.device.type != "cuda",
    )
    snapshots.protection, snapshots.client = protection, client
    snapshots.capturer = _capturer(snapshots, client, protection)
    return snapshots


def _capturer(of: Snapshots, client: KeeperClient, protection: Protection) -> Capturer:
    reads_back = of.recipe.parallel.ep > 1 or of.recipe.parallel.dtype == "fp32"  # counts of such experts' products
    return Capturer(client, of.buffers, protection.log, of.failpoints.reached, reads_back)


def _protect(snapshots: Snapshots) -> Protection:
    """The recipe's mode, applied to this worker's state. Raises BudgetError if it takes more than the recipe allows."""
    protection, recipe = _protection(snapshots), snapshots.recipe
    budget = budget_of(recipe, None, int(os.environ.get("LOCAL_WORLD_SIZE", snapshots.process.world)))
    if protection.shape.nbytes > budget:
        raise does_not_fit(f"checkpoint.mode: {recipe.checkpoint.mode}", protection.shape.nbytes, budget)
    return protection


def _protection(snapshots: Snapshots) -> Protection:
    """Without a memory tier every capture is whole, for the disk."""
    checkpoint = snapshots.recipe.checkpoint
    if not checkpoint.memory.enabled:
        return dense(snapshots.buffers, generations=2)
    partial, mode = snapshots.partial, checkpoint.mode
    if partial is not None:
        mode = partial.exact or "pec"
    if mode == "dense":
        return dense(snapshots.buffers, generations=4 if checkpoint.disk.every > 0 else 3)
    if mode == "pec":
        assert partial is not None
        return pec(snapshots.buffers, partial.experts, partial.meter.k, partial.sequential, checkpoint.disk.every > 0)
    snapshots.tap = snapshots.tap or GradientTap(snapshots.zero_optimizer)
    disk = checkpoint.disk.every > 0 or checkpoint.disk.final
    width = DTYPE_BYTES[snapshots.tap.dtype]
    masters = sum(b.tensor.numel() for b in snapshots.buffers if b.name.endswith(".master"))
    partition = Partition(masters, width, disk, state_width(snapshots.recipe.train.optimizer))
    rotation = settle(snapshots.recipe, snapshots.process, snapshots.run_dir, snapshots.events, partition)
    return wal(snapshots.buffers, rotation, snapshots.tap.dtype, disk)
