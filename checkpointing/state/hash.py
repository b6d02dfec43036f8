"""One hash over all training state, read from the live optimizer.

Every range of every rank is hashed where it lies; the digests, sorted by name, are hashed again on every rank. Two
runs with the same layout have the same state hash if and only if every byte of their state is the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist

from checkpointing.state.buffers import StateBuffer


def local_digests(buffers: Iterable[StateBuffer], extras: Mapping[str, bytes], coordinate: str) -> dict[str, str]:
    """SHA-256 of each named range and each extras blob of this rank."""
    digests = {}
    for buffer in buffers:
        for span in buffer.spans:
            length = span.range.hi - span.range.lo
            part = buffer.tensor[span.offset : span.offset + length].detach().cpu().contiguous()
            digests[str(span.range)] = hashlib.sha256(part.view(torch.uint8).numpy()).hexdigest()
    for name, blob in extras.items():
        digests[f"extras/{coordinate}/{name}"] = hashlib.sha256(blob).hexdigest()
    return digests


def combine(per_rank: Iterable[Mapping[str, str]]) -> str:
    """SHA-256 over (name, digest) of all ranks in name order. Raises ValueError if two ranks name the same range."""
    merged: dict[str, str] = {}
    for digests in per_rank:
        twice = merged.keys() & digests.keys()
        if twice:
            raise ValueError(f"state is held twice: {sorted(twice)[0]}")
        merged |= digests
    total = hashlib.sha256()
    for name in sorted(merged):
        total.update(f"{name}={merged[name]}\n".encode())
    return total.hexdigest()


def state_hash(buffers: Iterable[StateBuffer], extras: Mapping[str, bytes], coordinate: str) -> str:
    """The job's state hash; a collective, the same string on every rank."""
    mine = local_digests(buffers, extras, coordinate)
    gathered: list[dict[str, str]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, mine)
    return combine(gathered)
