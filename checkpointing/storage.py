"""How a checkpoint comes into being, is set aside and is removed, on a local disk and on an object store.

A local disk renames folders atomically, so a checkpoint is written under another name. An object store renames nothing,
so it is written where it will lie, and its manifest is put last. Both ways a folder without a manifest is none.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import shutil
from pathlib import Path
from typing import Any, Protocol

from checkpointing.remote import RemotePath

MANIFEST = "manifest.json"
_ASIDE = re.compile(r"manifest\.(.+)\.json")
_NO_LINKS = (errno.EPERM, errno.EXDEV, errno.EMLINK, errno.ENOTSUP, errno.ENOSYS)
UNFINISHED = "unfinished"  # lies in a remote folder while it is being written

Place = Path | RemotePath


class Storage(Protocol):
    """All folders are ``step-N`` folders; OSErrors are passed on as they come."""

    def begin(self, final: Any) -> Any:
        """An empty folder to write into. What an unfinished write left there is removed."""

    def commit(self, work: Any, final: Any, manifest: bytes) -> None:
        """Make it exist. An earlier folder of that name is set aside, as it did not verify."""

    def share(self, source: Any, target: Any) -> None:
        """Have a file of another folder in the one being written, too."""

    def abort(self, work: Any) -> None:
        """Remove what was written since ``begin``."""

    def set_aside(self, folder: Any, why: str) -> Any | None:
        """Make it exist no more without losing a byte; returns where it is now, None if another process was quicker."""

    def remove(self, folder: Any) -> None:
        """Remove it, the manifest first, so that a kill in the middle leaves nothing half valid."""

    def hint(self, directory: Any, text: str) -> None:
        """Write the file ``latest``, for people."""

    def free_bytes(self, directory: Any) -> int | None:
        """Room that is left; None if there is no telling."""

    def clean(self, directory: Any) -> None:
        """Remove what a killed writer left."""


def place_of(text: str | os.PathLike[str]) -> Place:
    """A path as it is written, or any fsspec URL. Raises LocationError for a URL that cannot be reached from here."""
    text = os.fspath(text)
    protocol, separator, rest = text.partition("://")
    if not separator and "::" not in text:
        return Path(text)
    if protocol in ("file", "local"):
        return Path(rest)
    return RemotePath.parse(text)


def storage_of(place: Place) -> Storage:
    return RemoteStorage() if isinstance(place, RemotePath) else LocalStorage()


def make_durable(file: io.RawIOBase) -> None:
    """Have a local file's bytes on the disk, and not in the page cache, so that a read-back is served by the disk."""
    if isinstance(file, io.FileIO):
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class LocalStorage:
    def begin(self, final: Path) -> Path:
        work = final.with_name(f"{final.name}.tmp")
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        return work

    def commit(self, work: Path, final: Path, manifest: bytes) -> None:
        _write_durably(work / MANIFEST, manifest)
        _fsync_folder(work)
        if final.exists():
            self.set_aside(final, "corrupt")
        work.rename(final)
        _fsync_folder(final.parent)

    def share(self, source: Path, target: Path) -> None:
        """As a hard link, or as a copy where the file system has none."""
        try:
            os.link(source, target)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            shutil.copyfile(source, target)
            with target.open("rb", buffering=0) as file:
                make_durable(file)

    def abort(self, work: Path) -> None:
        shutil.rmtree(work, ignore_errors=True)

    def set_aside(self, folder: Path, why: str) -> Path | None:
        target, count = folder.with_name(f"{folder.name}.{why}"), 1
        while target.exists():
            count += 1
            target = folder.with_name(f"{folder.name}.{why}{count}")
        try:
            folder.rename(target)
        except FileNotFoundError:
            return None
        return target

    def remove(self, folder: Path) -> None:
        if folder.is_symlink():
            folder.unlink()  # what it leads to was put elsewhere by somebody, and stays
            return
        (folder / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)

    def hint(self, directory: Path, text: str) -> None:
        _write_durably(directory / "latest.tmp", text.encode())
        (directory / "latest.tmp").rename(directory / "latest")

    def free_bytes(self, directory: Path) -> int | None:
        found = os.statvfs(directory)
        return found.f_bavail * found.f_frsize

    def clean(self, directory: Path) -> None:
        for path in directory.glob("step-*.tmp"):
            shutil.rmtree(path, ignore_errors=True)


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


class RemoteStorage:
    """``set_aside`` renames the manifest only: cheap, and no harm if several processes do it at once."""

    def begin(self, final: RemotePath) -> RemotePath:
        if final.is_dir():
            self._make_room(final)
        final.mkdir()
        (final / UNFINISHED).write_bytes(b"")
        return final

    def _make_room(self, folder: RemotePath) -> None:
        """Take away what an earlier write left; what was set aside, or is damaged, moves to a folder of its own."""
        names = {path.name for path in folder.iterdir()}
        if UNFINISHED in names and not _asides(names) and MANIFEST not in names:
            folder.remove_tree()
        elif names:
            target = _unused(folder, next(iter(_asides(names)), "corrupt"))
            target.mkdir()
            for name in sorted(names):
                (folder / name).copy_to(target / name)
            self.remove(folder)

    def commit(self, work: RemotePath, final: RemotePath, manifest: bytes) -> None:
        (final / MANIFEST).write_bytes(manifest)
        # It exists now. A marker that stays behind does no harm.
        with contextlib.suppress(OSError):
            (final / UNFINISHED).unlink()

    def share(self, source: RemotePath, target: RemotePath) -> None:
        source.copy_to(target)

    def abort(self, work: RemotePath) -> None:
        with contextlib.suppress(OSError):
            work.remove_tree()

    def set_aside(self, folder: RemotePath, why: str) -> RemotePath | None:
        try:
            (folder / MANIFEST).copy_to(folder / f"manifest.{why}.json")
            (folder / MANIFEST).unlink()
        except FileNotFoundError:
            return None
        return folder

    def remove(self, folder: RemotePath) -> None:
        (folder / MANIFEST).unlink(missing_ok=True)
        folder.remove_tree()

    def hint(self, directory: RemotePath, text: str) -> None:
        (directory / "latest").write_bytes(text.encode())

    def free_bytes(self, directory: RemotePath) -> int | None:
        return None

    def clean(self, directory: RemotePath) -> None:
        for folder in directory.iterdir() if directory.is_dir() else ():
            names = {path.name for path in folder.iterdir()} if folder.name.startswith("step-") else set()
            if UNFINISHED in names and MANIFEST not in names and not _asides(names):
                folder.remove_tree()


def _asides(names: set[str]) -> list[str]:
    """Why a folder was set aside: the middles of ``manifest.WHY.json``."""
    return sorted(m[1] for name in names if (m := _ASIDE.fullmatch(name)))


def _unused(folder: RemotePath, why: str) -> RemotePath:
    target, count = folder.with_name(f"{folder.name}.{why}"), 1
    while target.exists():
        count += 1
        target = folder.with_name(f"{folder.name}.{why}{count}")
    return target
