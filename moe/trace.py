"""Record where tokens are routed, and route them there again.

Through :class:`~moe.context.BatchContext`, a gate that follows it calls ``record(layer, index_TK, weights_TK)`` after
it has chosen, and takes ``replay(layer)``, if that gives indices, instead of choosing. The weights of replayed indices
are computed from the gate's own logits, so gradients reach it as ever. Files are described in :mod:`moe.tracefile`.

Shapes: T tokens, K choices per token, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moe.context import current
from moe.families import MoEBlock
from moe.tracefile import Trace, TraceError, TraceHeader, TraceRecord, TraceWriter, read_trace

__all__ = [
    "BalancedRouting",
    "Recorder",
    "Replay",
    "TraceError",
    "follow_context",
    "read_trace",
    "weights_at",
]

Record = Callable[[int, Tensor, Tensor], None]
Source = Callable[[int], Tensor | None]


class Recorder:
    """Keeps what gates report until :meth:`flush` writes it: only then does it wait for a GPU."""

    def __init__(self, writer: TraceWriter) -> None:
        self._writer = writer
        self._kept: dict[tuple[int, int, int], tuple[Tensor, Tensor | None]] = {}

    def at(self, step: int, micro: int) -> Record:
        """What the context of one forward pass takes. A pass that is recomputed in backward is recorded once."""
        weighted = self._writer.header.weights

        def record(layer: int, index_TK: Tensor, weights_TK: Tensor) -> None:
            weights = weights_TK.detach().float() if weighted else None
            self._kept.setdefault((step, micro, layer), (index_TK.detach().to(torch.int32), weights))

        return record

    def flush(self) -> None:
        """Append everything that was reported since the last call. Raises TraceError for what does not fit."""
        kept, self._kept = self._kept, {}
        for (step, micro, layer), (index_TK, weights_TK) in kept.items():
            weights = None if weights_TK is None else weights_TK.cpu().numpy()
            self._writer.write(TraceRecord(step, micro, layer, index_TK.cpu().numpy(), weights))


class Replay:
    """A recorded trace as a source of routing.

    Args:
        header: what this rank would record; the trace must have been recorded of the same.

    Raises TraceError for a trace that is broken or of another model or layout.
    """

    def __init__(self, path: Path, header: TraceHeader, device: torch.device | None = None) -> None:
        self._trace, self._device = Trace(path), device
        for name in ("model", "layers", "num_experts", "top_k", "rank", "world"):
            theirs, ours = getattr(self._trace.header, name), getattr(header, name)
            if theirs != ours:
                raise TraceError(f"{path} was recorded with {name} {theirs}, this model has {ours}; give another trace")

    def at(self, step: int, micro: int) -> Source:
        """Raises TraceError, when it is asked, for a forward pass that was not recorded."""

        def replay(layer: int) -> Tensor:
            record = self._trace.record(step, micro, layer)
            if record is None:
                steps = sorted({key[0] for key in self._trace.keys}) or [0]
                raise TraceError(
                    f"{self._trace.path} has no step {step}, micro-batch {micro}, layer {layer}; it has steps "
                    f"{steps[0]} to {steps[-1]}"
                )
            return torch.from_numpy(record.index_TK.astype("int64")).to(self._device)

        return replay


@dataclass(frozen=True)
class BalancedRouting:
    """Round-robin routing for benchmarks: every expert gets the same number of tokens, or one more.

    Attributes:
        num_tokens: of every forward pass.
    """

    num_tokens: int
    num_experts: int
    top_k: int
    device: torch.device | None = None

    def at(self, step: int, micro: int) -> Source:
        def replay(layer: int) -> Tensor:
            first = layer  # so that not every layer gives its odd tokens to the same experts
            pairs_S = torch.arange(first, first + self.num_tokens * self.top_k, device=self.device)
            return (pairs_S % self.num_experts).view(self.num_tokens, self.top_k)

        return replay


def follow_context(blocks: Iterable[MoEBlock]) -> list[RemovableHandle]:
    """Have transformers' gates honour the context's ``record`` and ``replay``. Hook them before any other observer,
    which will then see the replayed choice.

    In a forward pass, raises TraceError for a replay that does not fit the batch, or a gate whose weights we cannot
    compute.
    """
    return [block.gate.register_forward_hook(_Follower(block)) for block in blocks]


class _Follower:
    def __init__(self, block: MoEBlock) -> None:
        self._layer, self._path, self._proven = block.layer, block.path, False

    def __call__(self, gate: nn.Module, _args: tuple, output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        context = current()
        if context.record is None and context.replay is None:
            return output
        if not isinstance(output, tuple) or len(output) != 3:
            raise TraceError(f"{self._path}: its gate ({type(gate).__name__}) does not return logits, weights, indices")
        logits_TE, weights_TK, index_TK = output
        forced_TK = context.replay(self._layer) if context.replay is not None else None
        if forced_TK is not None:
            if forced_TK.shape != index_TK.shape:
                raise TraceError(
                    f"layer {self._layer}: the trace has {list(forced_TK.shape)} [tokens, choices], this batch "
                    f"{list(index_TK.shape)}; replay it with the same data settings"
                )
            self._prove(gate, logits_TE, weights_TK, index_TK)
            index_TK = forced_TK.to(index_TK)
            weights_TK = weights_at(gate, logits_TE, index_TK).to(weights_TK.dtype)
        if context.record is not None:
            context.record(self._layer, index_TK, weights_TK)
        return logits_TE, weights_TK, index_TK

    def _prove(self, gate: nn.Module, logits_TE: Tensor, weights_TK: Tensor, index_TK: Tensor) -> None:
        """Once: at its own choice, our weights are the gate's, bit for bit."""
        if not self._proven and not torch.equal(weights_at(gate, logits_TE, index_TK).to(weights_TK.dtype), weights_TK):
            raise TraceError(
                f"{self._path}: cannot replay: the weights of {type(gate).__name__} are not the ones we compute from "
                "its logits"
            )
        self._proven = True


def weights_at(gate: nn.Module, logits_TE: Tensor, index_TK: Tensor) -> Tensor:
    """The weights that a transformers gate gives the experts ``index_TK``: [T,K].

    Softmax over the experts, over the chosen (gpt_oss), or sigmoid (DeepSeek-V3); then, as the gate says, normalised
    and scaled.
    """
    if isinstance(getattr(gate, "bias", None), nn.Parameter):
        return logits_TE.gather(1, index_TK).softmax(1)
    sigmoid = hasattr(gate, "e_score_correction_bias")
    scores_TE = logits_TE.sigmoid() if sigmoid else logits_TE.softmax(-1, dtype=torch.float32)
    weights_TK = scores_TE.gather(1, index_TK)
    # Mixtral always normalises and has no flag; DeepSeek-V2 never does, and has only a scale.
    if getattr(gate, "norm_topk_prob", not hasattr(gate, "routed_scaling_factor")):
        total_T1 = weights_TK.sum(-1, keepdim=True)
        weights_TK = weights_TK / (total_T1 + 1e-20 if sigmoid else total_T1)
    return weights_TK * getattr(gate, "routed_scaling_factor", 1.0)
