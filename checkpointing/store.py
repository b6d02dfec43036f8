"""The disk tier: checkpoints that exist if and only if their manifest, written last, verifies.

checkpoints/step-12/dp0000.safetensors   one file per worker coordinate; keys do not depend on ranks
checkpoints/step-12/dp0000.experts-8.safetensors   mode pec: experts first written with step 8, shared with step-8
checkpoints/step-12/manifest.json        sizes, checksums and what wrote them
checkpoints/latest                       a hint for people; never trusted

The folder may be local or behind any fsspec URL; what differs between the two is in :mod:`checkpointing.storage`.
Whatever reads from a URL may raise UnreachableError: a store that does not answer says nothing about its checkpoints.
"""

from __future__ import annotations

import contextlib
import errno
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from checkpointing.heldout import best_of
from checkpointing.manifest import coordinate_of, make_manifest, own_manifest, read_manifest, wrong_sizes
from checkpointing.records import DTYPE_BYTES, Entry, Kind, RecordInfo
from checkpointing.recovery import RecoveryError
from checkpointing.remote import UnreachableError
from checkpointing.schedule import WHOLE, Rules
from checkpointing.storage import MANIFEST, Place, Storage, storage_of
from checkpointing.tensorfile import (
    Section,
    Written,
    checksum_file,
    damaged_tensors,
    read_bytes,
    read_entries,
    write_tensors,
)
from checkpointing.units import Range, overlaps

_STEP = re.compile(r"step-([0-9]+)")
_KINDS = {"extras": Kind.EXTRAS, "grad": Kind.LOG, "meta": Kind.LOG}


def step_path(directory: Place, step: int) -> Place:
    return directory / f"step-{step}"


def write_checkpoint(
    directory: Place,
    step: int,
    parts: Mapping[str, Sequence[Section]],
    tensors: Mapping[str, Any],
    metadata: Mapping[str, Any],
    progress: Callable[[int, int], None] = lambda written, total: None,
    described: Mapping[str, str] | None = None,
    carried: Mapping[str, tuple[Place, Written]] | None = None,
) -> Place:
    """Write and commit ``step-N``: files, then the manifest, then the hint. Local ones are fsynced and renamed.

    Args:
        parts: for each coordinate its base and extras records; more for ``COORDINATE.experts-STEP``.
        carried: files of older checkpoints that this one shares, by name.
        tensors: ``{unit: {param, shape, dtype}}`` of the whole model.
        described: for each coordinate how its partitions lie, needed to redo the log of a window.
        progress: called with (payload bytes written, payload bytes in all) after each piece.
    Raises OSError as the disk gives it, also if there is too little room for it; the unfinished folder is then removed.
    An earlier folder of the same step that does not verify is quarantined.
    """
    storage, final = storage_of(directory), step_path(directory, step)
    total = sum(e.nbytes for records in parts.values() for part in records for e in part.entries)
    written = 0

    def advanced(nbytes: int) -> None:
        nonlocal written
        written += nbytes
        progress(written, total)

    work = storage.begin(final)
    try:
        _check_room(storage, directory, total)
        files = {}
        for coordinate, records in sorted(parts.items()):
            name = f"{coordinate}.safetensors"
            facts = {"step": str(step), "coordinate": coordinate}
            if described is not None and coordinate in described:
                facts["partitions"] = described[coordinate]
            files[name] = write_tensors(work / name, records, facts, advanced)
        for name, (source, facts_of_file) in (carried or {}).items():
            storage.share(source, work / name)
            files[name] = facts_of_file
        manifest = make_manifest(step, files, tensors, metadata)
        storage.commit(work, final, json.dumps(manifest, indent=1).encode())
    except BaseException:
        storage.abort(work)
        raise
    # The checkpoint is committed: a hint that cannot be written takes nothing from it.
    with contextlib.suppress(OSError):
        storage.hint(directory, f"{final.name}\n")
    return final


def _check_room(storage: Storage, directory: Place, needed: int) -> None:
    free = storage.free_bytes(directory)
    if free is not None and free < needed:
        raise OSError(errno.ENOSPC, f"the checkpoint has {needed:,} bytes, and {free:,} are free", str(directory))


def list_checkpoints(directory: Place) -> list[tuple[int, Place]]:
    """Committed checkpoints, oldest first: those whose manifest matches itself and the sizes of the files."""
    found = []
    for step, path in step_folders(directory):
        try:
            read_manifest(path)
        except RecoveryError:
            continue
        found.append((step, path))
    return found


def step_folders(directory: Place) -> list[tuple[int, Place]]:
    """All folders named ``step-N``, oldest first, be they checkpoints or not. Raises OSError."""
    paths = directory.iterdir() if directory.is_dir() else ()
    return sorted(((int(m[1]), p) for p in paths if (m := _STEP.fullmatch(p.name))), key=lambda pair: pair[0])


