"""The decode step: one new token of each of R sequences, on tensors that stay where they are: it can be captured.

Shapes: R rows, M blocks of each sequence, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from inference.decode_experts import DecodeExperts
from inference.experts import OffloadedExperts
from inference.graphs import StepGraph
from inference.model import Model


class DecodeStep:
    """Steps of one shape over a model.

    Args:
        model: its key-value pool is written to.
        modules: the model's routed experts; empty for a dense model.
        experts: what computes them while a step runs, made for ``rows``; None for a dense model.
        graph: runs the step; the one that ``experts`` cut.
        rows, blocks: R and M. Sequences may be shorter than M blocks, never longer.

    Attributes:
        logits_RV: of the newest step.
        token_R: the likeliest tokens of the newest step; the next one's input, if it is not given other tokens.
    """

    def __init__(
        self,
        model: Model,
        modules: Sequence[OffloadedExperts],
        experts: DecodeExperts | None,
        graph: StepGraph,
        rows: int,
        blocks: int,
    ) -> None:
        device = model.kv.device
        self.model, self.graph = model, graph
        self._modules, self._experts = tuple(modules), experts
        self.token_R = torch.zeros(rows, dtype=torch.int64, device=device)
        self._position_R = torch.zeros(rows, dtype=torch.int64, device=device)
        self._table_RM = torch.zeros(rows, blocks, dtype=torch.int64, device=device)
        self.logits_RV = torch.zeros(rows, model.config.vocab_size, device=device, dtype=model.kv.dtype)
        self._rotations = model.rotations(blocks)  # the graph reads these tables, though the model may make longer ones
        # A warm-up writes the keys of position 0 of block 0, which may be somebody's.
        first = model.kv.pool_LNSCD[:, 0, 0].clone()
        try:
            with self._seam(), torch.inference_mode():
                graph.capture(self._compute)
        finally:
            model.kv.pool_LNSCD[:, 0, 0] = first

    @torch.inference_mode()
    def run(
        self, positions: Sequence[int], tables: Sequence[Sequence[int]], tokens: Sequence[int] | None = None
    ) -> Tensor:
        """Scores [R,V] behind the newest tokens, which stay until the next step.

        Args:
            positions: of the newest tokens; all before them are in the pool.
            tables: blocks of each sequence, in order.
            tokens: the newest tokens; by default those that were likeliest in the step before.
        """
        rows, blocks = self._table_RM.shape
        assert len(positions) == len(tables) == rows, (len(positions), len(tables), rows)
        self._position_R.copy_(torch.tensor(positions))
        self._table_RM.copy_(torch.tensor([(*table, *[0] * (blocks - len(table))) for table in tables]))
        if tokens is not None:
            self.token_R.copy_(torch.tensor(tokens))
        with self._seam():
            self.graph.replay()
        return self.logits_RV

    def _compute(self) -> None:
        step = self.model.decoding_step(self._position_R, self._table_RM)
        self.logits_RV.copy_(self.model.scores(self.model.layers(self.token_R, step)))
        self.token_R.copy_(self.logits_RV.argmax(dim=-1))

    @contextmanager
    def _seam(self) -> Iterator[None]:
        before = [module.executor for module in self._modules]
        for module in self._modules:
            module.executor = self._experts
        try:
            if self._experts is not None:
                self._experts.begin()
            yield
            if self._experts is not None:
                self._experts.finish()
        except BaseException as error:
            if self._experts is not None:
                self._experts.break_off(error)
            raise
        finally:
            for module, executor in zip(self._modules, before, strict=True):
                module.executor = executor
