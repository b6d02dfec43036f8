"""What the machine can do, measured in the run, and the floor that follows from it for what an arm did.

The link and the CPU lane read the same host memory, so both are measured alone and together. No schedule can bring or
compute the missing experts of a token faster than their sum, nor bring faster than the link, nor have the GPU read its
weights faster than its memory: the largest of these is the floor. It supposes perfect overlap and no other work.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from benchmarks.inference_model import Shape
from inference.banks import ExpertBanks
from inference.cpu_lane import CpuLane, LaneCall
from inference.cuda_link import CudaLink
from inference.transfer import SimulatedLink
from moe.refs import ExpertRef

_MANY = 8  # experts of a call that measures what the lane reads


@dataclass(frozen=True)
class Rates:
    """Bytes per second. ``lane_s``: seconds of one call of 1, 2, ... experts on the CPU lane, beside a busy link.

    ``host_bytes``: of one expert as the lanes carry it, packed or not.
    """

    host_bytes: int
    link: float
    link_beside: float
    lane: float
    lane_beside: float
    memory: float
    lane_s: tuple[float, ...]

    def floor(self, shape: Shape, resident: float, fetched: float, computed: float) -> dict[str, Any]:
        """Seconds of one token that used so many experts of each kind."""
        missed = (fetched + computed) * self.host_bytes
        gpu = shape.dense_bytes + (resident + 2 * fetched) * shape.expert_bytes  # what is fetched is written, then read
        if self.host_bytes != shape.expert_bytes:
            gpu += 2 * fetched * self.host_bytes  # before it is unpacked
        parts = {
            "host": missed / (self.link_beside + self.lane_beside),
            "link": fetched * self.host_bytes / self.link,
            "gpu_memory": gpu / self.memory,
        }
        bound = max(parts, key=parts.__getitem__)
        return {"s": parts[bound], "bound": bound, **{f"{name}_s": s for name, s in parts.items()}}


def measure(shape: Shape, banks: ExpertBanks, lane: CpuLane, layers: Sequence[int], device: torch.device) -> Rates:
    """On a CPU the link and the GPU's memory are what copying takes there: only the code is exercised."""
    probe = _Probe(shape, banks, lane, layers, device)
    link, _ = probe.link(64, None)
    lane_alone = probe.lane(_MANY)
    link_beside, lane_beside = probe.link(192, _MANY)
    lane_s = tuple(probe.beside(count) for count in range(1, shape.choices + 1))
    return Rates(probe.bytes, link, link_beside, lane_alone, lane_beside, _memory(device), lane_s)


class _Probe:
    def __init__(
        self, shape: Shape, banks: ExpertBanks, lane: CpuLane, layers: Sequence[int], device: torch.device
    ) -> None:
        self.shape, self.banks, self.cpu, self.device = shape, banks, lane, device
        self.refs = [ExpertRef(layer, e) for e in range(shape.experts) for layer in layers]
        self.packed = banks.packed(layers[0])
        assert all(banks.packed(layer) == self.packed for layer in layers)
        self.bytes = sum(banks.block(ref).nbytes for ref in self.refs) // len(self.refs)
        self._at = 0
        self.targets = torch.empty(4, banks.layout.elements, dtype=shape.dtype, device=device)
        self.to_device = CudaLink(device, timed=False) if device.type == "cuda" else SimulatedLink(math.inf)
        most = max(shape.choices, _MANY)
        x_1H = np.random.default_rng(0).standard_normal((1, shape.hidden), dtype=np.float32)
        score_1K, y_PH = np.ones((1, most), dtype=np.float32), np.empty((most, shape.hidden), dtype=np.float32)
        self.where = LaneCall(x_1H, score_1K, y_PH, most)

    def next(self, count: int) -> list[ExpertRef]:
        """Experts that no earlier call touched lately, so that no cache holds them."""
        found = [self.refs[(self._at + i) % len(self.refs)] for i in range(count)]
        self._at += count
        return found

    def queue(self, copies: int) -> None:
        """On the product's link."""
        for i, ref in enumerate(self.next(copies)):
            self.to_device.copy(self.targets[i % 4], self.banks.block(ref))

    def call(self, count: int) -> None:
        blocks = [self.banks.address(ref) for ref in self.next(count)]
        self.cpu.submit(self.where, blocks, range(count + 1), range(count), packed=self.packed)
        self.cpu.wait()

    def link(self, copies: int, experts: int | None) -> tuple[float, float]:
        """(link, lane) rates; with calls of so many ``experts`` on the lane as long as the link is busy."""
        self.queue(4)
        self._settle()
        began = time.perf_counter()
        self.queue(copies)
        mark, calls = self.to_device.mark(), 0
        while experts and (not self.to_device.done(mark) or not calls):
            self.call(experts)
            calls += 1
        lane_s = time.perf_counter() - began
        self._settle()
        link_s = time.perf_counter() - began
        size = self.bytes
        return copies * size / link_s, calls * (experts or 0) * size / lane_s

    def lane(self, experts: int) -> float:
        times = _times(lambda: self.call(experts))
        return experts * self.bytes / float(np.median(times))

    def beside(self, experts: int) -> float:
        """Seconds of a call, the link busy throughout."""
        self.queue(96)
        seconds = float(np.median(_times(lambda: self.call(experts), 9)))
        self._settle()
        return seconds

    def _settle(self) -> None:
        self.to_device.settle(self.to_device.mark())


def _times(work: Callable[[], None], repeats: int = 15) -> list[float]:
    times = []
    for _ in range(repeats + 2):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return times[2:]


def _memory(device: torch.device) -> float:
    """Bytes per second of reading: a sum over far more than any cache holds."""
    cuda = device.type == "cuda"
    values = torch.ones((1 << 31) if cuda else (1 << 22), dtype=torch.bfloat16, device=device)

    def work() -> None:
        values.view(torch.int32).amax()
        if cuda:
            torch.cuda.synchronize()

    work()
    return values.nbytes / min(_times(work, 5))
