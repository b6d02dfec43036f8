"""What a GPU and the link to it do, for the cost model: experts there, rates alone and beside busy cores."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from inference.costmodel import Timing

if TYPE_CHECKING:
    from inference.calibrate import ExpertKind

GPU_ROWS = (1, 16, 256, 2048)
BANK_BYTES = 128 << 20  # of made-up experts, quick to fill


class GpuBank:
    """Made-up experts on a GPU, and what crosses the link to it."""

    def __init__(self, kind: ExpertKind, device: torch.device) -> None:
        self.kind, self.device = kind, device
        self.count = max(min(BANK_BYTES // kind.nbytes, 64), 2)
        self.host_B = torch.empty(self.count, kind.nbytes, dtype=torch.uint8, pin_memory=True)
        self.there_B = torch.zeros(self.count, kind.nbytes, dtype=torch.uint8, device=device)
        self.stream = torch.cuda.Stream(device)

    def close(self) -> None:
        """Give the pinned memory back; torch would keep it for the next one who asks."""
        del self.host_B, self.there_B
        if (empty := getattr(torch._C, "_host_emptyCache", None)) is not None:
            empty()

    def link_rate(self) -> float:
        self._copy_all(1)
        return max(self._copy_all(1) for _ in range(2))

    def _copy_all(self, rounds: int) -> float:
        """Bytes/s of so many rounds through the bank, in blocks of an expert."""
        begin, end = self._enqueue(rounds)
        end.synchronize()
        return rounds * self.host_B.nbytes / (begin.elapsed_time(end) / 1e3)

    def _enqueue(self, rounds: int) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        with torch.cuda.stream(self.stream):
            begin.record()
            for _ in range(rounds):
                for here_B, there_B in zip(self.host_B, self.there_B, strict=True):
                    there_B.copy_(here_B, non_blocking=True)
            end.record()
        return begin, end

    def beside_link(self, act: Callable[[], float], nbytes: int) -> tuple[float, float]:
        """(link, host) bytes/s while both are busy; ``act`` reads ``nbytes`` and says how long that took.

        The link is given more than it can carry meanwhile; only what ``act`` did before it ended counts, and of that
        the best, as of all timings: threads that slept until then are slow at first.
        """
        alone = act()
        rounds = max(round(20 * alone * 60e9 / self.host_B.nbytes), 12)
        begin, end = self._enqueue(rounds)
        times = []
        while not end.query():
            times.append(act())
        link = rounds * self.host_B.nbytes / (begin.elapsed_time(end) / 1e3)
        whole = times[:-1] or times or [alone]  # the last one ended alone
        return link, nbytes / min(whole)

    def table(self) -> tuple[Timing, ...]:
        """Products as the GPU does them, weights resident and not in its cache."""
        kind, found = self.kind, []
        weights = self.there_B.view(kind.dtype).view(self.count, 3, -1).normal_()
        for rows in GPU_ROWS:
            x_RH = torch.randn(rows, kind.hidden, dtype=kind.dtype, device=self.device)
            seconds = self._timed(lambda x_RH=x_RH: self._all_experts(weights, x_RH)) / self.count
            found.append(Timing("gpu", 1, rows, seconds))
        return tuple(found)

    def _all_experts(self, weights: Tensor, x_RH: Tensor) -> None:
        hidden, intermediate = self.kind.hidden, self.kind.intermediate
        for one in weights:
            gate_up_2IH = one[:2].reshape(2 * intermediate, hidden)
            gate_RI, up_RI = linear(x_RH, gate_up_2IH).chunk(2, -1)
            linear(silu(gate_RI) * up_RI, one[2].view(hidden, intermediate))

    def _timed(self, act: Callable[[], object]) -> float:
        """Seconds on the device, from a graph, so that launching does not count; the best of three."""
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            act()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            act()
        times = []
        for _ in range(3):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        return min(times)

    def memory_rate(self) -> float:
        """Bytes/s of reading, by a sum over the bank."""
        data_N = self.there_B.view(torch.float32)
        return data_N.numel() * 4 / self._timed(lambda: data_N.sum())

    def flops(self) -> float:
        """Of a large square product in the experts' precision."""
        size = 4096
        a = torch.randn(size, size, dtype=self.kind.dtype, device=self.device)
        return 2 * size**3 / self._timed(lambda: a @ a)

    def round_trip(self) -> None:
        self.there_B[0, 0].item()