def verify(step_dir: Place, coordinates: Sequence[str] | None = None) -> list[str]:
    """Problems, each naming a file and if possible a tensor; empty if every byte (of these coordinates' files) is what
    was written."""
    try:
        manifest = own_manifest(step_dir)
    except RecoveryError as error:
        return [str(error)]
    problems = wrong_sizes(step_dir, manifest)
    for name, facts in manifest["files"].items():
        if name in problems or (coordinates is not None and coordinate_of(name) not in coordinates):
            continue
        try:
            found = checksum_file(step_dir / name)
            if (found.nbytes, found.xxh3_128) != (facts["bytes"], facts["xxh3_128"]):
                problems[name] = f"{step_dir / name}: {_diagnosis(step_dir / name, found, manifest)}"
        except UnreachableError:
            raise
        except OSError as error:
            problems[name] = f"{step_dir / name}: {error}"
    return list(problems.values())


def _diagnosis(path: Place, found: Written, manifest: Mapping[str, Any]) -> str:
    twins = [name for name, facts in manifest["files"].items() if facts["xxh3_128"] == found.xxh3_128]
    if twins:
        return f"holds the bytes of {twins[0]}: files were exchanged"
    names = damaged_tensors(path, manifest["files"][path.name].get("tensors", ""))
    which = f" (damaged: {', '.join(names[:3])}{' and others' if len(names) > 3 else ''})" if names else ""
    return f"its bytes do not match the checksum in {MANIFEST}{which}"


def quarantine(step_dir: Place) -> Place | None:
    """Set a damaged checkpoint aside as ``step-N.corrupt``, never deleted."""
    return set_aside(step_dir, "corrupt")


def set_aside(step_dir: Place, why: str) -> Place | None:
    """Rename to ``step-N.why``, or with a number behind it; None if the folder is gone, be it by another process.

    On an object store it keeps its name, and the manifest becomes ``manifest.why.json``.
    """
    moved: Place | None = storage_of(step_dir).set_aside(step_dir, why)
    return moved


def abandon_newer(directory: Place, step: int) -> list[Place]:
    """Set all checkpoints newer than ``step`` aside as ``step-N.abandoned``: they are of a course not taken again.

    Left in place they would count as the newest, and retention would delete the new course's instead.
    """
    newer = [path for found, path in step_folders(directory) if found > step]
    return [moved for path in newer if (moved := set_aside(path, "abandoned")) is not None]


def clean_unfinished(directory: Place) -> None:
    """Remove what a killed writer left. Only for the process that holds the keeper's lock."""
    storage_of(directory).clean(directory)


def retain(
    directory: Place, keep_last: int, newest: Place, permanent_every: int = 0, losses: Mapping[int, float] | None = None
) -> list[int]:
    """Delete checkpoints older than the ``keep_last`` newest and return their steps.

    Never those whose step is a multiple of ``permanent_every`` (0: none is), nor those written as permanent ones, nor
    the intact one with the lowest of the held-out ``losses``.
    Raises RecoveryError, deleting nothing, unless ``newest`` was read back and verified just now.
    """
    problems = verify(newest)
    if problems:
        raise RecoveryError(f"nothing was deleted, because the newest checkpoint does not read back: {problems[0]}")
    found, losses = list_checkpoints(directory), losses or {}
    leaving = {
        step: path
        for step, path in found[: -max(keep_last, 1)]
        if path != newest and not is_permanent(path, step, permanent_every)
    }
    best = best_of(losses, [step for step, _ in found])
    if any(step in losses for step in leaving.keys() - {best}):  # else it is kept unread, and costs no other its place
        best = best_intact(directory, losses)
    removed = [step for step in leaving if step != best]
    for step in removed:
        remove(leaving[step])
    return removed


def best_intact(directory: Place, losses: Mapping[int, float]) -> int | None:
    """The checkpoint with the lowest of ``losses`` of which every byte verifies; None if there is none."""
    steps = dict(list_checkpoints(directory))
    while (best := best_of(losses, steps)) is not None and verify(steps[best]):
        del steps[best]
    return best


def is_permanent(step_dir: Place, step: int, permanent_every: int = 0) -> bool:
    """Whether retention must leave it: by the present rule, or by the one that it was written under."""
    by_rule = bool(permanent_every) and step % permanent_every == 0
    return by_rule or bool(own_manifest(step_dir)["metadata"].get("permanent"))


