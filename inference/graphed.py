"""A model whose decode steps are captured, for the engine: everything else is computed as it is.

A step counts as decoding if each of its rows is the newest of a sequence. For every number of rows, up to a few, and
every power of two of blocks, the step is captured when it first comes up, which takes about a second, in which all
requests wait. Captures keep memory of their own, so there are only so many: steps of other shapes are computed as they
are.

Shapes: R rows, L rows whose scores are wanted, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from inference.banks import ExpertBanks
from inference.cache import ExpertCache
from inference.cpu_experts import CpuExperts
from inference.cpu_lane import CpuLane, LaneError
from inference.decode import DecodeStep
from inference.decode_experts import DecodeExperts, Split
from inference.errors import InferenceError
from inference.executor import Executor
from inference.experts import OffloadedExperts, computable
from inference.graphs import SegmentedGraph, StepGraph, Uncaptured
from inference.model import Model
from inference.planner import CallPlanner
from inference.rows import Rows

MOST_ROWS = 8  # beyond, reading an expert once per row costs more than launches do
MOST_STEPS = 16  # captured shapes
_LEAST_BLOCKS = 16


class GraphedModel:
    """:class:`Model` with the same ``forward``.

    Args:
        modules: the model's routed experts, without adapters.
        executor: carries out their calls in steps that are not captured; its slots, transfers, plan and the CPU's
            threads are shared.

    Raises:
        InferenceError: steps of this model, or with this executor's settings, are not captured.
    """

    def __init__(self, model: Model, modules: Sequence[OffloadedExperts], executor: Executor) -> None:
        _check(executor, int(model.config.num_experts_per_tok))
        self.model, self.config, self.kv = model, model.config, model.kv
        self._modules, self._executor = tuple(modules), executor
        self._steps: dict[tuple[int, int], DecodeStep] = {}
        cache, choices = executor.cache, int(self.config.num_experts_per_tok)
        all_resident = cache.slots == cache.store.total
        self._most = MOST_ROWS if all_resident else min(MOST_ROWS, cache.slots // (2 * choices))
        self._lane: CpuLane | None = None
        self._split: Split | None = None
        if executor.cpu is not None and executor.plan is not None:
            assert isinstance(executor.cpu, CpuExperts)
            assert isinstance(executor.plan, CallPlanner)
            self._lane = _lane(executor.cpu, cache)
            self._split = _split(executor.plan, min(self._most * choices, cache.store.shape.num_experts))

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
        """The captured step for these rows; None if there are too many others."""
        needed = max(-(-span.length // self.kv.block_size) for span in called.spans)
        rows, blocks = len(called.spans), max(_LEAST_BLOCKS, 1 << (needed - 1).bit_length())
        if (rows, blocks) not in self._steps:
            if len(self._steps) >= MOST_STEPS:
                return None
            cuda = self.kv.device.type == "cuda"
            graph: StepGraph = SegmentedGraph(self.kv.device) if cuda else Uncaptured()
            experts = DecodeExperts(
                self._executor.cache,
                self._executor.transfers,
                rows,
                int(self.config.num_experts_per_tok),
                graph=graph,
                lane=self._lane,
                host=None if self._lane is None else self._executor.transfers.source.address,
                split=self._split,
            )
            if experts.all_resident:
                experts.fill()
            self._steps[rows, blocks] = DecodeStep(self.model, self._modules, experts, graph, rows, blocks)
        return self._steps[rows, blocks]


def _check(executor: Executor, choices: int) -> None:
    """Raises InferenceError for what would not be captured, or would do nothing while steps are."""
    cache, source = executor.cache, executor.transfers.source
    if not computable(cache.store.shape):
        raise InferenceError(
            "decode steps are captured with plain silu experts only, and this model has others; leave graphs out"
        )
    if executor.prefetcher is not None:
        raise InferenceError("captured decode steps fetch nothing ahead, so leave prefetch or graphs out")
    if cache.slots == cache.store.total:
        return
    if isinstance(source, ExpertBanks) and not source.filling:
        raise InferenceError(
            "captured decode steps take experts from page-locked memory; leave pin=False (--no-pin) or graphs out"
        )
    if cache.slots < 2 * choices:
        raise InferenceError(
            f"{cache.slots} slots are too few to decode in graphs: two calls of {choices} experts must have room; "
            f"give at least {2 * choices} (expert budget {2 * choices / cache.store.total:.3g}), or leave graphs out"
        )


def _lane(cpu: CpuExperts, cache: ExpertCache) -> CpuLane:
    """The threads that compute calls of steps that are not captured, too, where the compiled kernel is used there."""
    if cpu.compiled is not None:
        return cpu.compiled.lane
    shape, layout = cache.store.shape, cache.layout
    try:
        return CpuLane(cpu.threads, shape.hidden, shape.intermediate, layout.dtype, layout.parts[1].start)
    except LaneError as error:
        raise InferenceError(f"captured steps have no CPU lane: {error}; leave graphs or cpu out") from error


def _split(plan: CallPlanner, most: int) -> Split:
    """``plan`` for up to ``most`` misses of one row each, all cuts made before the first call."""
    splits = [plan.plan([(expert, 1) for expert in range(misses)], []) for misses in range(most + 1)]

    def split(misses: int) -> tuple[int, int]:
        if misses:
            plan.count(splits[misses])
        return len(splits[misses].fetch), 0

    return split
