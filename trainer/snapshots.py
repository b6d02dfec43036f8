"""The run's checkpoints as the training loop sees them: recover at the start, capture after every step, finish.

The order within step t, on every rank:

1. forward and backward, while the capture of step t-1 is copied and sealed;
2. before the optimizer changes the state: wait for that, then one collective carries every rank's newest sealed step;
   the least of them, t-1, is the committed step;
3. the optimizer step;
4. the capture of step t starts. It may overwrite only records older than the committed step, so at every instant one
   complete step lies in memory on all ranks.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from checkpointing.capture import Capturer
from checkpointing.keeper.client import KeeperClient
from checkpointing.recover import Recovery
from checkpointing.recovery import RecoveryPlan, plan_recovery
from checkpointing.state.buffers import StateBuffer
from checkpointing.state.extras import capture_rng, restore_rng
from checkpointing.state.hash import state_hash
from checkpointing.state.zero import after_restore, optimizer_steps, zero_buffers
from trainer.events import EventLog
from trainer.failpoints import Failpoints
from trainer.origin import Origin
from trainer.progress import Progress
from trainer.rendezvous import Process
from trainer.runfolder import checkpoints_of
from trainer.schema import Recipe


@dataclass
class Stall:
    """Seconds the training thread waited for checkpointing in the current step."""

    copied_s: float = 0.0
    sealed_s: float = 0.0


@dataclass
class Snapshots:
    """Connects one worker's live state to its node's keeper. Made by :func:`open_snapshots`."""

    recipe: Recipe
    process: Process
    run_dir: Path
    zero_optimizer: Any
    buffers: list[StateBuffer]
    origin: Origin
    client: KeeperClient | None
    capturer: Capturer | None
    events: EventLog
    committed: int = -1  # the newest step that all ranks are known to have sealed
    stall: Stall = field(default_factory=Stall)
    _captured: int = -1

    # -- recovery ------------------------------------------------------------------------------------------------

    def recover(self, progress: Progress) -> RecoveryPlan:
        """Agree with all ranks on the newest complete step, restore it, and bring ``progress`` to it. A collective."""
        self.events.write("recover_begin")
        enabled = self.recipe.checkpoint.memory.enabled
        recovery = Recovery(
            self.client,
            self.run_dir,
            self.process.coordinate,
            self.buffers,
            memory=enabled,
            fingerprint=self.origin.recipe,
            checkpoints=checkpoints_of(self.recipe, self.run_dir),
        )
        reports: list[dict[str, list[int]]] = [{} for _ in range(self.process.world)]
        dist.all_gather_object(reports, recovery.report())
        for problem in recovery.problems:
            print(f"recovery of {self.process.coordinate}: {problem}", flush=True)
        plan = plan_recovery(reports)
        if self.process.rank == 0:
            print(f"recovery: {plan.reason}", flush=True)
            self.events.write("recovery_plan", step=plan.step, tier=plan.tier, reason=plan.reason)
        extras = recovery.apply(plan)
        if plan.tier != "fresh":
            self.origin.check(extras["origin"])
            progress.load(extras["progress"])
            after_restore(self.zero_optimizer, progress.optimizer_steps)
            restore_rng(extras)
        self.committed = plan.step
        self.events.write("recovered", step=plan.step, tier=plan.tier)
        return plan

    # -- the training step ---------------------------------------------------------------------------------------

    def settle(self) -> int:
        """Wait until the last capture is whole and sealed; afterwards the state may change.

        Returns this rank's newest sealed step, which travels with the step's collective.
        """
        self.stall = Stall()
        if self.capturer is None or self._captured < 0:
            return self.committed  # nothing captured yet in this attempt: what was restored still stands
        self.stall.copied_s = self.capturer.wait_copied()
        self.stall.sealed_s = self.capturer.wait_sealed(self._captured)
        return self._captured

    def after_step(self, step: int, progress: Progress) -> None:
        """Start capturing ``step`` in the background if it is due, over records older than the committed step."""
        if self.capturer is not None and self._due(step):
            extras = {**self.extras(progress), "origin": self.origin.dump()}
            self.capturer.start(step, extras, self.committed)
            self._captured = step

    def _due(self, step: int) -> bool:
        memory, disk = self.recipe.checkpoint.memory, self.recipe.checkpoint.disk
        last = step == self.recipe.train.steps
        return (memory.enabled and step % memory.every == 0) or (disk.every > 0 and step % disk.every == 0) or last

    def extras(self, progress: Progress) -> dict[str, bytes]:
        progress.optimizer_steps = optimizer_steps(self.zero_optimizer)
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
) -> Snapshots:
    """Attach to the node's keeper, starting one if there is none, and register this worker's state."""
    buffers = zero_buffers(zero_optimizer)
    checkpoint = recipe.checkpoint
    wanted = checkpoint.memory.enabled or checkpoint.disk.every > 0 or checkpoint.disk.final
    if not wanted:
        return Snapshots(recipe, process, run_dir, zero_optimizer, buffers, origin, None, None, events)
    writes = checkpoint.disk.every > 0 or checkpoint.disk.final
    disk = asdict(checkpoint.disk) if writes else None
    client = KeeperClient.attach(
        run_dir,
        coordinate=process.coordinate,
        coordinates=[f"dp{rank:04d}" for rank in range(process.world)],
        buffers=buffers,
        fingerprint=origin.recipe,
        attempt=events.attempt,
        disk=disk,
        linger_s=checkpoint.linger_s,
        tensors=_describe_tensors(zero_optimizer),
        metadata=asdict(origin),
        kill=failpoints.disk_kill(),
        disk_fault=failpoints.disk_fault(),
        # Without the memory tier a slot only carries a step to the disk: one being written, one for the next.
        generations=None if checkpoint.memory.enabled else 2,
    )
    capturer = Capturer(client, buffers, reached=failpoints.reached)
    return Snapshots(recipe, process, run_dir, zero_optimizer, buffers, origin, client, capturer, events)


def _describe_tensors(zero_optimizer: Any) -> dict[str, dict[str, Any]]:
    """What a reader needs to turn units back into parameters: unit -> parameter path, global shape, expert, dtype."""
    described = {}
    for group in zero_optimizer.bit16_groups:
        for param in group:
            address = param.address
            for i, span in enumerate(address.units()):
                described[span.unit] = {
                    "param": address.param,
                    "shape": list(address.global_shape),
                    "expert": address.first_expert + i if address.is_expert else None,
                    "elements": span.stop - span.start,
                    "dtype": str(param.dtype).removeprefix("torch."),
                }
    return described