def remove(step_dir: Place) -> None:
    storage_of(step_dir).remove(step_dir)


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint, opened for reading."""

    path: Place
    manifest: dict[str, Any]

    @classmethod
    def open(cls, step_dir: Place) -> Checkpoint:
        """Raises RecoveryError if it is not committed. Payload bytes are verified by :func:`verify`, not here."""
        return cls(step_dir, read_manifest(step_dir))

    @property
    def step(self) -> int:
        return int(self.manifest["step"])

    @cached_property
    def records(self) -> tuple[RecordInfo, ...]:
        """For each coordinate a base and an extras record, and those of other steps if it is a window or has older
        experts. Entries' offsets count from the start of the file, whose number among its coordinate's is ``slot``."""
        found = []
        for coordinate in self.manifest["coordinates"]:
            for slot in range(-1, len(self._files[coordinate]) - 1):
                grouped: dict[tuple[int, Kind], list[Entry]] = {}
                if slot < 0:
                    grouped = {(self.step, Kind.BASE): [], (self.step, Kind.EXTRAS): []}
                for stored in read_entries(self.file_of(coordinate, slot)):
                    step = self.step if stored.step is None else stored.step
                    grouped.setdefault((step, _KINDS.get(stored.entry.range.kind, Kind.BASE)), []).append(stored.entry)
                found += [
                    RecordInfo(coordinate, kind, step, 0, 0, tuple(entries), slot)
                    for (step, kind), entries in grouped.items()
                ]
        return tuple(found)

    @property
    def rules(self) -> Rules:
        """How its records belong together."""
        return Rules(fresh=1) if self.manifest["metadata"].get("lossy") else WHOLE

    @cached_property
    def _files(self) -> dict[str, list[str]]:
        """Names by coordinate; the one that holds its extras first."""
        files: dict[str, list[str]] = {coordinate: [] for coordinate in self.manifest["coordinates"]}
        for name in sorted(self.manifest["files"], key=lambda name: (len(name), name)):
            files.get(coordinate_of(name), []).append(name)
        return files

    @property
    def is_whole(self) -> bool:
        """Whether all state in it is of its own step; if not, it has a log to re-apply, or older experts."""
        return all(record.step == self.step for record in self.newest)

    def file_of(self, coordinate: str, slot: int = -1) -> Place:
        """The file that a record of this ``slot`` is in."""
        return self.path / self._files[coordinate][slot + 1]

    @cached_property
    def newest(self) -> tuple[RecordInfo, ...]:
        """Its bases without what a newer one in it replaces: every range of state once."""
        places = {(held, path, entry.offset) for held, (path, entry) in self._held.items()}
        bases = []
        for record in self.records:
            path = self.file_of(record.source, record.slot)
            entries = tuple(e for e in record.entries if (e.range, path, e.offset) in places)
            if record.kind is Kind.BASE and entries:
                bases.append(replace(record, entries=entries))
        return tuple(bases)

    @cached_property
    def _held(self) -> dict[Range, tuple[Place, Entry]]:
        bases = sorted((r for r in self.records if r.kind is Kind.BASE), key=lambda r: r.step)  # the newest counts
        return {e.range: (self.file_of(r.source, r.slot), e) for r in bases for e in r.entries}

    @property
    def entries(self) -> tuple[Range, ...]:
        """Every range of state, sorted."""
        return tuple(sorted(self._held))

    def read(self, wanted: Range) -> np.ndarray:
        """One stored range as a 1-D array; bfloat16 comes as the uint16 that holds its bits. Raises RecoveryError."""
        if wanted not in self._held:
            raise RecoveryError(f"{self.path} does not hold {wanted}")
        return self.read_part(wanted, wanted.lo, wanted.hi)

    def read_part(self, held: Range, lo: int, hi: int) -> np.ndarray:
        """Elements ``[lo:hi)`` of a stored range, as :meth:`read` gives them."""
        path, entry = self._held[held]
        size = DTYPE_BYTES[entry.dtype]
        data = read_bytes(path, entry.offset + (lo - held.lo) * size, (hi - lo) * size)
        return np.frombuffer(data, dtype="uint16" if entry.dtype == "bfloat16" else entry.dtype)

    def dtype_of(self, held: Range) -> str:
        """As torch spells it."""
        return self._held[held][1].dtype

    @property
    def has_log(self) -> bool:
        """Whether gradients are in it, to be re-applied before anybody can tell its state."""
        return any(record.kind is Kind.LOG for record in self.records)

    def extras(self, coordinate: str) -> dict[str, bytes]:
        record = next(r for r in self.records if r.kind is Kind.EXTRAS and r.source == coordinate)
        path = self.file_of(coordinate)
        return {e.range.unit: bytes(read_bytes(path, e.offset, e.nbytes)) for e in record.entries}

    def assemble(self, unit: str, kind: str) -> np.ndarray:
        """The whole of one kind of state of a unit, flat, from all its ranges: each element exactly once.

        Raises RecoveryError naming the unit (layer, expert and tensor) if an element is absent or held twice.
        """
        parts = self._parts.get((unit, kind), [])
        if not parts:
            raise RecoveryError(f"{self.path} holds nothing of {unit}#{kind}")
        twice = overlaps(parts)
        if twice:
            raise RecoveryError(f"{self.path} holds {twice[0]} twice")
        at = 0
        for part in parts:
            if part.lo != at:
                raise RecoveryError(f"{self.path} lacks {Range(unit, kind, at, part.lo)}")
            at = part.hi
        expected = self.manifest["tensors"].get(unit, {}).get("elements", at)
        if expected != at:
            raise RecoveryError(f"{self.path} lacks {Range(unit, kind, at, max(at, expected))}")
        return np.concatenate([self.read(part) for part in parts])

    @cached_property
    def _parts(self) -> dict[tuple[str, str], list[Range]]:
        grouped: dict[tuple[str, str], list[Range]] = {}
        for held in self.entries:
            grouped.setdefault(held.key, []).append(held)
        return grouped
