"""A model whose decode steps are captured, for the engine: everything else is computed as it is.

A step counts as decoding if each of its rows is the newest of a sequence. For every number of rows, up to a few, and
every power of two of blocks, the step is captured when it first comes up, which takes about a second.

Shapes: R rows, L rows whose scores are wanted, V vocabulary.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from torch import Tensor

from inference.cpu_lane import CpuLane, LaneError
from inference.decode import DecodeStep
from inference.decode_experts import DecodeExperts, Split
from inference.errors import InferenceError
from inference.executor import Executor
from inference.experts import OffloadedExperts, computable
from inference.graphs import SegmentedGraph, StepGraph, Uncaptured
from inference.model import Model
from inference.rows import Rows

MOST_ROWS = 8  # beyond, reading an expert once per row costs more than launches do
_LEAST_BLOCKS = 16


class GraphedModel:
    """:class:`Model` with the same ``forward``.

    Args:
        modules: the model's routed experts, without adapters.
        executor: carries out their calls in steps that are not captured; its slots, transfers and split are shared.

    Raises:
        InferenceError: the kernels do not know the experts' form.
    """

    def __init__(self, model: Model, modules: Sequence[OffloadedExperts], executor: Executor) -> None:
        if not computable(executor.cache.store.shape):
            raise InferenceError(
                "decode steps are captured with plain silu experts only, and this model has others; leave graphs out"
            )
        self.model, self.config, self.kv = model, model.config, model.kv
        self._modules, self._executor = tuple(modules), executor
        self._steps: dict[tuple[int, int], DecodeStep] = {}
        cache, choices = executor.cache, int(self.config.num_experts_per_tok)
        all_resident = cache.slots == cache.store.total
        self._most = MOST_ROWS if all_resident else min(MOST_ROWS, cache.slots // (2 * choices))
        self._lane: CpuLane | None = None
        self._split: Split | None = None
        if executor.cpu is not None and executor.plan is not None:
            shape, layout = cache.store.shape, cache.layout
            threads = max(len(os.sched_getaffinity(0)) - 2, 1)
            try:
                self._lane = CpuLane(threads, shape.hidden, shape.intermediate, layout.dtype, layout.parts[1].start)
            except LaneError as error:
                raise InferenceError(f"captured steps have no CPU lane: {error}; leave graphs or cpu out") from error
            plan = executor.plan
            most = min(self._most * choices, shape.num_experts)
            fetched = [len(plan([(e, 1) for e in range(misses)], [])[0]) for misses in range(most + 1)]
            self._split = lambda misses: (fetched[misses], 0)

    def forward(self, rows: Rows) -> Tensor:
        """Scores [L,V]; see :meth:`Model.forward`."""
        if not self._captures(rows):
            return self.model.forward(rows)
        self._executor.rest()
        size = self.kv.block_size
        needed = max(-(-span.length // size) for span in rows.spans)
        blocks = max(_LEAST_BLOCKS, 1 << (needed - 1).bit_length())
        step = self._step(len(rows.spans), blocks)
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

    def _step(self, rows: int, blocks: int) -> DecodeStep:
        if (rows, blocks) not in self._steps:
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
