"""Which chunks of records a GPU can take the sums of: those whose bytes lie in one piece of its memory.

The others, at the borders of pieces and at the end, are the keeper's to read, as all are where there is no Triton.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from checkpointing.records import CHUNK
from checkpointing.xxh3 import BLOCK, SUMS

if TYPE_CHECKING:
    from checkpointing.device_sums import DeviceSums

_ALIGNED = 16  # bytes that a thread of the kernels loads at once
Part = tuple[torch.Tensor, int]


@dataclass(frozen=True)
class Run:
    """Chunks of a slot's payload, from number ``first`` on."""

    slot: int
    first: int


@dataclass(frozen=True)
class Chunks:
    """``count`` whole chunks, one after another from an address of the device on, and where the sums of their blocks
    lie, one block after another, if they are taken already."""

    address: int
    count: int
    sums: int | None = None


@dataclass(frozen=True)
class Record:
    """A slot, the parts of its payload, and of each, if they are taken already, the sums of its blocks. ``chunk``: its
    bytes."""

    slot: int
    parts: Sequence[Part]
    sums: Sequence[torch.Tensor | None] = ()
    chunk: int = CHUNK

    @cached_property
    def runs(self) -> list[tuple[Run, Chunks]]:
        """Of the payload's chunks those that lie in one part, where kernels can read them, and where that is."""
        found = []
        for number, (source, offset) in enumerate(self.parts):
            taken = self.sums[number] if self.sums and offset % BLOCK == 0 else None
            if numbers := whole_chunks((source, offset), self.chunk):
                begin = numbers[0] * self.chunk - offset
                sums = None if taken is None else taken.data_ptr() + begin // BLOCK * SUMS
                if (address := source.data_ptr() + begin) % _ALIGNED == 0:
                    found.append((Run(self.slot, numbers[0]), Chunks(address, len(numbers), sums)))
        return found


def has_device_sums(device: torch.device) -> bool:
    """Whether the keeper need not read everything itself."""
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None


def device_sums(device: torch.device) -> RecordSums | None:
    """None where the keeper must read everything itself."""
    if not has_device_sums(device):
        return None
    from checkpointing.device_sums import DeviceSums

    return RecordSums(DeviceSums(device, CHUNK))


def whole_chunks(part: Part, chunk: int) -> range:
    """The numbers of a payload's chunks that lie in this part."""
    source, offset = part
    return range(-(-offset // chunk), (offset + source.numel()) // chunk)


class RecordSums:
    def __init__(self, sums: DeviceSums) -> None:
        self._sums: DeviceSums | None = sums
        self._failed: DeviceSums | None = None  # kept, since what it has queued reads its memory

    def queue_records(self, records: Iterable[Record]) -> list[Run]:
        """Begin on the current stream; returns of which chunks, for :meth:`take_records`. Their bytes must stay until
        the device has come to what is queued now.

        A device that cannot, for want of memory or of a compiler, is not asked again: the keeper reads everything then.
        """
        if self._sums is None:
            return []
        runs = [run for record in records for run in record.runs]
        try:
            self._sums.queue([chunks for _, chunks in runs])
        except Exception as error:  # Triton and compilers raise whatever they like, and training needs none of them
            _tell("takes no checksums", error, "the keeper takes all")
            self._failed, self._sums = self._sums, None
            return []
        return [run for run, _ in runs]

    def take_records(self, runs: Sequence[Run]) -> dict[int, dict[int, bytes]]:
        """What to tell the keeper, by slot, once the device has come to it; see :func:`checkpointing.records.seal`."""
        taken: dict[int, dict[int, bytes]] = {}
        if self._sums is None or not runs:
            return taken
        for run, digests in zip(runs, self._sums.take(), strict=True):
            taken.setdefault(run.slot, {})[run.first] = digests
        return taken


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether they are equal where they are numbers, and none where the other is none: whoever looks for gradients that
    are no numbers must get that far."""
    return torch.equal(one, other) or torch.equal(one.nan_to_num(), other.nan_to_num())


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
            if check and not same(out, source.to(out.dtype).mul_(factor)):
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
