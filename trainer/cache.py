"""A folder of prepared data that is built once: under a temporary name, and renamed when it is whole.

``meta.json`` in it, written last, has the digests of the others.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xxhash

PARTS = ("train", "heldout")


def open_or_build(root: Path, key: str, build: Callable[[Path], None]) -> Path:
    """The folder ``root/key``. If it is not there or not whole, ``build`` first writes it, under another name.

    Any number of processes may call this at once: one builds, the others wait for it.
    """
    folder = root / key
    if not _is_whole(folder):
        root.mkdir(parents=True, exist_ok=True)
        with _locked(root / f"{key}.lock"):
            if not _is_whole(folder):
                _build_and_rename(folder, build)
    return folder


def write_meta(folder: Path, meta: Mapping[str, Any]) -> None:
    """Write ``meta.json``, which makes the folder whole."""
    (folder / "meta.json").write_text(json.dumps(meta, indent=1))


def digests_of(folder: Path) -> dict[str, str]:
    """Of the files in ``folder`` whose names begin with a part's, for ``meta.json``'s ``files``."""
    return {path.name: file_digest(path) for part in PARTS for path in sorted(folder.glob(f"{part}.*"))}


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Held by one process at a time; the system lets go of it when the process dies."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _is_whole(folder: Path) -> bool:
    try:
        meta = json.loads((folder / "meta.json").read_text())
        digests = meta["files"] if "files" in meta else {f"{part}.bin": meta[part]["digest"] for part in PARTS}
        return all(file_digest(folder / name) == digest for name, digest in digests.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def file_digest(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def _build_and_rename(folder: Path, build: Callable[[Path], None]) -> None:
    _remove_abandoned(folder)
    temporary = folder.with_name(f"{folder.name}.tmp-{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}")
    temporary.mkdir()
    try:
        build(temporary)
        if folder.exists():  # there, but not whole
            folder.rename(temporary / "damaged")
            shutil.rmtree(temporary / "damaged")
        try:
            temporary.rename(folder)
        except OSError:
            # On a file system without locks another node may have been first, with the same contents.
            if not _is_whole(folder):
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _remove_abandoned(folder: Path) -> None:
    """Temporary folders of builders of this machine that were killed."""
    for path in folder.parent.glob(f"{folder.name}.tmp-{socket.gethostname()}-*"):
        pid = path.name.split("-")[-2]
        if not Path("/proc", pid).exists():
            shutil.rmtree(path, ignore_errors=True)
