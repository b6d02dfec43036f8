"""What ``planaria checkpoint`` does to a run's checkpoints: list, verify, compare and remove them (no torch here)."""

from __future__ import annotations

import re
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from checkpointing.audit import audit
from checkpointing.compare import Difference, compare
from checkpointing.heldout import best_of, losses_of
from checkpointing.keeper.control import keeper_status
from checkpointing.keeper.protocol import KeeperError
from checkpointing.manifest import own_manifest, read_manifest
from checkpointing.recovery import RecoveryError
from checkpointing.storage import MANIFEST, UNFINISHED, Place, place_of
from checkpointing.store import (
    Checkpoint,
    best_intact,
    is_permanent,
    list_checkpoints,
    quarantine,
    remove,
    step_folders,
    step_path,
    verify,
)
from trainer.recipe import load_recipe
from trainer.runfolder import checkpoints_of

_MEMORY_ROWS = 8
_STEP = re.compile(r"[0-9]{1,19}")
_NAME = re.compile(r"step-[0-9]+(\.[\w.]+)?")


class CheckpointError(ValueError):
    """What was asked for cannot be done; the message says what and where."""


@dataclass(frozen=True)
class Source:
    """Where checkpoints lie, and the run folder that they belong to if that is known."""

    place: Place
    run: Path | None = None
    permanent_every: int = 0

    @cached_property
    def best(self) -> int | None:
        """The checkpoint with the lowest held-out loss, which retention leaves if it is intact."""
        return best_of(self.losses, [step for step, _ in list_checkpoints(self.place)]) if self.losses else None

    @cached_property
    def losses(self) -> dict[int, float]:
        return losses_of(self.run) if self.run is not None else {}

    def keeper(self) -> tuple[int, dict[str, Any]] | None:
        """The live keeper's pid and status. Raises OSError or KeeperError if it does not answer."""
        return keeper_status(self.run) if self.run is not None else None


def source_of(text: str) -> Source:
    """``text`` is a run folder, or the folder or URL that holds checkpoints. Raises CheckpointError."""
    place = place_of(text)
    if not isinstance(place, Path):
        if not place.is_dir():
            raise CheckpointError(f"{text} does not exist; name a run folder, or a folder or URL of checkpoints")
        return Source(place)
    if (place / "recipe.yaml").is_file():
        recipe = load_recipe(place / "recipe.yaml")
        return Source(checkpoints_of(recipe, place), place, recipe.checkpoint.disk.permanent_every)
    if (place / "checkpoints").is_dir():
        return Source(place / "checkpoints", place)
    if place.is_dir() and step_folders(place):
        return Source(place)
    raise CheckpointError(f"{text} is neither a run folder nor a folder or URL of checkpoints; name one of them")


def split_step(text: str) -> tuple[str, int | None]:
    """``RUN[:STEP]`` as its two parts."""
    head, colon, tail = text.rpartition(":")
    return (head, int(tail)) if colon and head and _STEP.fullmatch(tail) else (text, None)


def chosen(text: str) -> Checkpoint:
    """The checkpoint that ``RUN[:STEP]`` means, by default the newest. Raises CheckpointError."""
    name, step = split_step(text)
    source = source_of(name)
    if step is not None:
        try:
            return Checkpoint.open(step_path(source.place, step))
        except RecoveryError as error:
            raise CheckpointError(f"step {step} of {name} is no checkpoint: {error}") from error
    for number, path in reversed(step_folders(source.place)):
        try:
            return Checkpoint.open(path)
        except RecoveryError as error:
            print(f"step {number} is passed over: {error}", file=sys.stderr)
    raise CheckpointError(f"{source.place} holds no checkpoint; name another run")


# -- ls ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A line of ``ls``."""

    tier: str
    step: str
    nbytes: int | None
    kept: str
    state: str
    age_s: float | None = None


def rows(source: Source, now: float) -> Iterator[Row]:
    """What is on disk, oldest first, then what was set aside or left unfinished."""
    found = step_folders(source.place)
    for step, path in found:
        yield _row(source, step, path, now)
    known = {path.name for _, path in found}
    there: list[Place] = list(source.place.iterdir()) if source.place.is_dir() else []
    for path in sorted(there, key=lambda p: p.name):
        if path.name not in known and _NAME.fullmatch(path.name):
            why = path.name.partition(".")[2]
            state = "unfinished" if why == "tmp" else f"set aside: {why}"
            yield Row("disk", path.name, _bytes_in(path), "", state)


