"""Hugging Face model folders read and written one tensor at a time, for models larger than memory.

A written folder appears whole or not at all: it grows under a temporary name and is renamed at the end.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from moe.load import FolderError

SHARD_BYTES = 1 << 30
_INDEX = "model.safetensors.index.json"


def read_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a folder's ``model*.safetensors``, file by file. Raises FolderError if there is no such file."""
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise FolderError(f"{folder} holds no model*.safetensors; save the model in that format first")
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no mapping
                yield name, file.get_tensor(name)


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A temporary folder that becomes ``out`` if the block succeeds. Raises FolderError if ``out`` exists."""
    if out.exists():
        raise FolderError(f"{out} exists; give another folder or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_tensors(tensors: Iterable[tuple[str, Tensor]], out: Path, shard_bytes: int = SHARD_BYTES) -> int:
    """Write shards and their index into ``out``; at most ``shard_bytes`` and one tensor are in memory. Returns how many
    tensors were written. Raises FolderError for a name that comes twice."""
    where: dict[str, str] = {}
    shard: dict[str, Tensor] = {}
    held = total = shards = 0

    def flush() -> None:
        nonlocal held, shards
        shards += 1
        name = f"model-{shards:05d}.safetensors"
        save_file(shard, out / name, metadata={"format": "pt"})
        where.update(dict.fromkeys(shard, name))
        shard.clear()
        held = 0

    for name, tensor in tensors:
        if name in where or name in shard:
            raise FolderError(f"the tensor {name} comes twice; the source folder holds stale files")
        if shard and held + tensor.nbytes > shard_bytes:
            flush()
        shard[name] = tensor.contiguous().clone()  # slices of one tensor share storage, which safetensors refuses
        held += tensor.nbytes
        total += tensor.nbytes
    if shard:
        flush()
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (out / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True))
    return len(where)


def copy_companions(source: Path, out: Path) -> None:
    """Tokenizer, generation settings and whatever else stands beside the weights and the configuration."""
    for path in sorted(source.iterdir()):
        weights = path.suffix in (".safetensors", ".bin", ".pt", ".pth", ".gguf") or path.name.endswith(".index.json")
        if path.is_file() and not weights and path.name != "config.json":
            shutil.copy2(path, out / path.name)
