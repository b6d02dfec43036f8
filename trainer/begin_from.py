"""A new run that begins with the state of another run's checkpoint (``checkpoint.load_from``), in any layout.

Masters, moments, step counts, the step and the data cursor carry over, bit for bit. Random streams carry over only
into the same layout; in another one they are keyed anew. Equal state is promised, not an equal trajectory: sums over
other workers round differently.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from checkpointing.materialise import whole
from checkpointing.resize import load_resized, tensor_differences
from checkpointing.state.extras import restore_rng, seed_streams
from checkpointing.state.zero import after_restore, describe_tensors, optimizer_steps
from checkpointing.storage import MANIFEST, place_of
from checkpointing.store import Checkpoint, step_folders, verify
from moe.bias import EXTRA
from trainer.checkpoints import CheckpointError, source_of
from trainer.computed import changes, computed
from trainer.events import read_events
from trainer.origin import Origin
from trainer.progress import Progress
from trainer.schema import Recipe

if TYPE_CHECKING:
    from trainer.snapshots import Snapshots

_SHOWN = 12  # differing tensors that are listed


class LoadError(ValueError):
    """``checkpoint.load_from`` cannot be used for this run; the message says what differs and what to do."""


@dataclass(frozen=True)
class Layout:
    """How a run's state lies over workers."""

    workers: int
    ep: int
    zero: int

    def __str__(self) -> str:
        return f"{self.workers} workers, ep {self.ep}, ZeRO-{self.zero}"


def data_order(recipe: Recipe) -> dict[str, Any]:
    """Kept in manifests: what decides, with the text, which samples a step consumes, and, with the weights, what is
    computed."""
    train = recipe.train
    return {"global_batch_size": train.global_batch_size, "seed": train.seed, "computed": computed(recipe)}


def begin_from(snapshots: Snapshots, progress: Progress) -> None:
    """Fill the live state and ``progress`` from the recipe's ``checkpoint.load_from``. A collective.

    Raises LoadError, on all ranks, if the checkpoint is of another model, optimizer or data order.
    """
    process = snapshots.process
    tensors: dict[str, dict[str, Any]] = {}
    for share in _gathered(describe_tensors(snapshots.zero_optimizer), process.world):
        tensors |= share
    with _opened(snapshots, tensors) as checkpoint:
        load_resized(snapshots.buffers, checkpoint)
        before, after = layout_of(checkpoint), _own_layout(snapshots.recipe)
        same = before == after and checkpoint.manifest["metadata"].get("device") == process.device.type
        carried = carried_progress(checkpoint, process.coordinate if same else None)
        progress.load(carried.dump())
        if snapshots.partial is not None:
            snapshots.partial.meter = snapshots.partial.meter.begins(progress.step)
        count = carried.optimizer_steps[0]
        after_restore(snapshots.zero_optimizer, [count] * len(optimizer_steps(snapshots.zero_optimizer)))
        extras = checkpoint.extras(process.coordinate) if same else {}
        streams = "rng.torch" in extras
        if streams:
            restore_rng(extras)
        else:
            seed_streams(snapshots.recipe.train.seed, f"train after step {progress.step}", process.rank)
        blob = _biases_of(checkpoint)
        if snapshots.bias is not None and blob is not None:
            snapshots.bias.load(blob)
        elif snapshots.bias is not None and process.rank == 0:
            print("the checkpoint has no selection biases: they begin as the model's own", flush=True)
        dist.barrier()  # rank 0 removes what it redid
    if process.rank == 0:
        print(_told(checkpoint, before, after, streams), flush=True)


def _biases_of(checkpoint: Checkpoint) -> bytes | None:
    """The routers' balance biases, which are the same on all workers."""
    return checkpoint.extras(checkpoint.manifest["coordinates"][0]).get(EXTRA)