def _row(source: Source, step: int, path: Place, now: float) -> Row:
    try:
        manifest = read_manifest(path)
        kept = "best" if step == source.best else "ephemeral"
        kept = "permanent" if is_permanent(path, step, source.permanent_every) else kept
        checkpoint = Checkpoint(path, manifest)
        state = "whole" if checkpoint.is_whole else "window of the log" if checkpoint.has_log else "of several steps"
        written_at = manifest.get("written_at")
    except (RecoveryError, OSError, ValueError, KeyError) as error:
        return Row("disk", str(step), _bytes_in(path), "", _not_a_checkpoint(path, error))
    nbytes = sum(facts["bytes"] for facts in manifest["files"].values())
    return Row("disk", str(step), nbytes, kept, state, None if written_at is None else max(now - written_at, 0.0))


def _not_a_checkpoint(path: Place, error: Exception) -> str:
    if not path.is_dir():
        return "no checkpoint: it is no folder"
    names = sorted(p.name for p in path.iterdir())
    asides = [name[9:-5] for name in names if re.fullmatch(r"manifest\..+\.json", name)]
    if MANIFEST in names:
        return f"damaged: {error}"
    if asides:
        return f"set aside: {', '.join(asides)}"
    return "unfinished" if UNFINISHED in names else f"no checkpoint: it has no {MANIFEST}"


def _bytes_in(folder: Place) -> int | None:
    try:
        return sum(path.stat().st_size for path in folder.iterdir())
    except OSError:
        return None


def memory_rows(status: dict[str, Any]) -> list[Row]:
    """The newest steps that a live keeper holds sealed, oldest first."""
    held = {coordinate: set(keep["steps"]) for coordinate, keep in sorted(status["keeps"].items())}
    found = []
    for step in sorted(set().union(*held.values()))[-_MEMORY_ROWS:]:
        on = [coordinate for coordinate, steps in held.items() if step in steps]
        found.append(
            Row("memory", str(step), None, "", "sealed" if len(on) == len(held) else f"on {', '.join(on)} only")
        )
    return found


def ls(run: str) -> int:
    source = source_of(run)
    lines, notes = list(rows(source, time.time())), []
    try:
        keeper = source.keeper()
    except (KeeperError, OSError) as error:
        keeper, notes = None, [f"the keeper does not answer: {error}"]
    if keeper is not None:
        pid, status = keeper
        lines += memory_rows(status)
        notes.append(f"keeper {pid} is alive")
        disk = status.get("disk", {})
        if disk.get("problem"):
            notes.append(f"its last write failed: {disk['problem']}")
        if disk.get("writing"):
            notes.append(_progress(disk["writing"]))
    print(source.place)
    print("\n".join(_table(lines) if lines else [_nothing(source)]))
    for note in notes:
        print(note)
    return 0


def _nothing(source: Source) -> str:
    """Nothing lies in a place that does not exist either, and that is where a mistyped one leads."""
    if source.place.is_dir():
        return "no checkpoints"
    return "no checkpoints: the place does not exist; its first checkpoint makes it, if it is not mistyped"


def _progress(writing: dict[str, Any]) -> str:
    hung = ", and it hangs" if writing["hung"] else ""
    return (
        f"it has been writing step {writing['step']} for {writing['seconds']:.0f} s: "
        f"{size(writing['written'])} of {size(writing['total'])}{hung}"
    )


def _table(lines: Sequence[Row]) -> list[str]:
    cells = [("step", "size", "kept", "tier", "age", "state")]
    for row in lines:
        nbytes = "" if row.nbytes is None else size(row.nbytes)
        cells.append((row.step, nbytes, row.kept, row.tier, "" if row.age_s is None else age(row.age_s), row.state))
    widths = [max(len(cell[i]) for cell in cells) for i in range(6)]
    right = (True, True, False, False, True, False)
    return [
        "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(cell, widths, right, strict=True)).rstrip()
        for cell in cells
    ]


def size(nbytes: int) -> str:
    value, units = float(nbytes), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:.0f} {units[0]}" if units[0] == "B" else f"{value:.1f} {units[0]}"


