"""A run's folder: which recipe it belongs to, and how often it was started."""

from __future__ import annotations

import difflib
import fcntl
import os
import time
from pathlib import Path
from typing import TextIO

from checkpointing.remote import UnreachableError
from checkpointing.storage import Place, place_of
from checkpointing.store import Checkpoint, list_checkpoints
from trainer.events import read_events
from trainer.recipe import RecipeError, load_recipe, recipe_fingerprint, recipe_to_yaml
from trainer.schema import Recipe


def run_folder(recipe: Recipe) -> Path:
    return Path(recipe.log.dir) / recipe.log.run


def checkpoints_of(recipe: Recipe, run_dir: Path) -> Place:
    """Where this run's checkpoints lie."""
    url = recipe.checkpoint.disk.url
    return run_dir / "checkpoints" if url is None else place_of(url)


def claim(recipe: Recipe) -> Path:
    """Write the recipe into the run's folder, or check that the folder belongs to this very recipe. Call it locked.

    Settings that cannot change the run's bits may differ, and are written down anew. Raises RecipeError with a diff if
    the folder belongs to another recipe: resuming it would silently change the run.
    """
    folder = run_folder(recipe)
    written = folder / "recipe.yaml"
    text = recipe_to_yaml(recipe)
    if written.exists():
        before = written.read_text()
        if recipe_fingerprint(load_recipe(written)) != recipe_fingerprint(recipe):
            diff = "\n".join(
                difflib.unified_diff(before.splitlines(), text.splitlines(), str(written), "now", lineterm="")
            )
            raise RecipeError(
                [f"{written}: this run folder belongs to another recipe; give log.run=NAME or remove it\n{diff}"]
            )
        if before == text:
            return folder
    temporary = folder / f".recipe.{os.getpid()}"
    temporary.write_text(text)
    temporary.rename(written)
    return folder


def check_place(recipe: Recipe) -> None:
    """Raises RecipeError if ``checkpoint.disk.url`` holds checkpoints of another recipe, which would be removed.

    Or if it does not answer at the run's first start: it may be mistyped, and no memory makes up for it. Later that is
    left for the recovery to report.
    """
    if recipe.checkpoint.disk.url is None:
        return
    folder, ours = run_folder(recipe), recipe_fingerprint(recipe)
    try:
        found = [Checkpoint.open(path) for _, path in list_checkpoints(checkpoints_of(recipe, folder))]
    except UnreachableError as error:
        if next_attempt(folder):
            return
        raise RecipeError(
            [
                f"checkpoint.disk.url: {error.filename} cannot be read: {error.strerror}; going on without it could "
                "cost what it holds: correct it, or have it answer"
            ]
        ) from error
    for checkpoint in found:
        theirs = checkpoint.manifest["metadata"].get("recipe")
        if theirs != ours:
            raise RecipeError(
                [
                    f"checkpoint.disk.url: {checkpoint.path} was written by a run of recipe {theirs}, this is {ours}; "
                    "give this run a place of its own"
                ]
            )


def lock(folder: Path, patience_s: float = 10.0) -> TextIO:
    """Held by rank 0 for as long as it lives, so that no two jobs train in one folder.

    Waits a little: the worker of the attempt before may still be dying. Raises RecipeError naming the holder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / "run.lock").open("a+")
    deadline = time.monotonic() + patience_s
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > deadline:
                file.seek(0)
                holder = file.read().strip()
                raise RecipeError(
                    [f"{folder} is being trained by process {holder}; stop it, or give log.run=NAME"]
                ) from None
            time.sleep(0.1)
    file.truncate(0)  # append mode: the holder's number starts the file
    file.write(f"{os.getpid()}\n")
    file.flush()
    return file


def next_attempt(folder: Path) -> int:
    """How many times rank 0 has started in this folder; the number of the attempt that is starting now."""
    return sum(1 for row in read_events(folder) if row["kind"] == "start" and row["rank"] == 0)
