"""The ways of checkpointing that are compared. Each stands in the training loop where the product's snapshots stand.

``settle`` runs before the optimizer changes the state and returns the newest step that this rank knows to be safe; the
step's own collective then sets ``committed``, the least of all ranks; ``reserve`` runs when the update is queued and
``committed`` known, ``after_step`` when the step is done.
"""

from __future__ import annotations

import shutil
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from benchmarks.workload import Job, recipe_of
from checkpointing.keeper.control import stop_keeper
from checkpointing.state.zero import after_restore, optimizer_steps, zero_buffers
from trainer.progress import Progress
from trainer.snapshots import Snapshots


class Arm:
    """``name`` in the tables; ``every_step``: whether it saves in every step, or once in a block.

    What an arm does not say otherwise does nothing.
    """

    name: str
    every_step: bool
    committed: int
    progress: Progress

    def prepare(self) -> None:
        """What must be done before a block, and is not timed."""

    def attach(self) -> None:
        """Begin to take part in steps."""

    def settle(self) -> int:
        return -1

    def reserve(self, step: int) -> None:
        """Find room for what :meth:`after_step` of this step will save."""

    def after_step(self, step: int, progress: Progress) -> None:
        """Save the step, or begin to."""

    def drain(self) -> float:
        """Wait until nothing is under way; returns the seconds that took."""
        return 0.0

    def detach(self) -> None:
        """Leave the training step as it was before :meth:`attach`."""


class Off(Arm):
    """No checkpoints."""

    name, every_step = "off", True

    def __init__(self) -> None:
        self.committed, self.progress = -1, Progress()


class Planaria(Arm):
    """The product's snapshots in a mode, every step in memory; nothing goes to disk.

    The steps of this arm are counted by themselves, so that it is in its steady state from block to block. What the log
    holds of a step before a pause and of one after it does not belong together: recoveries follow an unbroken run.

    Raises what :func:`trainer.snapshots.open_snapshots` raises.
    """

    every_step = True

    def __init__(self, job: Job, mode: str, rotation: int | None = None) -> None:
        self.name, self.job, self.progress = mode, job, Progress()
        checkpoint: dict[str, Any] = {"mode": mode, "memory": {"every": 1}, "disk": {"every": 0, "final": False}}
        if mode == "wal" and rotation is not None:
            checkpoint["wal"] = {"rotation": rotation}
        checkpoint["linger_s"] = 30  # should this process die, its memory is given back soon
        self.recipe = recipe_of(job.config, mode, job.folder, job.process, checkpoint)
        self.attempt = 0
        started = time.perf_counter()
        self.snapshots = self._open()
        self.snapshots.recover(self.progress)
        self.drain()
        self.pin()
        self.opened_s = time.perf_counter() - started
        self.detach()

    def _open(self) -> Snapshots:
        """Open the snapshots, and note which of the optimizer's attributes they put hooks on."""
        before = dict(vars(self.job.zero_optimizer))
        snapshots = self.job.open_snapshots(self.recipe, self.attempt)
        after = vars(self.job.zero_optimizer)
        self._hooks = {name: value for name, value in after.items() if before.get(name) is not value}
        self._plain = {name: before[name] for name in self._hooks if name in before}
        return snapshots

    def pin(self) -> None:
        """Have every slot registered, so that no block pays for it."""
        capturer = self.snapshots.capturer
        assert capturer is not None
        assert self.snapshots.client is not None
        for slot in range(len(self.snapshots.client.arena.places)):
            capturer.pinning.pin(slot)

    @property
    def committed(self) -> int:
        return self.snapshots.committed

    @committed.setter
    def committed(self, step: int) -> None:
        self.snapshots.committed = step

    @property
    def bytes_per_step(self) -> int:
        """That this rank captures: one fragment and the log."""
        protection = self.snapshots.protection
        assert protection is not None
        log = protection.log.nbytes if protection.log is not None else 0
        return round(sum(f.nbytes for f in protection.fragments) / len(protection.fragments)) + log

    def attach(self) -> None:
        vars(self.job.zero_optimizer).update(self._hooks)
        if self.snapshots.tap is not None:
            self.snapshots.tap.recount()  # it did not see the steps of other arms

    def settle(self) -> int:
        return self.snapshots.settle()

    def reserve(self, step: int) -> None:
        self.snapshots.reserve(step)

    def after_step(self, step: int, progress: Progress) -> None:
        self.snapshots.after_step(step, progress)

    def drain(self) -> float:
        started = time.perf_counter()
        capturer = self.snapshots.capturer
        assert capturer is not None
        capturer.wait_copied()
        copied_s = time.perf_counter() - started
        if self.progress.step > 0:
            capturer.wait_sealed(self.progress.step)
        return copied_s

    def detach(self) -> None:
        state = vars(self.job.zero_optimizer)
        for name in self._hooks:
            del state[name]
        state.update(self._plain)

    def leave(self) -> None:
        """As if this worker had died: the keeper keeps its memory."""
        assert self.snapshots.capturer is not None
        assert self.snapshots.client is not None
        self.snapshots.capturer.close()
        self.snapshots.client.close()

    def come_back(self) -> None:
        """As the next attempt of this worker, up to where it recovers."""
        self.attempt += 1
        self.snapshots = self._open()

    def close(self) -> None:
        """Leave and end the keeper, which gives its memory back. Also after a failure."""
        assert self.snapshots.capturer is not None
        assert self.snapshots.client is not None
        self.snapshots.client.close()
        self.snapshots.capturer.close()
        dist.barrier()
        if self.job.process.rank == 0:
            stop_keeper(self.snapshots.run_dir, persist=False)
        dist.barrier()


