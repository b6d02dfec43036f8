"""`planaria checkpoint export` and `import`: checkpoints as other tools' folders, and DeepSpeed's as ours.

DeepSpeed's folder is written in the layout of the run, so that an engine with as many ranks loads it; bits are equal.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from checkpointing.deepspeed_format import MOMENTS as DEEPSPEED_MOMENTS
from checkpointing.deepspeed_format import (
    DeepSpeedFolder,
    described_tensors,
    optimizer_step,
    read_folder,
    resolve_tag,
    saved_weights,
    state_buffers,
    weights_dtype,
)
from checkpointing.deepspeed_writer import ModelFacts, write_model, write_rank
from checkpointing.materialise import sections_of, whole
from checkpointing.moments import MOMENTS
from checkpointing.resize import load_resized
from checkpointing.state.buffers import StateBuffer
from checkpointing.state.partitions import build_partitions
from checkpointing.store import Checkpoint, step_path, verify, write_checkpoint
from checkpointing.tensorfile import read_metadata
from moe.refs import ExpertRef
from trainer.begin_from import carried_progress, layout_of
from trainer.checkpoints import chosen, source_of, split_step
from trainer.export import ExportError, buffers_of, trained_tensors
from trainer.export import main as export_hf
from trainer.progress import Progress
from trainer.recipe import load_recipe
from trainer.schedules import learning_rate
from trainer.schema import Recipe

_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


class ForeignFolderError(ValueError):
    """A folder cannot be imported; the message says where and why."""


def export(run: str, out_dir: str, form: str, inexact: bool = False) -> int:
    """Write ``RUN[:STEP]`` to a new folder as ``hf`` or ``deepspeed``."""
    name, step = split_step(run)
    if form == "hf":
        return export_hf(name, out_dir, inexact, step)
    source = source_of(name)
    if source.run is None or not (source.run / "recipe.yaml").is_file():
        raise ExportError(f"{name}: give the run's folder, since DeepSpeed's states also hold what the recipe says")
    recipe, checkpoint = load_recipe(source.run / "recipe.yaml"), chosen(run)
    if recipe.adapter:
        raise ExportError(f"{name} trains adapters, and DeepSpeed's folders hold whole models; export it with --hf")
    if recipe.balance.bias_update_rate:
        raise ExportError(
            f"{name} has trained selection biases of its routers, for which DeepSpeed's folders have no place; export "
            "it with --hf"
        )
    if recipe.model.frozen_experts or recipe.model.trainable_experts:
        raise ExportError(f"{name} froze experts, and DeepSpeed's folders hold whole models; export it with --hf")
    problems = verify(checkpoint.path)
    if problems:
        raise ExportError(f"{problems[0]}; use another step")
    with _new_folder(Path(out_dir)) as folder, tempfile.TemporaryDirectory(prefix="planaria-") as scratch:
        tag = f"global_step{checkpoint.step}"
        (folder / tag).mkdir()
        _write_deepspeed(whole(checkpoint, Path(scratch), inexact), recipe, folder / tag)
        (folder / "latest").write_text(tag)
    layout = layout_of(checkpoint)
    print(f"exported step {checkpoint.step} to {out_dir}: an engine of {layout} loads tag {tag}")
    return 0


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A folder that is renamed to ``out`` when all is written, and removed if not."""
    if out.exists() and any(out.iterdir()):
        raise ExportError(f"{out} exists and is not empty; give another folder or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        if out.exists():
            out.rmdir()
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


# -- to DeepSpeed ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Share:
    """One rank's partitions: for each group the part of each parameter, as (start, elements)."""

    buffers: Sequence[StateBuffer]
    optimizer: torch.optim.Optimizer
    fragments: Sequence[Mapping[str, tuple[int, int]]]


def _write_deepspeed(checkpoint: Checkpoint, recipe: Recipe, tag_dir: Path) -> None:
    from trainer.engine import DEEPSPEED_VERSION, FRAGMENT_CLASS

    layout = layout_of(checkpoint)
    if layout is None:
        raise ExportError(f"{checkpoint.path} does not say which layout wrote it; train on from it first")
    progress = carried_progress(checkpoint, None)
    rate = _rate(recipe, checkpoint.step)
    shares = [
        _share(checkpoint, coordinate, rate, progress.optimizer_steps[0])
        for coordinate in checkpoint.manifest["coordinates"]
    ]
    degrees = [layout.ep if group.get("moe") else 1 for group in shares[0].optimizer.param_groups]
    tensors = checkpoint.manifest["tensors"]
    facts = ModelFacts(
        step=progress.step,
        samples=progress.samples,
        world=layout.workers,
        zero=layout.zero,
        bf16=checkpoint.manifest["metadata"]["dtype"] == "bfloat16",
        clip_grad=recipe.train.max_grad_norm,
        version=DEEPSPEED_VERSION,
        shapes=[_shapes(shares[::degree], index, degree, tensors) for index, degree in enumerate(degrees)],
    )
    layers = {
        fact["param"]: ExpertRef.parse(unit.rpartition(".")[0]).layer
        for unit, fact in tensors.items()
        if fact["expert"] is not None
    }
    weights = trained_tensors(checkpoint)
    tied = {} if _HEAD in weights or _EMBEDDING not in weights else {_HEAD: _EMBEDDING}
    write_model(
        tag_dir, facts, weights, layers, tied, expert_parallel=layout.ep > 1, buffers=buffers_of(recipe, weights)
    )
    counts = [layout.workers // degree for degree in degrees]
    for rank, share in enumerate(shares):
        write_rank(tag_dir, rank, facts, share.optimizer, share.fragments, counts, FRAGMENT_CLASS)


def _share(checkpoint: Checkpoint, coordinate: str, rate: float, count: float) -> _Share:
    text = read_metadata(checkpoint.file_of(coordinate)).get("partitions")
    described = json.loads(text) if text is not None else {}
    if text is None or "groups" not in described:
        raise ExportError(
            f"{checkpoint.file_of(coordinate)} does not say how partitions lie; train a step from it first"
        )
    if MOMENTS[described["optimizer"]] != DEEPSPEED_MOMENTS:
        raise ExportError(
            f"{checkpoint.file_of(coordinate)} holds the state of {described['optimizer']}; DeepSpeed folders are "
            "written with states of Adam and AdamW only; export the weights with --hf"
        )
    settings = [{**group, "betas": tuple(group["betas"]), "lr": rate} for group in described["groups"]]
    buffers, optimizer = build_partitions(text, settings, "cpu")
    load_resized(buffers, checkpoint)
    for state in optimizer.state.values():
        state["step"].fill_(count)
    fragments = [
        _fragments(buffer, checkpoint.manifest["tensors"]) for buffer in buffers if buffer.name.endswith(".master")
    ]
    return _Share(buffers, optimizer, fragments)


def _fragments(buffer: StateBuffer, tensors: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[int, int]]:
    found: dict[str, tuple[int, int]] = {}
    for span in sorted(buffer.spans, key=lambda s: s.offset):
        start, size = found.get(tensors[span.range.unit]["param"], (span.offset, 0))
        found[tensors[span.range.unit]["param"]] = (start, size + span.range.size)
    return found


def _shapes(
    peers: Sequence[_Share], group: int, degree: int, tensors: Mapping[str, Mapping[str, Any]]
) -> dict[str, tuple[int, ...]]:
    """Of a group's parameters on one rank, in the order in which they lie in the partitions."""
    shapes = {fact["param"]: fact["shape"] for fact in tensors.values()}
    ordered = dict.fromkeys(param for peer in peers for param in peer.fragments[group])
    return {param: (shapes[param][0] // degree, *shapes[param][1:]) for param in ordered}


def _rate(recipe: Recipe, step: int) -> float:
    train = recipe.train
    return learning_rate(
        step,
        peak=train.lr,
        steps=train.steps,
        warmup_steps=train.warmup_steps,
        min_lr_ratio=train.min_lr_ratio,
        schedule=train.schedule,
    )


# -- from DeepSpeed ----------------------------------------------------------------------------------------------------


def import_deepspeed(folder: str, run: str, tag: str | None = None) -> int:
    """Make ``RUN/checkpoints/step-N`` of a folder that DeepSpeed's ``save_checkpoint`` wrote; RUN is no run's yet."""
    from trainer.engine import CHECKPOINT_CLASSES

    read = read_folder(resolve_tag(Path(folder), tag), CHECKPOINT_CLASSES)
    if (Path(run) / "recipe.yaml").exists():
        raise ForeignFolderError(
            f"{run} is a run of ours, which would go on from, or export, what it never trained; give a new folder"
        )
    place = Path(run) / "checkpoints"
    if step_path(place, read.step).exists():
        raise ForeignFolderError(f"{step_path(place, read.step)} exists; give another folder, or remove it")
    path = write_imported(read, place)
    print(f"imported step {read.step} of {read.path} ({len(read.ranks)} ranks, ep {read.ep}) as {path}")
    print(f"a run begins with it by checkpoint.load_from={Path(run)}; DeepSpeed keeps no random streams")
    return 0


def write_imported(read: DeepSpeedFolder, place: Path) -> Path:
    """The folder's state as a checkpoint of ours. Raises DeepSpeedFormatError for what does not fit together."""
    buffers = [state_buffers(read, rank) for rank in range(len(read.ranks))]
    tensors = described_tensors(read)
    _check_weights(read, [buffer for share in buffers for buffer in share], tensors)
    progress = Progress(read.step, int(read.model["global_samples"]), "", [optimizer_step(read)])
    extras = {"progress": progress.dump()}
    sections = {f"dp{rank:04d}": sections_of(share, extras) for rank, share in enumerate(buffers)}
    metadata = {
        "recipe": "",
        "imported_from": str(read.path),
        "deepspeed": str(read.model["ds_version"]),
        "dtype": str(weights_dtype(read)).removeprefix("torch."),
        "optimizer": "AdamW",
    }
    place.mkdir(parents=True, exist_ok=True)
    return Path(str(write_checkpoint(place, read.step, sections, tensors, metadata)))


def _check_weights(read: DeepSpeedFolder, buffers: Sequence[StateBuffer], tensors: Mapping[str, Any]) -> None:
    """The weights in the folder must be the masters' casts: an expert's file of another save is found here."""
    masters = {unit: torch.empty(fact["elements"]) for unit, fact in tensors.items()}
    for buffer in buffers:
        for span in buffer.spans if buffer.name.endswith(".master") else ():
            part = buffer.tensor[span.offset : span.offset + span.range.size]
            masters[span.range.unit][span.range.lo : span.range.hi] = part
    units: dict[tuple[str, int | None], list[str]] = {}
    for unit, fact in tensors.items():
        for name in {(fact["param"], fact["expert"]), (fact["param"], None)}:
            units.setdefault(name, []).append(unit)
    for name, file, weight in saved_weights(read):
        ours = torch.cat([masters[unit] for unit in units[name]]).to(weight.dtype)
        if not torch.equal(ours, weight.reshape(-1)):
            raise ForeignFolderError(f"{file}: {name[0]} is not the cast of its masters; two saves are mixed")
