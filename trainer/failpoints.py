"""Named places in a training step where a drill can strike."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from trainer.events import EventLog
from trainer.faults import DiskFaultSpec, KillSpec, parse_attempts

KILL_VARIABLE = "PLANARIA_KILL"
DISK_VARIABLE = "PLANARIA_DISK_FAULT"


class Failpoints:
    """Carries out this rank's :class:`~trainer.faults.KillSpec`\\ s of one attempt with SIGKILL.

    The environment names those of all attempts, see :func:`~trainer.faults.parse_attempts`.
    ``reached(point, step)`` is called at every failpoint on every worker; it returns unless this is the place.
    """

    def __init__(self, specs: Sequence[KillSpec], *, rank: int, run_dir: Path, events: EventLog) -> None:
        self._specs = [spec for spec in specs if spec.rank == rank]
        self._run_dir = run_dir
        self._events = events

    @classmethod
    def from_environment(cls, *, rank: int, attempt: int, run_dir: Path, events: EventLog) -> Failpoints:
        attempts = parse_attempts(os.environ.get(KILL_VARIABLE, ""))
        specs = attempts[attempt] if attempt < len(attempts) else ()
        return cls(specs, rank=rank, run_dir=run_dir, events=events)

    def wants(self, point: str) -> bool:
        return any(spec.at == point for spec in self._specs)

    def reached(self, point: str, step: int) -> None:
        for spec in self._specs:
            if spec.is_at(point, step):
                self._specs.remove(spec)
                self._strike(spec, step)
                return

    def _strike(self, spec: KillSpec, step: int) -> None:
        self._events.write("kill", step=step, at=spec.at, who=spec.who, pid=os.getpid())
        if spec.who in ("keeper", "both"):
            os.kill(json.loads((self._run_dir / "keeper.json").read_text())["pid"], signal.SIGKILL)
        if spec.who in ("worker", "both"):
            os.kill(os.getpid(), signal.SIGKILL)

    def keeper_kill(self) -> dict[str, object] | None:
        """What to tell the keeper when the strike is in the middle of its work."""
        spec = next((spec for spec in self._specs if spec.in_keeper), None)
        if spec is None:
            return None
        pids: list[object] = []
        if spec.who in ("worker", "both"):
            pids.append(os.getpid())
        if spec.who in ("keeper", "both"):
            pids.append("keeper")
        return {"at": spec.at, "step": spec.step, "pids": pids}

    @staticmethod
    def disk_fault() -> dict[str, str | int] | None:
        """What to tell the keeper when its disk is to be slow, full or hung. Raises FaultError."""
        text = os.environ.get(DISK_VARIABLE)
        return DiskFaultSpec.parse(text).fields() if text else None


def place_failpoints(run: Any, model: Any, experts: Sequence[Any], inner: torch.optim.Optimizer) -> None:
    """Have ``run.failpoints`` called in the middle of the model's passes and of the optimizer step.

    Args:
        experts: the expert modules of all layers.
        inner: the optimizer that ZeRO steps once per parameter group.
    """
    failpoints: Failpoints = run.failpoints

    def reached(point: str) -> None:
        if model.training:
            failpoints.reached(point, run.progress.step + 1)

    layers = model.model.layers
    middle = layers[len(layers) // 2]
    middle.register_forward_pre_hook(lambda *_: reached("forward"))
    if failpoints.wants("backward"):
        middle.register_full_backward_pre_hook(lambda *_: reached("backward"))
    if failpoints.wants("alltoall") and experts:
        _interrupt(experts[len(experts) // 2], reached)
    # After the first group the step is half done.
    inner.register_step_post_hook(lambda *_: reached("optimizer"))


def _interrupt(experts: Any, reached: Any) -> None:
    """Amid the exchange: this rank has begun to send rows, and others wait for them and for what becomes of theirs."""
    forward = experts.forward

    def interrupted(*arguments: Any) -> Any:
        meanwhile = experts.meanwhile

        def amid() -> None:
            reached("alltoall")
            if meanwhile is not None:
                meanwhile()

        experts.meanwhile = amid
        try:
            return forward(*arguments)
        finally:
            experts.meanwhile = meanwhile

    experts.forward = interrupted