def age(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


# -- verify ------------------------------------------------------------------------------------------------------------


def verify_all(run: str, step: int | None, set_aside: bool) -> int:
    """Read back every byte. Returns 1 if something is not what was written."""
    source = source_of(run)
    found = [(s, path) for s, path in step_folders(source.place) if step in (None, s)]
    if not found:
        raise CheckpointError(f"{source.place} has no step {step}" if step is not None else f"{source.place} is empty")
    damaged = 0
    for number, path in found:
        started = time.perf_counter()
        problems = audit(path)
        if problems:
            damaged += 1
            print(f"step {number}: damaged\n  " + "\n  ".join(problems))
            if set_aside and (moved := quarantine(path)) is not None:
                print(f"  set aside as {moved}")
            continue
        nbytes = sum(facts["bytes"] for facts in own_manifest(path)["files"].values())
        seconds = time.perf_counter() - started
        print(f"step {number}: every byte is what was written ({size(nbytes)} in {seconds:.1f} s)")
    return 1 if damaged else 0


# -- diff --------------------------------------------------------------------------------------------------------------


def diff(ours: str, theirs: str, show_equal: bool) -> int:
    """Print what differs. Returns 1 if something does."""
    left, right = chosen(ours), chosen(theirs)
    print(f"A: {left.path}\nB: {right.path}")
    with tempfile.TemporaryDirectory(prefix="planaria-diff-") as scratch:
        return _print_differences(
            _made_whole(left, Path(scratch, "a")), _made_whole(right, Path(scratch, "b")), show_equal
        )


def _made_whole(checkpoint: Checkpoint, scratch: Path) -> Checkpoint:
    if not checkpoint.has_log:
        return checkpoint
    # Redo needs torch; whole checkpoints are compared without.
    from checkpointing.materialise import whole

    return whole(checkpoint, scratch)


def _print_differences(left: Checkpoint, right: Checkpoint, show_equal: bool) -> int:
    equal = different = 0
    for found in compare(left, right):
        equal, different = equal + found.equal, different + (not found.equal)
        if show_equal or not found.equal:
            print(_described(found))
    if left.manifest["coordinates"] != right.manifest["coordinates"]:
        print("written by other workers: random streams and progress were not compared")
    print(f"{equal} equal, {different} different")
    return 1 if different else 0


def _described(found: Difference) -> str:
    words = list(found.notes)
    if found.different:
        words.insert(0, f"max abs difference {found.largest:.6g}, {found.different:,} of {found.elements:,} elements")
    return f"{found.name}  {'; '.join(words) or 'equal'}"


# -- rm ----------------------------------------------------------------------------------------------------------------


def rm(run: str, names: Sequence[str], force: bool) -> int:
    """Remove checkpoints, or folders that were set aside or left unfinished.

    Raises CheckpointError, removing nothing, if one is unknown, being written, permanent, the one with the lowest
    held-out loss, or the newest that verifies.
    """
    source = source_of(run)
    folders = [_named(source, name) for name in dict.fromkeys(names)]
    if not force:
        _refuse_unfinished(source, folders)
        _refuse_precious(source, folders)
    for folder in folders:
        nbytes = _bytes_in(folder)
        remove(folder)
        if folder.exists():
            raise CheckpointError(f"{folder} cannot be removed whole; see who owns it, and remove the rest by hand")
        print(f"removed {folder}" + ("" if nbytes is None else f" ({size(nbytes)})"))
    return 0


def _named(source: Source, name: str) -> Place:
    text = f"step-{int(name)}" if _STEP.fullmatch(name) else name
    if not _NAME.fullmatch(text):
        raise CheckpointError(f"{name!r} is no step and no folder of one; write e.g. 40 or step-40.corrupt")
    folder = source.place / text
    if not folder.is_dir():
        there = ", ".join(p.name for _, p in step_folders(source.place)) or "none"
        raise CheckpointError(f"{folder} does not exist; steps there: {there}")
    return folder


def _refuse_unfinished(source: Source, folders: Sequence[Place]) -> None:
    try:
        keeper = source.keeper()
    except (KeeperError, OSError) as error:
        raise CheckpointError(
            f"the keeper of {source.run} does not answer, and may be writing: {error}; add --force to remove it"
        ) from error
    writing = None if keeper is None else keeper[1]["writing"]
    for folder in folders:
        if writing is not None and folder.name in (f"step-{writing}", f"step-{writing}.tmp"):
            raise CheckpointError(f"{folder} is being written by the keeper; wait for it")


def _refuse_precious(source: Source, folders: Sequence[Place]) -> None:
    named = {folder.name for folder in folders}
    evaluated = any(path.name in named and step in source.losses for step, path in step_folders(source.place))
    best = best_intact(source.place, source.losses) if evaluated else None
    for step, path in step_folders(source.place):
        try:
            permanent = path.name in named and is_permanent(path, step, source.permanent_every)
        except RecoveryError:
            continue
        if permanent:
            raise CheckpointError(f"{path} is permanent; add --force to remove it all the same")
        if path.name in named and step == best:
            raise CheckpointError(
                f"{path} has the lowest held-out loss of the run's checkpoints; add --force to remove it all the same"
            )
    for _, path in reversed(step_folders(source.place)):
        if not verify(path):
            if path.name in named:
                raise CheckpointError(
                    f"{path} is the newest checkpoint that verifies, what the run would resume from; add --force to "
                    "remove it all the same"
                )
            return
