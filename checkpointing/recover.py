"""One rank's part of recovery: report what it could restore, then carry out the plan that all ranks agreed on."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from checkpointing.intake import Intake
from checkpointing.keeper.client import KeeperClient
from checkpointing.keeper.events import append_event
from checkpointing.records import RecordInfo
from checkpointing.recovery import RecoveryError, RecoveryPlan, available_steps, memory_suffices, restoration_of
from checkpointing.remote import UnreachableError
from checkpointing.restore import Target, restore_from_disk, restore_from_memory
from checkpointing.schedule import Rules
from checkpointing.slots import Arena
from checkpointing.state.buffers import needs_of
from checkpointing.storage import MANIFEST, Place
from checkpointing.store import Checkpoint, list_checkpoints, quarantine, verify
from moe.refs import ExpertRef

_NEWEST = 4  # steps in memory that are reported: older ones are hardly ever chosen, and each proof takes time


class Recovery:
    """What one rank can restore. A context manager: at its end nothing goes on in the background.

    Where slots are pinned, those that restoring the newest step here would read are verified and pinned from its
    beginning, while the keeper proves what it holds and the ranks agree.

    Args:
        client: None only if the run has no keeper; needed without a memory tier, too, since it may be writing to disk.
        memory: whether what the keeper holds in memory may be restored.
        checkpoints: where those on disk lie; default: in the run folder.
        fingerprint: this run's recipe: checkpoints of another are ignored. None takes any.

    Attributes:
        tier: where this rank's state was restored from, "fresh" before that.
        unreadable: in words, why some of the disk tier could not be read; then no rank may go on without it.
        problems: in words, damaged checkpoints that were found and set aside, and those of another recipe.
    """

    def __init__(
        self,
        client: KeeperClient | None,
        run_dir: Path,
        target: Target,
        memory: bool = True,
        fingerprint: str | None = None,
        checkpoints: Place | None = None,
    ) -> None:
        self._checkpoints = checkpoints if checkpoints is not None else Path(run_dir) / "checkpoints"
        self.unreadable = ""
        self._uses_memory, self._fingerprint = memory, fingerprint
        self._client, self._run_dir = client, Path(run_dir)
        # What lies in memory belongs together as whoever wrote it says.
        self._target = target if client is None else replace(target, rules=client.rules)
        self._coordinate, self._needs = target.coordinate, needs_of(target.buffers)
        self._report: dict[str, list[int]] = {}
        self.tier = "fresh"
        self.problems: list[str] = []
        self._intake: Intake | None = None
        self._collects = False

    def __enter__(self) -> Recovery:
        # Proofs make many values, none of them in cycles. Looking through all of Python's objects for some, again and
        # again, took half of the time or more.
        self._collects = gc.isenabled()
        gc.disable()
        try:
            if self._client is not None and self._uses_memory:
                self._take_in().begin(self._client.arena, self._client.rules)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._collects:
            gc.enable()
        self.close()

    def close(self) -> None:
        """End what goes on in the background; what is pinned stays so."""
        if self._intake is not None:
            self._intake.close()
            self._intake = None

    def _take_in(self) -> Intake:
        if self._intake is None:
            self._intake = Intake(self._coordinate, self._target.pinning)
        return self._intake

    @cached_property
    def _memory(self) -> list[RecordInfo]:
        if self._client is None or not self._uses_memory:
            return []
        return self._client.inventory()

    def report_memory(self) -> tuple[list[int], int]:
        """The newest steps that this rank could restore from memory, oldest first, and the newest step that the keeper
        knows to be on disk. Does not touch the disk, nor wait for it.

        Their bytes were verified by the keeper since this attempt began, most of them before it was asked.
        """
        steps = available_steps(self._needs, self._memory, self._coordinate, self._target.rules, _NEWEST)
        self._report = {"memory": steps, "disk": []}
        return list(steps), self._client.disk_step if self._client is not None and self._uses_memory else -1

    @cached_property
    def _disk(self) -> dict[int, Checkpoint]:
        found: dict[int, Checkpoint] = {}
        try:
            committed = list_checkpoints(self._checkpoints)
        except UnreachableError as error:
            self._without(error)
            return found
        for step, path in committed:
            try:
                checkpoint = Checkpoint.open(path)
                recipe = checkpoint.manifest["metadata"].get("recipe")
                if self._fingerprint is not None and recipe != self._fingerprint:
                    self.problems.append(f"{path}: ignored, it is of recipe {recipe}, not {self._fingerprint}")
                elif available_steps(self._needs, checkpoint.records, self._coordinate, checkpoint.rules):
                    found[step] = checkpoint
            except UnreachableError as error:
                self._without(error)
            except (RecoveryError, OSError, ValueError, KeyError) as error:
                self._set_aside(path, [str(error)])
        return found

    def report(self) -> dict[str, list[int]]:
        """The steps of each tier that this rank could restore completely, oldest first.

        The keeper answers when it writes nothing: what is then on disk stays there. Checkpoints on disk that are newer
        than this rank's newest step in memory are read back whole, and set aside if damaged; older ones would not be
        chosen and are verified only if they are.
        """
        memory, _ = self.report_memory()
        if self._client is not None:
            self._client.quiesce()
        newest = max(memory, default=-1)
        for step, checkpoint in sorted(self._disk.items(), reverse=True):
            try:
                problems = verify(checkpoint.path) if step > newest else []
            except UnreachableError as error:
                self._without(error)
                del self._disk[step]
                continue
            if problems:
                self._set_aside(checkpoint.path, problems)
                del self._disk[step]
        self._report = {"memory": memory, "disk": sorted(self._disk)}
        return {tier: list(steps) for tier, steps in self._report.items()}

    def apply(self, plan: RecoveryPlan) -> dict[str, bytes]:
        """Restore the buffers to the plan's step and return this rank's extras; records newer than it are freed.

        For a fresh plan the buffers stay as they are and the extras are empty. Raises RecoveryError if bytes turn out
        to be damaged: they are then set aside, and the next attempt will report without them.
        """
        if not self._report:
            self.report()
        if plan.tier == "fresh" or self._tier_of(plan) != "memory":
            self.close()  # what was begun is not needed
        extras = self._restore(plan) if plan.tier != "fresh" else {}
        if self._client is not None:
            self._client.discard(plan.step, from_memory=self.tier == "memory")
        return extras

    def expert_steps(self, plan: RecoveryPlan) -> dict[ExpertRef, int]:
        """What :meth:`apply` will do: as of which step each expert's state on this rank is restored."""
        if plan.tier == "fresh":
            return {}
        records, rules = self._source(plan)
        found = restoration_of([n.range for n in self._needs], records, self._coordinate, plan.step, rules)
        if isinstance(found, str):
            raise RecoveryError(f"step {plan.step} is not complete on {self._coordinate}: {found}")
        return found.expert_steps()

    def _source(self, plan: RecoveryPlan) -> tuple[Iterable[RecordInfo], Rules]:
        if self._tier_of(plan) == "memory":
            return self._memory, self._target.rules
        checkpoint = self._disk[plan.step]
        return checkpoint.records, checkpoint.rules

    def _tier_of(self, plan: RecoveryPlan) -> str:
        """The same rule as the plan's: the plan's tier, or the other one if this rank has the step only there."""
        return plan.tier if plan.step in self._report[plan.tier] else "memory"

    def _restore(self, plan: RecoveryPlan) -> dict[str, bytes]:
        self.tier = self._tier_of(plan)
        if plan.step not in self._report[self.tier]:
            raise RecoveryError(f"step {plan.step} is not complete on {self._coordinate}; report again and plan anew")
        if self.tier == "memory":
            return self._from_memory(plan.step)
        checkpoint = self._disk[plan.step]
        try:
            return restore_from_disk(self._target, checkpoint)
        except RecoveryError as error:
            problems = verify(checkpoint.path)
            if problems:
                self._set_aside(checkpoint.path, problems)
            raise RecoveryError(f"{error}; start again to recover without it") from error

    def _from_memory(self, step: int) -> dict[str, bytes]:
        assert self._client is not None
        records = [r for r in self._memory if r.step <= step]
        opened: dict[str, Arena] = {}
        needed = {n.range.key for n in self._needs}
        try:
            for record in records:
                holds = any(e.range.key in needed for e in record.entries)
                if record.source not in opened and (holds or record.source == self._coordinate):
                    opened[record.source] = self._client.arena_of(record.source)
            return restore_from_memory(self._target, records, opened, step, self._take_in())
        finally:
            self.close()
            for source, arena in opened.items():
                if source != self._coordinate:
                    arena.close()

    def _without(self, error: UnreachableError) -> None:
        self.unreadable = f"{error.filename} cannot be read: {error.strerror}"
        self.problems.append(self.unreadable)

    def _set_aside(self, path: Place, problems: list[str]) -> None:
        # Without its manifest it is being removed, or another rank was quicker.
        moved = quarantine(path) if (path / MANIFEST).exists() else None
        if moved is None:
            return
        self.problems += problems
        append_event(self._run_dir, "quarantined", tier="disk", path=str(moved), problems=problems)


def exchange_reports(
    recovery: Recovery, gather: Callable[[Any], list[Any]]
) -> tuple[list[dict[str, list[int]]], list[str]]:
    """Every rank's report, and what it could not read. A collective: ``gather`` has a value from each rank.

    A disk, which may be slow, is asked only when memory does not do.
    """
    in_memory = gather(recovery.report_memory())
    if memory_suffices(in_memory):
        return [{"memory": steps} for steps, _ in in_memory], []
    return gather(recovery.report()), gather(recovery.unreadable)
