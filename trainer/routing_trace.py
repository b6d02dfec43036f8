"""What a run does with routing traces: ``log.routing_trace`` records one, ``train.replay_trace`` follows one.

A run's trace lies in ``trace/`` in its folder, one file for each rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe.families import MoEBlock
from moe.trace import BalancedRouting, Recorder, Replay
from moe.tracefile import TraceError, TraceHeader, TraceWriter, trace_file
from trainer.rendezvous import Process
from trainer.schema import Recipe

BALANCED = "balanced"  # in place of a path: round-robin routing


@dataclass(frozen=True)
class Tape:
    """Where this rank's routing is written to, and where it comes from; either may be None."""

    recorder: Recorder | None = None
    source: Replay | BalancedRouting | None = None

    def at(self, step: int, micro: int) -> dict[str, Any]:
        """The fields of a forward pass's BatchContext."""
        return {
            "record": self.recorder.at(step, micro) if self.recorder else None,
            "replay": self.source.at(step, micro) if self.source else None,
        }

    def flush(self) -> None:
        """Before the optimizer steps: a step that a recovery need not run again has been recorded."""
        if self.recorder is not None:
            self.recorder.flush()


def open_tape(recipe: Recipe, process: Process, run_dir: Path, config: Any, blocks: Sequence[MoEBlock]) -> Tape:
    """What the run's gates record and replay, by the BatchContext of each pass.

    Raises TraceError for a trace that is missing, broken or of another model, batch or layout.
    """
    wanted = recipe.train.replay_trace
    if wanted is None and not recipe.log.routing_trace:
        return Tape()
    if not blocks:
        raise TraceError("this model routes no tokens: remove log.routing_trace and train.replay_trace")
    experts: Any = blocks[0].experts
    layers, top_k = tuple(block.layer for block in blocks), recipe.routing.choices(config.num_experts_per_tok)
    header = TraceHeader(config.model_type, layers, experts.num_experts, top_k, process.rank, process.world)
    source: Replay | BalancedRouting | None = None
    if wanted == BALANCED:
        tokens = recipe.train.micro_batch_size * recipe.data.sequence_length
        source = BalancedRouting(tokens, experts.num_experts, top_k, process.device)
    elif wanted is not None:
        source = Replay(_file_of(wanted, process.rank), header, process.device)
    recorder = None
    if recipe.log.routing_trace:
        recorder = Recorder(TraceWriter(trace_file(run_dir / "trace", process.rank), header))
    return Tape(recorder, source)


def _file_of(wanted: str, rank: int) -> Path:
    """The trace of ``rank`` in a run's folder or a trace folder."""
    for folder in (Path(wanted) / "trace", Path(wanted)):
        if trace_file(folder, rank).is_file():
            return trace_file(folder, rank)
    raise TraceError(
        f"train.replay_trace: {wanted} has no routing trace of rank {rank} (trace/{trace_file('', rank)}); give the "
        "folder of a run that had log.routing_trace=true"
    )
