"""Record routing where the experts are called: while generating, or while a model reads a text.

The file is one of :mod:`moe.tracefile`. Its steps are sequences, its micro-batches the passes of each; a pass of T
tokens is replayed as one call of each layer with T tokens, unless the reader says that they were decoded one by one.

Shapes: T tokens, H hidden, K choices, E experts, L MoE layers, R rank of heads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from inference.errors import InferenceError
from inference.heads import Heads
from inference.lookahead import token_scores
from inference.recorded_heads import RecordedHeads, heads_file
from moe.tracefile import TraceError, TraceHeader, TraceRecord, TraceWriter


class RoutingRecorder:
    """Writes a trace, and beside it what lookahead heads say of each token.

    Args:
        path: the trace to make; it must not be there.
        header: what is recorded.
        heads: None: nothing is written beside the trace.
        gates: of all MoE layers, in order: with heads, the next one is applied to each layer's input, too.

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
        self._codes: list[list[np.ndarray]] = [[] for _ in header.layers]
        self._scores: list[list[np.ndarray]] = [[] for _ in header.layers]
        self._handles: list[RemovableHandle] = []

    def begin(self) -> None:
        """A new sequence starts."""
        if self._pass >= 0:
            self._sequence += 1
        self._pass, self._last = -1, -1

    def note(self, layer: int, x_TH: Tensor, index_TK: Tensor) -> None:
        """One layer call. Layers are called in order; an earlier one begins a pass. On a GPU this waits for it."""
        row = self._row[layer]
        if row <= self._last or self._pass < 0:
            self._pass += 1
        self._last = row
        index = index_TK.reshape(-1, self._writer.header.top_k).cpu().numpy()
        try:
            self._writer.write(TraceRecord(self._sequence, self._pass, layer, index))
        except TraceError as error:
            raise InferenceError(str(error)) from error
        if self._heads is None:
            return
        self._codes[row].append(self._heads.codes(row, x_TH).half().cpu().numpy())
        if row + 1 < len(self._gates):
            scores_TE = token_scores(self._gates[row + 1], x_TH.reshape(len(index), -1))
        else:
            scores_TE = torch.full((len(index), self._heads.num_experts), float("nan"))
        self._scores[row].append(scores_TE.half().cpu().numpy())

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
        if self._heads is None or not self._codes[0]:
            return
        tokens = min(sum(map(len, calls)) for calls in self._codes)
        codes_TLR, gate_TLE = (
            np.stack([np.concatenate(calls)[:tokens] for calls in kept], 1) for kept in (self._codes, self._scores)
        )
        maps = (self._heads.outward_LRO.cpu().numpy(), self._heads.bias_LO.cpu().numpy())
        RecordedHeads(codes_TLR, *maps, gate_TLE).save(self.path)
