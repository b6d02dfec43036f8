"""Which chunks of records a GPU can take the sums of: those whose bytes lie in one piece of its memory.

The others, at the borders of pieces and at the end, are the keeper's to read, as all are where there is no Triton.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch

from checkpointing.records import CHUNK
from checkpointing.xxh3 import BLOCK

if TYPE_CHECKING:
    from checkpointing.device_sums import DeviceSums

Part = tuple[torch.Tensor, int]
Record = tuple[int, Sequence[Part], Sequence[torch.Tensor | None]]
"""A slot, the parts of its payload, and of each, if they are taken, the sums of its blocks."""
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

    def queue_records(
        self, records: Iterable[Record], after: torch.cuda.Event | None, ready: torch.cuda.Event | None = None
    ) -> list[Place]:
        """Begin after an event of the device, with what is added up after ``ready``; returns which chunks. Their bytes
        must stay till :meth:`take_records`.

        A device that cannot, for want of memory or of a compiler, is not asked again: the keeper reads everything then.
        """
        if self._sums is None:
            return []
        added: list[tuple[Place, int]] = []
        fresh: list[tuple[Place, int]] = []
        for slot, parts, taken in records:
            for number, (source, offset) in enumerate(parts):
                sums = taken[number] if taken and offset % BLOCK == 0 else None
                for chunk in whole_chunks((source, offset), self._chunk):
                    begin = chunk * self._chunk - offset
                    if sums is None:
                        fresh.append(((slot, chunk), source.data_ptr() + begin))
                    else:
                        added.append(((slot, chunk), sums[begin // BLOCK].data_ptr()))
        try:
            count = self._sums.queue([start for _, start in fresh], after, [place for _, place in added], ready)
            return [place for place, _ in (*added, *fresh)][:count]
        except Exception as error:  # Triton and compilers raise whatever they like, and training needs none of them
            _tell("takes no checksums", error, "the keeper takes all")
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


class GradientSums:
    """The sums of gradients' blocks, taken in the pass that scales the gradients, if the device can."""

    def __init__(self) -> None:
        self._works = importlib.util.find_spec("triton") is not None

    def can(self, source: torch.Tensor, out: torch.Tensor) -> bool:
        """Whether to try. Not what lies between two words of the sums, or is no bfloat16 number."""
        aligned = source.numel() % 4 == 0 and source.data_ptr() % 16 == 0 and out.is_contiguous()
        return (
            self._works and source.is_cuda and source.dtype == torch.bfloat16 and out.dtype == torch.float32 and aligned
        )

    def scale(self, source: torch.Tensor, factor: torch.Tensor, out: torch.Tensor, check: bool) -> torch.Tensor | None:
        """``out`` becomes ``source`` times ``factor``. Returns the sums, or None if that had to be done without.

        ``check``: compare the product with torch's.
        """
        from checkpointing.device_sums import scale_and_add

        try:
            if check:  # it may hold the product already, if the factor is 1
                out.fill_(float("nan"))
            sums = scale_and_add(source, factor, out)
            if check and not torch.equal(out, source.to(out.dtype).mul_(factor)):
                raise ArithmeticError("another product than torch's")
        except Exception as error:
            _tell("takes no checksums with gradients", error, "they are taken later")
            self._works = False
            out.copy_(source).mul_(factor)
            return None
        return sums


def _tell(what: str, error: Exception, instead: str) -> None:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    print(f"the GPU {what} ({reason}); {instead}", file=sys.stderr, flush=True)
