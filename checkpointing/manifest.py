"""The manifest of a checkpoint: which files it consists of, their sizes and checksums, and what wrote them."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

from xxhash import xxh3_128_hexdigest

from checkpointing.recovery import RecoveryError
from checkpointing.remote import UnreachableError
from checkpointing.storage import MANIFEST, Place
from checkpointing.tensorfile import Written

FORMAT = 1


def coordinate_of(name: str) -> str:
    """Of a file of a checkpoint."""
    return name.partition(".")[0]


def make_manifest(
    step: int,
    files: Mapping[str, Written],
    tensors: Mapping[str, Any],
    metadata: Mapping[str, Any],
) -> dict[str, Any]:
    """What a checkpoint consists of and what wrote it, with a checksum of all that."""
    manifest = {
        "format": FORMAT,
        "step": step,
        "written_at": time.time(),
        "coordinates": sorted({coordinate_of(name) for name in files}),
        "files": {name: {"bytes": w.nbytes, "xxh3_128": w.xxh3_128, "tensors": w.tensors} for name, w in files.items()},
        "metadata": dict(metadata),
        "tensors": dict(tensors),
    }
    return manifest | {"checksum": manifest_checksum(manifest)}


def manifest_checksum(manifest: Mapping[str, Any]) -> str:
    body = {key: value for key, value in manifest.items() if key != "checksum"}
    return xxh3_128_hexdigest(json.dumps(body, sort_keys=True, separators=(",", ":")).encode())


def read_manifest(step_dir: Place) -> dict[str, Any]:
    """The manifest, if it matches itself and all files have its sizes. Raises RecoveryError naming the file."""
    manifest = own_manifest(step_dir)
    problems = wrong_sizes(step_dir, manifest)
    if problems:
        raise RecoveryError(next(iter(problems.values())))
    return manifest


def own_manifest(step_dir: Place) -> dict[str, Any]:
    """The manifest, if it matches itself, whatever the files are. Raises RecoveryError."""
    path = step_dir / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
    except UnreachableError:
        raise
    except (OSError, ValueError) as error:
        raise RecoveryError(f"{path}: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("checksum") != manifest_checksum(manifest):
        raise RecoveryError(f"{path}: does not match its own checksum")
    if manifest["format"] != FORMAT or f"step-{manifest['step']}" != step_dir.name:
        raise RecoveryError(f"{path}: holds format {manifest['format']} of step {manifest['step']}")
    return manifest


def wrong_sizes(step_dir: Place, manifest: Mapping[str, Any]) -> dict[str, str]:
    """A problem for each file that is absent or of another size than the manifest says."""
    problems = {}
    for name, facts in manifest["files"].items():
        try:
            size = (step_dir / name).stat().st_size
        except UnreachableError:
            raise
        except OSError as error:
            problems[name] = f"{step_dir / name}: {error.strerror}"
            continue
        if size != facts["bytes"]:
            problems[name] = f"{step_dir / name}: {size:,} bytes, the manifest says {facts['bytes']:,}"
    return problems
