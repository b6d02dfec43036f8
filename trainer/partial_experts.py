"""Mode ``pec`` over a run: what each capture holds, what recoveries have cost, and when the run turns exact."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from checkpointing.partial import Experts, select, select_loaded
from checkpointing.plt import Decision, Limits, Meter, decide
from moe.families import MoEBlock
from moe.refs import ExpertRef
from moe.stats import RoutingMeter
from trainer.events import EventLog
from trainer.plan import plan_run
from trainer.rendezvous import Process
from trainer.rotation import settle_k
from trainer.schema import CheckpointSection, Recipe

METER, EXACT = "plt.meter", "plt.exact"  # names of extras


@dataclass
class PartialExperts:
    """The same on all ranks: whatever it is fed is summed over them or was agreed on.

    Attributes:
        routing: counts the tokens that this rank routes.
        total: sums a tensor over all ranks.
        first_k: experts of each layer per capture that the run began with.
        exact: the mode that the run has switched to; None while it is lossy.
    """

    experts: Experts
    limits: Limits
    checkpoint: CheckpointSection
    routing: RoutingMeter
    total: Callable[[Tensor], Tensor]
    first_k: int
    exact: str | None = None

    def __post_init__(self) -> None:
        self.meter = Meter.new(self.experts.layers, self.experts.count, self.first_k)

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        experts: Experts,
        routing: RoutingMeter,
        total: Callable[[Tensor], Tensor],
        first_k: int,
    ) -> PartialExperts:
        train, pec = recipe.train, recipe.checkpoint.pec
        copies = train.global_batch_size * recipe.data.sequence_length * plan_run(recipe).share.top_k * train.steps
        limits = Limits(copies, train.steps, pec.max_plt, pec.dynamic_k, pec.fallback)
        return cls(experts, limits, recipe.checkpoint, routing, total, first_k)

    @property
    def sequential(self) -> bool:
        return self.checkpoint.pec.selection == "sequential"

    # -- captures ----------------------------------------------------------------------------------------------------

    def is_due(self, step: int) -> bool:
        return step % self.checkpoint.memory.every == 0 or self.is_due_on_disk(step) or step == self.limits.steps

    def is_due_on_disk(self, step: int) -> bool:
        every = self.checkpoint.disk.every
        return every > 0 and step % every == 0

    def capture(self, step: int) -> tuple[ExpertRef, ...]:
        """The experts that the capture of ``step`` holds. A collective."""
        counts = self._routed()
        if self.sequential:
            chosen = select(self.experts, step // self.checkpoint.memory.every, self.meter.k)
        else:
            self.meter = self.meter.captured(step, counts, ())
            chosen = select_loaded(self.experts, self.meter.unsaved(), self.meter.k)
        self.meter = self.meter.captured(step, counts, chosen)
        return chosen

    def capture_rest(self, step: int) -> None:
        """Note that all experts are captured at ``step``, where some have been already."""
        self.meter = self.meter.captured(step, self.meter.counts, self.experts.all())

    def persist(self, step: int) -> Collection[ExpertRef]:
        """The experts that the checkpoint on disk of ``step`` holds anew: with the first one all."""
        if not all(marks for row in self.meter.disk for marks in row):
            chosen: Collection[ExpertRef] = frozenset(self.experts.all())
        else:
            chosen = select(self.experts, step // self.checkpoint.disk.every, self.checkpoint.pec.k_persist)
        self.meter = self.meter.persisted(chosen)
        return chosen

    def left_out(self, step: int) -> list[ExpertRef]:
        """The experts whose newest capture is older than ``step``."""
        return [
            ExpertRef(layer, expert)
            for layer, row in zip(self.experts.layers, self.meter.memory, strict=True)
            for expert, mark in enumerate(row)
            if mark.step < step
        ]

    def _routed(self) -> list[list[int]]:
        """Cumulative token copies per layer and expert, over all ranks, since the run's first step."""
        new = self.total(self.routing.drain(self.experts.layers, self.experts.count)).tolist()
        return [[a + b for a, b in zip(*rows, strict=True)] for rows in zip(self.meter.counts, new, strict=True)]

    # -- recovery ----------------------------------------------------------------------------------------------------

    def extras(self) -> dict[str, bytes]:
        """What must come back with a capture."""
        return {METER: zlib.compress(self.meter.dump()), EXACT: (self.exact or "").encode()}

    def recovered(self, step: int, extras: Mapping[str, bytes], ages: Mapping[ExpertRef, int]) -> None:
        """After a restore of ``step`` with experts of these ages. A run that began in another mode has no meter yet."""
        if METER in extras:
            self.meter = Meter.load(zlib.decompress(extras[METER]))
            self.exact = extras[EXACT].decode() or None
        else:
            self.meter = self.meter.begins(step)
        self.meter = self.meter.recovered({ref: ages.get(ref, step) for ref in self.experts.all()})

    def decide(self) -> Decision:
        """How the run goes on; a run that has turned exact stays so."""
        decision = decide(self.meter, self.limits, self.first_k, self.checkpoint.memory.every)
        if self.exact is not None:
            return Decision(
                self.meter.k, self.limits.fallback, f"the run has been exact since it switched: {decision.reason}"
            )
        self.meter = self.meter.with_k(decision.k)
        self.exact = decision.mode
        return decision

    def figures(self) -> dict[str, object]:
        """For the events."""
        return {
            "plt": self.meter.plt(self.limits),
            "max_plt": self.limits.max_plt,
            "k": self.meter.k,
            "experts": self.experts.count,
            "faults": self.meter.faults,
            "lost": sum(self.meter.lost),
            "counted": [sum(row) for row in self.meter.counts],
            "mode": self.exact or "pec",
        }


def open_partial(
    recipe: Recipe,
    process: Process,
    run_dir: Path,
    events: EventLog,
    blocks: Sequence[MoEBlock],
    routing: RoutingMeter,
) -> PartialExperts | None:
    """What mode ``pec`` needs, None in other modes. A collective; raises as :func:`trainer.rotation.settle_k`."""
    if recipe.checkpoint.mode != "pec":
        return None
    layers = tuple(sorted(block.layer for block in blocks))
    swapped: Any = blocks[0].experts
    ep = recipe.parallel.ep
    experts = Experts(layers, swapped.num_experts, ep, process.world // ep)

    def total(tensor: Tensor) -> Tensor:
        tensor = tensor.to(process.device)
        dist.all_reduce(tensor)
        return tensor.cpu()

    return PartialExperts.of(recipe, experts, routing, total, settle_k(recipe, process, run_dir, events))
