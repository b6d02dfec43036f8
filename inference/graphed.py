"""A model whose decode steps are captured, for the engine: everything else is computed as it is.

A step counts as decoding if each of its rows is the newest of a sequence. For every number of rows, up to a few, and
every power of two of blocks, the step is captured when it first comes up, which takes about a second, in which all
requests wait. Captures keep memory of their own, so there are only so many: steps of other shapes are computed as they
are, and so are those of a shape whose capture failed, for want of memory as a rule.

Shapes: R rows, L rows whose scores are wanted, V vocabulary.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from inference.banks import ExpertBanks
from inference.cache import ExpertCache
from inference.cpu_experts import CpuExperts
from inference.cpu_lane import CpuLane, LaneError
from inference.decode import DecodeStep
from inference.decode_experts import DecodeExperts, Split
from inference.errors import InferenceError, NotCaptured
from inference.executor import Executor
from inference.experts import OffloadedExperts, computable
from inference.graphs import SegmentedGraph, StepGraph, Uncaptured
from inference.limits import CAPTURED_ROWS
from inference.model import Model
from inference.planner import CallPlanner
from inference.rows import Rows, padded_blocks

MOST_STEPS = 16  # captured shapes

_log = logging.getLogger(__name__)


class GraphedModel:
    """:class:`Model` with the same ``forward``.

    Args:
        modules: the model's routed experts, without adapters.
        executor: carries out their calls in steps that are not captured; its slots, transfers, plan and the CPU's
            threads are shared.

    Raises:
        NotCaptured: steps of this model, or with this executor's settings.
    """

    def __init__(self, model: Model, modules: Sequence[OffloadedExperts], executor: Executor) -> None:
        _check(executor, int(model.config.num_experts_per_tok))
        self.model, self.config, self.kv = model, model.config, model.kv
        self._modules, self._executor = tuple(modules), executor
        self._steps: dict[tuple[int, int], DecodeStep] = {}
        self._failed: set[tuple[int, int]] = set()  # shapes that could not be captured
        cache, choices = executor.cache, int(self.config.num_experts_per_tok)
        all_resident = cache.slots == cache.store.total
        self._most = CAPTURED_ROWS if all_resident else min(CAPTURED_ROWS, cache.slots // (2 * choices))
        self._lane: CpuLane | None = None
        self._split: Split | None = None
        if executor.cpu is not None and executor.plan is not None:
            assert isinstance(executor.cpu, CpuExperts)
            assert isinstance(executor.plan, CallPlanner)
            self._lane = _lane(executor.cpu, cache)
            self._split = PlannedSplit(executor.plan, min(self._most * choices, cache.store.shape.num_experts))

    def forward(self, rows: Rows) -> Tensor:
        """Scores [L,V]; see :meth:`Model.forward`."""
        step = self._step(rows) if self._captures(rows) else None
        if step is None:
            return self.model.forward(rows)
        size = self.kv.block_size
        tables = [span.blocks[: -(-span.length // size)] for span in rows.spans]
        logits_RV = step.run(rows.position_R.tolist(), tables, rows.token_R.tolist())
        return logits_RV.clone()

    def _captures(self, rows: Rows) -> bool:
        decoding = len(rows.spans) <= self._most and all(span.rows == 1 for span in rows.spans)
        if not decoding or rows.logit_rows != tuple(range(len(rows.spans))):
            return False
        # Banks fill while the first answers are made: until then experts come through staging buffers.
        source = self._executor.transfers.source
        return self._executor.cache.slots == self._executor.cache.store.total or source.ready_share == 1

    def _step(self, called: Rows) -> DecodeStep | None:
        """The captured step for these rows; None if there are too many others, or if their capture failed."""
        shape = len(called.spans), padded_blocks(called.spans, self.kv.block_size)
        if shape in self._steps or shape in self._failed or len(self._steps) >= MOST_STEPS:
            return self._steps.get(shape)
        try:
            self._steps[shape] = self._capture(*shape)
        except InferenceError:  # an expert's, or the link's: it would end other steps, too
            raise
        except Exception as error:
            self._failed.add(shape)
            _log.warning(
                "capturing steps of %d sequences of %d blocks failed, they are computed one launch after the other: "
                "%s: %s; with more memory left to the GPU (--vram) it may not, and --no-graphs never tries",
                *shape,
                type(error).__name__,
                str(error),
            )
        if shape in self._failed:  # and the error is gone, which had hold of what was made
            gc.collect()
            if self.kv.device.type == "cuda":
                torch.cuda.empty_cache()
        return self._steps.get(shape)

    def _capture(self, rows: int, blocks: int) -> DecodeStep:
        cuda = self.kv.device.type == "cuda"
        graph: StepGraph = SegmentedGraph(self.kv.device) if cuda else Uncaptured()
        experts = DecodeExperts(
            self._executor.cache,
            self._executor.transfers,
            rows,
            int(self.config.num_experts_per_tok),
            graph=graph,
            lane=self._lane,
            host=self._executor.transfers.source,
            split=self._split,
        )
        if experts.all_resident:
            experts.fill()
        return DecodeStep(self.model, self._modules, experts, graph, rows, blocks)


def _check(executor: Executor, choices: int) -> None:
    """Raises NotCaptured for what would not be captured, or would do nothing while steps are."""
    cache, source = executor.cache, executor.transfers.source
    if not computable(cache.store.shape):
        raise NotCaptured(
            "decode steps are captured with plain silu experts only, and this model has others", "leave graphs out"
        )
    if executor.prefetcher is not None:
        raise NotCaptured("captured decode steps fetch nothing ahead", "leave prefetch or graphs out")
    if cache.slots == cache.store.total:
        return
    if isinstance(source, ExpertBanks) and not source.filling:
        raise NotCaptured(
            "captured decode steps take experts from page-locked memory", "leave pin=False (--no-pin) or graphs out"
        )
    if cache.slots < 2 * choices:
        raise NotCaptured(
            f"{cache.slots} slots are too few to decode in graphs: two calls of {choices} experts must have room",
            f"give at least {2 * choices} (expert budget {2 * choices / cache.store.total:.3g}), or leave graphs out",
        )


def _lane(cpu: CpuExperts, cache: ExpertCache) -> CpuLane:
    """The threads that compute calls of steps that are not captured, too, where the compiled kernel is used there."""
    if cpu.compiled is not None:
        return cpu.compiled.lane
    shape, layout = cache.store.shape, cache.layout
    try:
        return CpuLane(cpu.threads, shape.hidden, shape.intermediate, layout.dtype, layout.parts[1].start)
    except LaneError as error:
        raise NotCaptured(f"captured steps have no CPU lane: {error}", "leave graphs or cpu out") from error


class PlannedSplit:
    """``plan`` for up to so many misses of one row each, all cuts made before the first call.

    The compiled lane is given its work by the host itself, so there is no handover to pay for. Where the CPU computes
    all that a call misses, the link brings one of them as well: else nothing new would ever become resident. More than
    that does not pay: link and CPU read the same memory, so what one of them does for later, the other does later now
    (docs/measurements.md).
    """

    def __init__(self, plan: CallPlanner, misses: int) -> None:
        self._plan = plan
        lean = CallPlanner(replace(plan.costs, handover_s=0.0))
        self._splits = [lean.plan([(expert, 1) for expert in range(many)], []) for many in range(misses + 1)]
        self.most = max(1, *(len(split.fetch) for split in self._splits))

    def __call__(self, misses: int) -> tuple[int, int]:
        """See :class:`inference.decode_experts.Split`. Counts the call as the plan's."""
        split = self._splits[misses]
        if misses:
            self._plan.count(split)
        fetch = len(split.fetch)
        return fetch, int(misses > 0 and fetch == 0)
