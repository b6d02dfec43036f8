"""What makes a base model that model: a hash over the bytes of its weight files.

Two folders with the same weights, however named or copied, have the same fingerprint; one changed bit gives another.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

_CHUNK_BYTES = 1 << 22


def fingerprint(folder: str | Path) -> str:
    """SHA-256 over the names and contents of a Hugging Face folder's ``*.safetensors`` files.

    Raises ValueError if there is none.
    """
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} holds no *.safetensors file; give a Hugging Face model folder")
    total = hashlib.sha256()
    for file in files:
        content = hashlib.sha256()
        with file.open("rb") as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                content.update(chunk)
        total.update(f"{file.name}={content.hexdigest()}\n".encode())
    return total.hexdigest()
