"""One decode step as CUDA graphs with the host's work between them.

A step of few rows is bound by launches: some fifty kernels per layer at 9 us each, against 1 us as nodes of a graph.
What lies between two experts seams runs the same kernels on the same addresses in every step, so it is captured once
and replayed. A seam that needs the host (to read which experts were chosen and have the missing ones fetched) cuts the
capture in two; one that does not is captured like everything else, and a step with no cut is one graph.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Protocol

import torch

Step = Callable[[], None]


class StepGraph(Protocol):
    """A function that is run again and again, parts of it on the host."""

    def capture(self, function: Step) -> None:
        """Take the function. It reads its inputs from, and leaves its results in, tensors that stay where they are."""

    def cut(self, host: Step) -> None:
        """Called by the function: here the host has its turn in every run."""

    def meanwhile(self, host: Step) -> None:
        """The same, but the host has its turn when all up to the next cut was queued; that may wait for the host."""

    def replay(self) -> None:
        """Run it. Returns when all is queued, not when it is done."""


class Uncaptured:
    """Runs the function as it is."""

    def __init__(self) -> None:
        self._function: Step | None = None

    def capture(self, function: Step) -> None:
        self._function = function

    def cut(self, host: Step) -> None:
        host()

    meanwhile = cut  # before what follows, as nothing is launched ahead here

    def replay(self) -> None:
        assert self._function is not None
        self._function()


class SegmentedGraph:
    """Captures the function once, in as many CUDA graphs as it has parts between cuts, and replays them.

    Tensors made during the capture belong to the graphs' own pool of memory and live as long as this object. The
    function must not read from the device outside of cuts.
    """

    def __init__(self, device: torch.device, warmups: int = 2) -> None:
        self.stream = torch.cuda.Stream(device)
        self.segments = 0
        self._warmups = warmups
        self._pool = torch.cuda.graph_pool_handle()
        self._steps: list[Step] = []
        self._meanwhile: list[Step] = []
        self._open: torch.cuda.CUDAGraph | None = None

    def capture(self, function: Step) -> None:
        """Runs the function ``warmups`` times before, so that kernels are compiled and libraries have their memory.

        Whatever it raises, nothing of it is under way then.
        """
        assert not self._steps, "captured already"
        torch.cuda.synchronize()
        try:
            with torch.cuda.stream(self.stream):
                for _ in range(self._warmups):
                    function()
                torch.cuda.synchronize()
                gc.collect()
                self._begin()
                try:
                    function()
                finally:
                    self._end()
        finally:
            torch.cuda.synchronize()

    def cut(self, host: Step) -> None:
        """Ends a graph here, so that a replay calls ``host`` before the next; in a warm-up just calls it."""
        if self._open is None:
            host()
            return
        self._end()
        self._steps.append(host)
        self._begin()

    def meanwhile(self, host: Step) -> None:
        """Has a replay call ``host`` when the graph that is being captured was launched; in a warm-up just calls it."""
        if self._open is None:
            host()
        else:
            self._meanwhile.append(host)

    def replay(self) -> None:
        """On :attr:`stream`, behind what the caller's stream was given; that goes on behind it."""
        caller = torch.cuda.current_stream()
        self.stream.wait_stream(caller)
        with torch.cuda.stream(self.stream):
            for step in self._steps:
                step()
        caller.wait_stream(self.stream)

    def _begin(self) -> None:
        graph = torch.cuda.CUDAGraph()
        # Threads that pin memory meanwhile must not break a capture that is none of theirs.
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        self._open = graph

    def _end(self) -> None:
        graph, self._open = self._open, None
        if graph is not None:
            graph.capture_end()
            self._steps += [graph.replay, *self._meanwhile]
            self._meanwhile.clear()
            self.segments += 1
