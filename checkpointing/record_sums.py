"""Which chunks of records a GPU can take the sums of: those whose bytes lie in one piece of its memory.

The others, at the borders of pieces and at the end, are the keeper's to read, as all are where there is no Triton.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch

from checkpointing.records import CHUNK, Kind

if TYPE_CHECKING:
    from checkpointing.device_sums import DeviceSums

Part = tuple[torch.Tensor, int]
Record = tuple[int, Kind, Sequence[Part]]
Place = tuple[int, int]  # slot, number of a chunk of its payload


def device_sums(device: torch.device | None) -> RecordSums | None:
    """None where the keeper must read everything itself."""
    if device is None or importlib.util.find_spec("triton") is None:
        return None
    from checkpointing.device_sums import DeviceSums

    return RecordSums(DeviceSums(device, CHUNK), CHUNK)


def whole_chunks(part: Part, chunk: int) -> range:
    """The numbers of a payload's chunks that lie in this part."""
    source, offset = part
    return range(-(-offset // chunk), (offset + source.numel()) // chunk)


class RecordSums:
    """``chunk`` is that of the records, in bytes."""

    def __init__(self, sums: DeviceSums, chunk: int) -> None:
        self._sums: DeviceSums | None = sums
        self._chunk = chunk

    def queue_records(self, records: Iterable[Record], after: torch.cuda.Event | None) -> list[Place]:
        """Begin after an event of the device; returns which chunks. Their bytes must stay till :meth:`take_records`.

        A device that cannot, for want of memory or of a compiler, is not asked again: the keeper reads everything then.
        """
        if self._sums is None:
            return []
        places, starts = [], []
        for slot, _, parts in records:
            for part in parts:
                numbers = whole_chunks(part, self._chunk)
                begin = part[0].data_ptr() - part[1]
                places += [(slot, number) for number in numbers]
                starts += [begin + number * self._chunk for number in numbers]
        try:
            return places[: self._sums.queue(starts, after)]
        except Exception as error:  # Triton and compilers raise whatever they like, and training needs none of them
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            print(f"the GPU takes no checksums ({reason}); the keeper takes all", file=sys.stderr, flush=True)
            self._sums = None
            return []

    def take_records(self, places: Sequence[Place]) -> dict[int, dict[int, bytes]]:
        """What to tell the keeper, by slot."""
        taken: dict[int, dict[int, bytes]] = {}
        if self._sums is None or not places:
            return taken
        for (slot, number), lanes in zip(places, self._sums.take(len(places)), strict=True):
            taken.setdefault(slot, {})[number] = lanes
        return taken