def _told(checkpoint: Checkpoint, before: Layout | None, after: Layout, streams: bool) -> str:
    written = f" ({before})" if before is not None else ""
    text = (
        f"began with the state of step {checkpoint.step}{written} in this layout ({after}): weights and moments equal"
    )
    if streams:
        return f"{text}, random streams restored"
    return f"{text}; random streams keyed anew and sums rounded otherwise, so the course will not be bit-equal"


def _own_layout(recipe: Recipe) -> Layout:
    return Layout(recipe.parallel.workers, recipe.parallel.ep, recipe.parallel.zero)


def layout_of(checkpoint: Checkpoint) -> Layout | None:
    """The layout that wrote a checkpoint; None if its manifest does not say."""
    metadata = checkpoint.manifest["metadata"]
    if not {"world", "ep", "zero"} <= metadata.keys():
        return None
    return Layout(metadata["world"], metadata["ep"], metadata["zero"])


def carried_progress(checkpoint: Checkpoint, coordinate: str | None) -> Progress:
    """Where a run that begins with the checkpoint stands: the coordinate's own progress, or that of no single worker.

    Raises LoadError if the workers disagree, or if parameter groups have stepped differently often.
    """
    stored = {}
    for name in checkpoint.manifest["coordinates"]:
        stored[name] = Progress()
        stored[name].load(checkpoint.extras(name)["progress"])
    counts = {count for progress in stored.values() for count in progress.optimizer_steps}
    cursors = {(progress.step, progress.samples) for progress in stored.values()}
    if len(counts) != 1 or len(cursors) != 1:
        raise LoadError(
            f"{checkpoint.path}: its workers stand at (step, samples) {sorted(cursors)} with optimizer steps "
            f"{sorted(counts)}, where one of each is needed; use another step"
        )
    if coordinate is not None:
        return stored[coordinate]
    (step, samples), (count,) = cursors.pop(), counts
    chains = json.dumps([[name, stored[name].consumed] for name in sorted(stored)])
    return Progress(step, samples, hashlib.sha256(chains.encode()).hexdigest(), [count])


# -- which checkpoint --------------------------------------------------------------------------------------------------


@contextmanager
def _opened(snapshots: Snapshots, tensors: Mapping[str, Mapping[str, Any]]) -> Iterator[Checkpoint]:
    """Rank 0 chooses and checks the checkpoint, redoing its log if it has one; all open it. Raises LoadError on all."""
    run_dir, rank = snapshots.run_dir, snapshots.process.rank
    scratch = run_dir / ".load_from"
    outcome: list[Any] = [None]
    if rank == 0:
        try:
            shutil.rmtree(scratch, ignore_errors=True)
            chosen = choose(snapshots.recipe.checkpoint.load_from or "", _earlier(run_dir))
            problems = incompatible(chosen, snapshots.recipe, snapshots.origin, tensors)
            if problems:
                raise LoadError(f"checkpoint.load_from {chosen.path} does not fit this recipe:\n" + "\n".join(problems))
            changed = changes(chosen.manifest["metadata"].get("computed", {}), computed(snapshots.recipe))
            for line in changed:
                print(f"the same weights will compute something else: {line}", file=sys.stderr, flush=True)
            snapshots.events.write("load_from", step=chosen.step, path=str(chosen.path), changed=changed)
            outcome = [(True, str(_whole(chosen, scratch).path))]
        except (ValueError, OSError) as error:
            outcome = [(False, str(error))]
    dist.broadcast_object_list(outcome, src=0)
    fine, text = outcome[0]
    if not fine:
        raise LoadError(text)
    try:
        yield Checkpoint.open(place_of(text))
    finally:
        if rank == 0:
            shutil.rmtree(scratch, ignore_errors=True)


def _whole(checkpoint: Checkpoint, scratch: Path) -> Checkpoint:
    if not checkpoint.is_whole and not checkpoint.has_log:
        raise LoadError(f"{checkpoint.path} holds experts of several steps, which are no one state; use another step")
    return whole(checkpoint, scratch)


def _earlier(run_dir: Path) -> str | None:
    """What an earlier attempt of this run began with: a later one must begin with the same."""
    paths = [row["path"] for row in read_events(run_dir) if row["kind"] == "load_from"]
    return paths[-1] if paths else None


