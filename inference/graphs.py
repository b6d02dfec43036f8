"""One decode step as CUDA graphs with the host's work between them.

A step of few rows is bound by launches: some fifty kernels per layer at 9 us each, against 1 us as nodes of a graph.
What lies between two experts seams runs the same kernels on the same addresses in every step, so it is captured once
and replayed. A seam that needs the host (to read which experts were chosen and have the missing ones fetched) cuts the
capture in two; one that does not is captured like everything else, and a step with no cut is one graph.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch

Step = Callable[[], None]


class SegmentedGraph:
    """Captures a function once, cut where it says so, and replays it with the host's part of each cut in its place.

    The function must read its inputs from tensors that stay where they are and leave its results in such: tensors made
    during the capture belong to the graphs' own memory pool, live as long as this object and hold the newest replay's
    values. It must not read from the device outside of cuts.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._steps: list[Step] = []
        self._open: torch.cuda.CUDAGraph | None = None

    @property
    def capturing(self) -> bool:
        return self._open is not None

    @property
    def segments(self) -> int:
        """Graphs of one step."""
        return sum(getattr(step, "__self__", None).__class__ is torch.cuda.CUDAGraph for step in self._steps)

    def capture[R](self, function: Callable[[], R], warmups: int = 2) -> R:
        """Returns what ``function`` returned while it was captured: tensors that every replay fills anew.

        It is run ``warmups`` times before, so that kernels are compiled and libraries have made their work spaces.
        """
        assert not self._steps, "captured already"
        torch.cuda.synchronize()
        with self.on_stream():
            for _ in range(warmups):
                function()
            torch.cuda.synchronize()
            gc.collect()
            torch.cuda.empty_cache()
            self._begin()
            try:
                result = function()
            finally:
                self._end()
        torch.cuda.synchronize()
        return result

    def cut(self, host: Step) -> None:
        """Ends a graph here, so that a replay calls ``host`` before it goes on with the next.

        While nothing is captured, as in warming up, ``host`` is called at once.
        """
        if not self.capturing:
            return host()
        self._end()
        self._steps.append(host)
        self._begin()

    def replay(self) -> None:
        """Runs the step on :attr:`stream`. Returns when all is queued, not when it is done."""
        with self.on_stream():
            for step in self._steps:
                step()

    def on_stream(self) -> AbstractContextManager[None]:
        return torch.cuda.stream(self.stream)

    def _begin(self) -> None:
        graph = torch.cuda.CUDAGraph()
        # Threads that pin memory meanwhile must not break a capture that is none of theirs.
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        self._open = graph

    def _end(self) -> None:
        graph, self._open = self._open, None
        if graph is not None:
            graph.capture_end()
            self._steps.append(graph.replay)