class DeepSpeed(Arm):
    """``engine.save_checkpoint`` as it comes: the training thread writes everything to disk."""

    name, every_step = "deepspeed save", False

    def __init__(self, job: Job) -> None:
        self.job, self.committed, self.progress = job, -1, Progress()
        self.folder = job.folder / "deepspeed"
        self._saved = -1

    def prepare(self) -> None:
        """Remove the save before: a disk holds few of them."""
        _remove(self.job, self.folder)

    def settle(self) -> int:
        return self._saved

    def after_step(self, step: int, progress: Progress) -> None:
        with _plain_layers(self.job.run.engine):
            self.job.run.engine.save_checkpoint(str(self.folder), tag="kept", client_state={"step": step})
        self._saved = step

    def drain(self) -> float:
        return 0.0

    def load(self) -> None:
        with _plain_layers(self.job.run.engine):
            self.job.run.engine.load_checkpoint(str(self.folder), tag="kept")

    def close(self) -> None:
        _remove(self.job, self.folder)


class _plain_layers:
    """DeepSpeed's own expert checkpoints know only its own expert modules, one file each; ours are stacked.

    So it saves the model as one without experts, and every rank's optimizer partition, which holds all that a load
    needs.
    """

    def __init__(self, engine: Any) -> None:
        self._engine, self._before = engine, engine.has_moe_layers

    def __enter__(self) -> None:
        self._engine.has_moe_layers = False

    def __exit__(self, *_: object) -> None:
        self._engine.has_moe_layers = self._before


class Dcp(Arm):
    """torch's ``async_save`` of the same buffers that the product captures, each under a name of its own.

    Args:
        pinned: stage into pinned shared memory on a thread, which torch offers on CUDA only; the optimizer then waits
            for the staging. Else what async_save does by default: it returns when all is copied.
        group: a gloo group, which async_save insists on.
    """

    every_step = False

    def __init__(self, job: Job, group: dist.ProcessGroup, pinned: bool) -> None:
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        self.name = "dcp async, pinned" if pinned else "dcp async"
        self.job, self.group, self.committed, self.progress = job, group, -1, Progress()
        self.folder = job.folder / ("dcp-pinned" if pinned else "dcp")
        # It owns the pinned buffers, so it is kept from save to save.
        self._stager = DefaultStager(StagingOptions()) if pinned else None
        self._staged: Future[None] | None = None
        self._uploaded: Future[Any] | None = None
        self._saving = self._saved = -1
        self._steps: list[float] = []
        self._state: dict[str, torch.Tensor] = {}

    def prepare(self) -> None:
        _remove(self.job, self.folder)
        coordinate = self.job.process.coordinate
        self._state = {f"{coordinate}.{b.name}": b.tensor for b in zero_buffers(self.job.zero_optimizer)}

    def settle(self) -> int:
        if self._staged is not None:
            self._staged.result()
            self._staged = None
        if self._uploaded is not None and self._uploaded.done():
            self._uploaded.result()
            self._uploaded, self._saved = None, self._saving
        return self._saved

    def after_step(self, step: int, progress: Progress) -> None:
        self._steps = optimizer_steps(self.job.zero_optimizer)
        self._saving = step
        response = dcp.async_save(
            self._state, checkpoint_id=str(self.folder), process_group=self.group, async_stager=self._stager
        )
        self._staged = getattr(response, "staging_completion", None)
        self._uploaded = getattr(response, "upload_completion", response)

    def drain(self) -> float:
        started = time.perf_counter()
        if self._uploaded is not None:
            self._uploaded.result()
        self.settle()
        return time.perf_counter() - started

    def load(self) -> None:
        dcp.load(self._state, checkpoint_id=str(self.folder), process_group=self.group)
        after_restore(self.job.zero_optimizer, self._steps)

    def close(self) -> None:
        self.drain()
        if self._stager is not None:
            self._stager.close()
        _remove(self.job, self.folder)


def _remove(job: Job, folder: Path) -> None:
    dist.barrier()
    if job.process.rank == 0:
        shutil.rmtree(folder, ignore_errors=True)
    dist.barrier()