def choose(text: str, earlier: str | None = None) -> Checkpoint:
    """The checkpoint that ``text`` means: a ``step-N`` folder, or a run's newest that verifies.

    Args:
        earlier: the folder that this run has begun with before; it is taken, and no other.
    Raises LoadError if there is none, or if a named one is damaged.
    """
    place = place_of(earlier or text)
    if earlier is not None or (place / MANIFEST).exists():
        problems = verify(place)
        if not problems:
            return Checkpoint.open(place)
        why = "an earlier attempt of this run began with it; " if earlier is not None else ""
        raise LoadError(f"checkpoint.load_from: {problems[0]}; {why}bring it back, or give log.run=NAME and another")
    try:
        place = source_of(text).place
    except CheckpointError as error:
        raise LoadError(f"checkpoint.load_from: {error}") from error
    reasons: list[str] = []
    for step, folder in reversed(step_folders(place)):
        problems = verify(folder)
        if not problems:
            return Checkpoint.open(folder)
        print(f"step {step} is passed over: {problems[0]}", file=sys.stderr, flush=True)
        reasons += problems
    raise LoadError(f"checkpoint.load_from: {place} has no usable checkpoint: {'; '.join(reasons) or 'none is there'}")


# -- whether it fits ---------------------------------------------------------------------------------------------------


def incompatible(
    checkpoint: Checkpoint, recipe: Recipe, origin: Origin, tensors: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    """Why a run of this recipe cannot begin with the checkpoint, one line each; empty if it can."""
    metadata = checkpoint.manifest["metadata"]
    problems = [
        f"  {name}: {metadata[key]!r} in the checkpoint, {ours!r} here; {advice}"
        for key, name, ours, advice in _conditions(recipe, origin)
        if key in metadata and _family(metadata[key]) != _family(ours)
    ]
    if not any(line.startswith("  dtype") for line in problems):
        differences = tensor_differences(checkpoint.manifest["tensors"], tensors)
        problems += [f"  {line}" for line in differences[:_SHOWN]]
        if len(differences) > _SHOWN:
            problems.append(f"  and {len(differences) - _SHOWN} more tensors; the model must be the same")
    if not problems and _biases_of(checkpoint) is not None and not recipe.balance.bias_update_rate:
        problems.append("  it has trained selection biases of its routers; set balance.bias_update_rate as it was")
    samples = carried_progress(checkpoint, None).samples
    if not problems and samples != checkpoint.step * recipe.train.global_batch_size:
        problems.append(
            f"  it has consumed {samples} samples in {checkpoint.step} steps, which train.global_batch_size="
            f"{recipe.train.global_batch_size} does not; set it as it was"
        )
    if not problems and recipe.train.steps <= checkpoint.step:
        problems.append(f"  it is of step {checkpoint.step}; raise train.steps={recipe.train.steps} above that")
    return problems


def _conditions(recipe: Recipe, origin: Origin) -> Sequence[tuple[str, str, Any, str]]:
    order = data_order(recipe)
    elsewhere = "export that run and train from it with model.path to go on with other data"
    return (
        ("dtype", "dtype", origin.dtype, "set parallel.dtype as it was"),
        ("optimizer", "optimizer", origin.optimizer, "moments of one are none of another"),
        ("base", "frozen base model", origin.base, "restore model.path"),
        ("data", "text", origin.data, elsewhere),
        ("global_batch_size", "train.global_batch_size", order["global_batch_size"], "samples are counted in it"),
        ("seed", "train.seed", order["seed"], "it orders the samples"),
    )


def _family(value: Any) -> Any:
    """An optimizer's class without its implementation: moments are the same numbers for either."""
    return value.partition("(")[0] if isinstance(value, str) else value


def _gathered(mine: Any, world: int) -> list[Any]:
    everyone: list[Any] = [None] * world
    dist.all_gather_object(everyone, mine)
    return everyone
