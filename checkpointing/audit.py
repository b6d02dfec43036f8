"""Whether a checkpoint is what was written, and whether that is a whole state: for people, who want all problems."""

from __future__ import annotations

from checkpointing.manifest import own_manifest
from checkpointing.recovery import RecoveryError
from checkpointing.storage import Place
from checkpointing.store import Checkpoint, verify
from checkpointing.units import Range, overlaps, uncovered


def audit(step_dir: Place) -> list[str]:
    """Problems, each naming a file, or the layer, expert and tensor that is absent or held twice; none if all is well.

    Reads every byte. Raises UnreachableError for a store that does not answer.
    """
    problems = verify(step_dir)
    try:
        manifest = own_manifest(step_dir)
    except RecoveryError:
        return problems
    readable = [c for c in manifest["coordinates"] if not any(f"/{c}." in problem for problem in problems)]
    return problems + _not_whole(Checkpoint(step_dir, manifest | {"coordinates": readable}))


def _not_whole(checkpoint: Checkpoint) -> list[str]:
    """By interval arithmetic over the readable files: each element of each kind of state of each unit exactly once."""
    if checkpoint.has_log:
        return []
    held = [e.range for record in checkpoint.newest for e in record.entries]
    kinds = sorted({r.kind for r in held})
    sizes = {unit: facts.get("elements") for unit, facts in checkpoint.manifest["tensors"].items()}
    needed = [Range(unit, kind, 0, size) for unit, size in sizes.items() if size is not None for kind in kinds]
    absent, twice = uncovered(needed, held), overlaps(held)
    problems = []
    if absent:
        problems.append(f"{checkpoint.path}: lacks {_some(absent)}")
    if twice:
        problems.append(f"{checkpoint.path}: holds {_some(twice)} twice")
    return problems


def _some(ranges: list[Range]) -> str:
    more = f" and {len(ranges) - 3} more" if len(ranges) > 3 else ""
    return ", ".join(map(str, ranges[:3])) + more
