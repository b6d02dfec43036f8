"""The disk tier: checkpoints that exist if and only if their manifest, written last, verifies.

checkpoints/step-12/dp0000.safetensors   one file per worker coordinate; keys do not depend on ranks
checkpoints/step-12/dp0000.experts-8.safetensors   mode pec: experts first written with step 8, shared with step-8
checkpoints/step-12/manifest.json        sizes, checksums and what wrote them
checkpoints/latest                       a hint for people; never trusted
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from xxhash import xxh3_128_hexdigest

from checkpointing.records import DTYPE_BYTES, Entry, Kind, RecordInfo
from checkpointing.recovery import RecoveryError
from checkpointing.schedule import WHOLE, Rules
from checkpointing.tensorfile import Section, Written, checksum_file, read_entries, write_tensors
from checkpointing.units import Range, overlaps

FORMAT = 1
MANIFEST = "manifest.json"
_STEP = re.compile(r"step-(\d+)")
_NO_LINKS = (errno.EPERM, errno.EXDEV, errno.EMLINK, errno.ENOTSUP, errno.ENOSYS)
_KINDS = {"extras": Kind.EXTRAS, "grad": Kind.LOG, "meta": Kind.LOG}


def step_path(directory: Path, step: int) -> Path:
    return directory / f"step-{step}"


def write_checkpoint(
    directory: Path,
    step: int,
    parts: Mapping[str, Sequence[Section]],
    tensors: Mapping[str, Any],
    metadata: Mapping[str, Any],
    progress: Callable[[int, int], None] = lambda written, total: None,
    described: Mapping[str, str] | None = None,
    carried: Mapping[str, tuple[Path, Written]] | None = None,
) -> Path:
    """Write and commit ``step-N``: files, fsync, manifest, fsync, rename, fsync of the parent, then the hint.

    Args:
        parts: for each coordinate its base and extras records; more for ``COORDINATE.experts-STEP``.
        carried: files of older checkpoints that this one shares, by name.
        tensors: ``{unit: {param, shape, dtype}}`` of the whole model.
        described: for each coordinate how its partitions lie, needed to redo the log of a window.
        progress: called with (payload bytes written, payload bytes in all) after each piece.
    Raises OSError as the disk gives it; the unfinished folder is then removed. An earlier folder of the same step that
    does not verify is quarantined.
    """
    final, work = step_path(directory, step), directory / f"step-{step}.tmp"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    total = sum(e.nbytes for records in parts.values() for part in records for e in part.entries)
    written = 0

    def advanced(nbytes: int) -> None:
        nonlocal written
        written += nbytes
        progress(written, total)

    try:
        files = {}
        for coordinate, records in sorted(parts.items()):
            name = f"{coordinate}.safetensors"
            facts = {"step": str(step), "coordinate": coordinate}
            if described is not None and coordinate in described:
                facts["partitions"] = described[coordinate]
            files[name] = write_tensors(work / name, records, facts, advanced)
        for name, (source, facts_of_file) in (carried or {}).items():
            link_file(source, work / name)
            files[name] = facts_of_file
        manifest = _manifest(step, sorted({coordinate_of(name) for name in files}), files, tensors, metadata)
        _write_durably(work / MANIFEST, json.dumps(manifest, indent=1).encode())
        _fsync_folder(work)
        if final.exists():
            quarantine(final)
        work.rename(final)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    _fsync_folder(directory)
    # The checkpoint is committed: a hint that cannot be written takes nothing from it.
    with contextlib.suppress(OSError):
        _write_durably(directory / "latest.tmp", f"{final.name}\n".encode())
        (directory / "latest.tmp").rename(directory / "latest")
    return final


def coordinate_of(name: str) -> str:
    """Of a file of a checkpoint."""
    return name.partition(".")[0]


def link_file(source: Path, target: Path) -> None:
    """Have a file in a second folder, too: as a hard link, or as a copy where the file system has none."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        shutil.copyfile(source, target)
        with target.open("rb") as file:
            os.fsync(file.fileno())


def _manifest(
    step: int,
    coordinates: Sequence[str],
    files: Mapping[str, Written],
    tensors: Mapping[str, Any],
    metadata: Mapping[str, Any],
) -> dict[str, Any]:
    manifest = {
        "format": FORMAT,
        "step": step,
        "coordinates": list(coordinates),
        "files": {name: {"bytes": w.nbytes, "xxh3_128": w.xxh3_128} for name, w in files.items()},
        "metadata": dict(metadata),
        "tensors": dict(tensors),
    }
    return manifest | {"checksum": _manifest_checksum(manifest)}


def _manifest_checksum(manifest: Mapping[str, Any]) -> str:
    body = {key: value for key, value in manifest.items() if key != "checksum"}
    return xxh3_128_hexdigest(json.dumps(body, sort_keys=True, separators=(",", ":")).encode())


