"""Record routing where the experts are called: while generating, or while a model reads a text.

The file is one of :mod:`moe.tracefile`. Its steps are sequences, its micro-batches the passes of each; a pass of T
tokens is replayed as one call of each layer with T tokens, unless the reader says that they were decoded one by one.

Shapes: T tokens, H hidden, K choices, E experts, L MoE layers, R rank of heads.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from inference.errors import InferenceError
from inference.heads import Heads
from inference.next_gates import token_scores
from inference.recorded_heads import RecordedHeads, SpilledRows, heads_file
from moe.tracefile import TraceError, TraceHeader, TraceRecord, TraceWriter


class RoutingRecorder:
    """Writes a trace, and beside it what lookahead heads say of each token.

    Args:
        path: the trace to make; it must not be there.
        header: what is recorded.
        heads: None: nothing is written beside the trace.
        gates: of all MoE layers, in order: with heads, the next one is applied to each layer's input, too.

    Attributes:
        failure: why the recording has stopped, if it has: a full disk must not end what is served. The trace is whole
            up to there, and nothing is beside it.

    Raises InferenceError if the file is there already or cannot be made.
    """

    def __init__(
        self,
        path: str | Path,
        header: TraceHeader,
        heads: Heads | None = None,
        gates: Sequence[nn.Module] = (),
    ) -> None:
        self.path = Path(path)
        if self.path.exists() or heads_file(self.path).exists():
            raise InferenceError(f"{self.path} exists; give the trace another name or remove it")
        try:
            self._writer = TraceWriter(self.path, header)
        except OSError as error:
            raise InferenceError(f"{self.path}: {error.strerror}; give another path for the trace") from error
        self._row = {layer: row for row, layer in enumerate(header.layers)}
        self._heads, self._gates = heads, gates
        self._sequence, self._pass, self._last = 0, -1, -1
        # Of each token: the heads' codes, then the next gate's scores.
        self._said = None if heads is None else SpilledRows(self.path.parent, len(header.layers))
        self._handles: list[RemovableHandle] = []
        self.failure: str | None = None

    def begin(self) -> None:
        """A new sequence starts."""
        if self._pass >= 0:
            self._sequence += 1
        self._pass, self._last = -1, -1

    def note(self, layer: int, x_TH: Tensor, index_TK: Tensor) -> None:
        """One layer call. Layers are called in order; an earlier one begins a pass. On a GPU this waits for it."""
        if self.failure is not None:
            return
        row = self._row[layer]
        begins = row <= self._last or self._pass < 0
        self._pass += begins
        self._last = row
        index = index_TK.reshape(-1, self._writer.header.top_k).cpu().numpy()
        try:
            if begins and self._said is not None:
                self._said.cut()
            self._writer.write(TraceRecord(self._sequence, self._pass, layer, index))
            if self._heads is not None and self._said is not None:
                self._said.add(row, self._what_is_said(self._heads, row, x_TH.reshape(len(index), -1)))
        except TraceError as error:
            raise InferenceError(f"recording {self.path}: {error}") from error
        except OSError as error:
            self._fail(error)

    def _fail(self, error: OSError) -> None:
        self.failure = f"recording {self.path} has stopped: {error.strerror}; the trace holds what came before"
        print(self.failure, file=sys.stderr, flush=True)
        if self._said is not None:
            self._said.close()
            self._said = None

    def _what_is_said(self, heads: Heads, row: int, x_TH: Tensor) -> np.ndarray:
        codes_TR = heads.codes(row, x_TH).half()
        if row + 1 < len(self._gates):
            scores_TE = token_scores(self._gates[row + 1], x_TH).half()
        else:
            scores_TE = torch.full_like(codes_TR[:, :1], float("nan")).expand(-1, heads.num_experts)
        return torch.cat([codes_TR, scores_TE], 1).cpu().numpy()

    def attach(self, experts: Mapping[int, nn.Module]) -> None:
        """Note every call of these modules, by layer."""
        for layer, module in experts.items():
            self._handles.append(module.register_forward_pre_hook(self._hook(layer), with_kwargs=True))

    def _hook(self, layer: int) -> Any:
        def hook(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            given = dict(zip(("hidden_states", "top_k_index"), args, strict=False)) | kwargs
            self.note(layer, given["hidden_states"].detach(), given["top_k_index"].detach())

        return hook

    def close(self) -> None:
        """Stop noting, and write what heads said."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._writer.close()
        if self._heads is None or self._said is None:
            return
        try:
            self._save(self._said, self._heads)
        except OSError as error:
            heads_file(self.path).unlink(missing_ok=True)
            self._fail(error)
        else:
            self._said.close()
            self._said = None

    def _save(self, said: SpilledRows, heads: Heads) -> None:
        said_TLC = said.whole()
        if len(said_TLC):
            rank = said_TLC.shape[2] - heads.num_experts
            maps = (heads.outward_LRO.cpu().numpy(), heads.bias_LO.cpu().numpy())
            RecordedHeads(said_TLC[:, :, :rank], *maps, said_TLC[:, :, rank:]).save(self.path)
