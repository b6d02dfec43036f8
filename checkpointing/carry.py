"""Which experts a checkpoint on disk holds anew in mode ``pec``, and which files it shares with an older one.

Each ``step-N`` folder is complete by itself: experts that are not written are in files of the older folder, linked into
the new one. A file of experts says of each the step it is of; the newest copy in a folder counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from checkpointing.manifest import read_manifest
from checkpointing.records import Kind
from checkpointing.recovery import RecoveryError
from checkpointing.storage import Place
from checkpointing.store import list_checkpoints
from checkpointing.tensorfile import Section, Written, checksum_file, read_entries
from checkpointing.units import Range

Files = dict[str, list[Section]]
Shared = dict[str, tuple[Place, Written]]


@dataclass(frozen=True)
class Selection:
    """Of one coordinate: its first ``fresh`` parts are no expert's; ``anew`` are the parts to write, None for all."""

    fresh: int
    anew: Sequence[int] | None


@dataclass(frozen=True)
class Part:
    """A sealed record to write."""

    kind: Kind
    step: int
    parts: tuple[int, ...]
    section: Section


@dataclass(frozen=True)
class Older:
    """The checkpoint before, whose experts may be shared."""

    path: Place
    manifest: dict[str, Any]

    @classmethod
    def find(cls, directory: Place, before: int, recipe: str) -> Older | None:
        """The newest one of this recipe older than step ``before``."""
        for step, path in reversed(list_checkpoints(directory)):
            if step < before:
                manifest = read_manifest(path)
                return cls(path, manifest) if manifest["metadata"].get("recipe") == recipe else None
        return None

    @cached_property
    def _held(self) -> dict[str, dict[Range, tuple[int, str]]]:
        """For each coordinate the newest copy of each range of its experts: the step and the file.

        A file that does not verify now is left out: a new checkpoint must not inherit the damage.
        """
        held: dict[str, dict[Range, tuple[int, str]]] = {}
        for name in self.manifest["files"]:
            coordinate, _, rest = name.partition(".")
            if not rest.startswith("experts-") or not self._verifies(name):
                continue
            newest = held.setdefault(coordinate, {})
            for stored in read_entries(self.path / name):
                found = (-1 if stored.step is None else stored.step, name)
                newest[stored.entry.range] = max(newest.get(stored.entry.range, (-1, "")), found)
        return held

    def _verifies(self, name: str) -> bool:
        try:
            found, facts = checksum_file(self.path / name), self.written(name)
        except OSError:
            return False
        return (found.nbytes, found.xxh3_128) == (facts.nbytes, facts.xxh3_128)

    def written(self, name: str) -> Written:
        facts = self.manifest["files"][name]
        return Written(facts["bytes"], facts["xxh3_128"], facts.get("tensors", ""))

    def copies(self, coordinate: str, part: Part) -> list[tuple[int, str]]:
        """The step and the file of every range of a part; none if it does not hold all of them."""
        held = self._held.get(coordinate, {})
        found = [held.get(entry.range) for entry in part.section.entries]
        copies = [copy for copy in found if copy is not None]
        return copies if len(copies) == len(found) else []


def split(
    step: int, coordinate: str, sealed: Sequence[Part], selection: Selection, older: Older | None
) -> tuple[Files, Shared]:
    """The files to write for one coordinate, and those to share.

    Written are what is no expert's, the selected experts, and whatever the older checkpoint lacks; not again an expert
    that it has of the same step. Raises RecoveryError if a record of an expert says of no part.
    """
    main: list[Section] = []
    experts: list[Section] = []
    names: set[str] = set()
    for part in sealed:
        if part.kind is Kind.BASE and len(part.parts) != 1:
            raise RecoveryError(f"{coordinate}: a record of step {part.step} holds parts {part.parts}, not one")
        if part.kind is not Kind.BASE or part.parts[0] < selection.fresh:
            main.append(part.section)
            continue
        copies = older.copies(coordinate, part) if older is not None and selection.anew is not None else []
        wanted = selection.anew is None or part.parts[0] in selection.anew
        if copies and (not wanted or all(at == part.step for at, _ in copies)):
            names |= {name for _, name in copies}
        else:
            experts.append(Section(part.section.entries, part.section.payload, part.step))
    files = {coordinate: main} | ({f"{coordinate}.experts-{step}": experts} if experts else {})
    assert older is not None or not names
    return files, {name: (older.path / name, older.written(name)) for name in sorted(names) if older is not None}