def _write_durably(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _fsync_folder(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def read_manifest(step_dir: Path) -> dict[str, Any]:
    """The manifest, if it matches itself and all files have its sizes. Raises RecoveryError naming the file."""
    path = step_dir / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise RecoveryError(f"{path}: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("checksum") != _manifest_checksum(manifest):
        raise RecoveryError(f"{path}: does not match its own checksum")
    if manifest["format"] != FORMAT or f"step-{manifest['step']}" != step_dir.name:
        raise RecoveryError(f"{path}: holds format {manifest['format']} of step {manifest['step']}")
    for name, facts in manifest["files"].items():
        try:
            size = (step_dir / name).stat().st_size
        except OSError as error:
            raise RecoveryError(f"{step_dir / name}: {error.strerror}") from error
        if size != facts["bytes"]:
            raise RecoveryError(f"{step_dir / name}: {size:,} bytes, the manifest says {facts['bytes']:,}")
    return manifest


def list_checkpoints(directory: Path) -> list[tuple[int, Path]]:
    """Committed checkpoints, oldest first: those whose manifest matches itself and the sizes of the files."""
    found = []
    for step, path in _folders(directory):
        try:
            read_manifest(path)
        except RecoveryError:
            continue
        found.append((step, path))
    return found


def _folders(directory: Path) -> list[tuple[int, Path]]:
    paths = directory.iterdir() if directory.is_dir() else ()
    return sorted((int(m[1]), p) for p in paths if (m := _STEP.fullmatch(p.name)))


def verify(step_dir: Path, coordinates: Sequence[str] | None = None) -> list[str]:
    """Problems, each naming a file; empty if every byte (of these coordinates' files) is what was written."""
    try:
        manifest = read_manifest(step_dir)
    except RecoveryError as error:
        return [str(error)]
    problems = []
    for name, facts in manifest["files"].items():
        if coordinates is not None and coordinate_of(name) not in coordinates:
            continue
        try:
            found = checksum_file(step_dir / name)
        except OSError as error:
            problems.append(f"{step_dir / name}: {error}")
            continue
        if found != Written(facts["bytes"], facts["xxh3_128"]):
            problems.append(f"{step_dir / name}: its bytes do not match the checksum in {MANIFEST}")
    return problems


def quarantine(step_dir: Path) -> Path | None:
    """Set a damaged checkpoint aside as ``step-N.corrupt``, never deleted."""
    return set_aside(step_dir, "corrupt")


def set_aside(step_dir: Path, why: str) -> Path | None:
    """Rename to ``step-N.why``, or with a number behind it; None if the folder is gone, be it by another process."""
    target, count = step_dir.with_name(f"{step_dir.name}.{why}"), 1
    while target.exists():
        count += 1
        target = step_dir.with_name(f"{step_dir.name}.{why}{count}")
    try:
        step_dir.rename(target)
    except FileNotFoundError:
        return None
    return target


def abandon_newer(directory: Path, step: int) -> list[Path]:
    """Set all checkpoints newer than ``step`` aside as ``step-N.abandoned``: they are of a course not taken again.

    Left in place they would count as the newest, and retention would delete the new course's instead.
    """
    newer = [path for found, path in _folders(directory) if found > step]
    return [moved for path in newer if (moved := set_aside(path, "abandoned")) is not None]


def clean_unfinished(directory: Path) -> None:
    """Remove what a killed writer left. Only for the process that holds the keeper's lock."""
    for path in directory.glob("step-*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


def retain(directory: Path, keep_last: int, newest: Path) -> list[int]:
    """Delete checkpoints older than the ``keep_last`` newest and return their steps.

    Raises RecoveryError, deleting nothing, unless ``newest`` was read back and verified just now.
    """
    problems = verify(newest)
    if problems:
        raise RecoveryError(f"nothing was deleted, because the newest checkpoint does not read back: {problems[0]}")
    removed = []
    for step, path in list_checkpoints(directory)[: -max(keep_last, 1)]:
        if path == newest:
            continue
        # Without its manifest it no longer exists, so a kill in the middle leaves nothing half valid.
        (path / MANIFEST).unlink()
        shutil.rmtree(path, ignore_errors=True)
        removed.append(step)
    return removed


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint, opened for reading."""

    path: Path
    manifest: dict[str, Any]

    @classmethod
    def open(cls, step_dir: Path) -> Checkpoint:
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
            files[coordinate_of(name)].append(name)
        return files

    @property
    def is_whole(self) -> bool:
        """Whether nothing must be done to it first; if not, it is a window whose log must be re-applied."""
        return not any(record.kind is Kind.LOG for record in self.records)

    def file_of(self, coordinate: str, slot: int = -1) -> Path:
        """The file that a record of this ``slot`` is in."""
        return self.path / self._files[coordinate][slot + 1]

    @cached_property
    def _held(self) -> dict[Range, tuple[Path, Entry]]:
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
        path, entry = self._held[wanted]
        dtype = "uint16" if entry.dtype == "bfloat16" else entry.dtype
        return np.fromfile(path, dtype=dtype, count=entry.nbytes // DTYPE_BYTES[entry.dtype], offset=entry.offset)

    def extras(self, coordinate: str) -> dict[str, bytes]:
        record = next(r for r in self.records if r.kind is Kind.EXTRAS and r.source == coordinate)
        with self.file_of(coordinate).open("rb") as file:
            return {e.range.unit: os.pread(file.fileno(), e.nbytes, e.offset) for e in record.entries}

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
