"""The CPU lane: missing experts of a decode step computed in host memory while the link brings others.

The work is a small C file (:mod:`inference.native`) with threads of its own. No call holds the interpreter's lock, so
the thread that feeds the GPU goes on meanwhile.

Shapes: T rows, P pairs of a row and one of its experts, H hidden, I intermediate.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence

import numpy as np
import torch

from inference.errors import InferenceError
from inference.native import NativeError, library
from inference.packed import GROUP
from moe.refs import ExpertRef

LIMIT_S = 60.0  # a call takes milliseconds
_LOST = -2
_lost_calls: list[object] = []  # what a thread that was given up may still read and write, kept until the process ends


class LaneError(RuntimeError):
    """The CPU lane cannot run here, and why."""


class LaneHung(InferenceError):
    """A thread of the lane did not end its part of a call. The lane computes nothing from then on."""


class LaneCall:
    """Where calls find their inputs and leave their results.

    Args:
        x_TH, score_TK, y_PH: fp32, contiguous.
        experts: of one call, at most.
        reads: what keeps the blocks of a layer's experts in memory, asked for if a thread hangs that may read them.
        count: int64 [1], to which the thread that ends a call adds 1, when all results are in y. A call without experts
            ends as it begins.
    """

    def __init__(
        self,
        x_TH: np.ndarray,
        score_TK: np.ndarray,
        y_PH: np.ndarray,
        experts: int,
        reads: Callable[[int, Sequence[int]], object] = lambda *_: None,
        count: np.ndarray | None = None,
    ) -> None:
        self.arrays = (x_TH, score_TK, y_PH)
        assert all(array.dtype == np.float32 and array.flags.c_contiguous for array in self.arrays)
        self.count, self.count_at = count, 0
        if count is not None:
            assert count.dtype == np.int64
            self.count_at = count.ctypes.data
        self.reads = reads
        self.block = (ctypes.c_void_p * experts)()
        self.first = (ctypes.c_int32 * (experts + 1))()
        self.pair = (ctypes.c_int32 * score_TK.size)()
        own = (ctypes.addressof(array) for array in (self.block, self.first, self.pair))
        # As the library is given them: to make numbers of arrays takes longer in each call than the call.
        self.given = (*own, score_TK.shape[1], *(array.ctypes.data for array in self.arrays))


class CpuLane:
    """Computes ``score * down(silu(gate) * up)`` of pairs, in fp32, beside the caller.

    Args:
        threads: besides the caller's, which helps while it waits. They look for work for about a millisecond after
            a call before they sleep.
        dtype: of the blocks; bf16 or fp32.
        down_start: the element of a block at which down begins; right behind up by default.
        limit_s: how long a thread may take for its part of a call.

    Attributes:
        packs: whether it reads packed blocks: bf16, and each row is whole groups.

    Raises LaneError.
    """

    def __init__(
        self,
        threads: int,
        hidden: int,
        inner: int,
        dtype: torch.dtype,
        down_start: int = 0,
        limit_s: float = LIMIT_S,
    ) -> None:
        self._lane = None
        self.threads, self.limit_s = threads, limit_s
        self._call: LaneCall | None = None  # under way: what it reads and writes must stay
        self._count_at = 0
        self._what: tuple[int, Sequence[int]] = (-1, ())
        if dtype not in (torch.bfloat16, torch.float32):
            raise LaneError(f"experts in {dtype} cannot be computed by the CPU lane; it knows bfloat16 and float32")
        self.packs = dtype == torch.bfloat16 and hidden % GROUP == inner % GROUP == down_start % GROUP == 0
        try:
            self._library = library()
        except NativeError as error:
            raise LaneError(f"{error}, so the CPU computes no experts beside the GPU") from error
        self._lane = self._library.lane_open(
            threads,
            hidden,
            inner,
            down_start or 2 * inner * hidden,
            dtype == torch.bfloat16,
            int(limit_s * 1000),
        )
        if self._lane is None:
            raise LaneError(
                f"the CPU lane could not start {threads} threads, so the CPU computes no experts beside the GPU; free "
                "memory, or raise the limit of threads (ulimit -u, or the container's)"
            )

    def submit(
        self,
        call: LaneCall,
        blocks: Sequence[int],
        first: Sequence[int],
        pairs: Sequence[int],
        what: tuple[int, Sequence[int]] = (-1, ()),
        packed: bool = False,
    ) -> None:
        """Begins; an earlier call is waited for. Raises LaneHung if that does not end.

        Args:
            call: where inputs are and results go.
            blocks: address of each expert's block: gate [I,H], up [I,H], then down [H,I].
            first: ``pairs[first[e]:first[e + 1]]`` are of expert ``e``.
            pairs: pair p takes row ``p // K`` of x, times score p, to row p of y. No other row of y is touched.
            what: the layer and its experts, for an error.
            packed: whether all blocks are packed ones (:mod:`inference.packed`); results are the same in each bit,
                but for which of several NaN they are.
        """
        self.wait()
        if call.count_at != self._count_at:
            self._count_at = -1  # unknown, should an interrupt come in between
            self._library.lane_count(self._lane, call.count_at)
            self._count_at = call.count_at
        call.block[: len(blocks)] = blocks
        call.first[: len(first)] = first
        call.pair[: len(pairs)] = pairs
        assert not packed or self.packs, "rows of whole groups, in bf16"
        status = self._library.lane_submit(self._lane, len(blocks), packed, *call.given)
        if status == _LOST:
            raise self._hung()
        self._call, self._what = call, what
        if status:
            raise LaneError(f"no memory for {len(pairs)} rows of {len(blocks)} experts on the CPU lane")

    def wait(self) -> None:
        """Until the last call's results are in its y. Raises LaneHung if they do not come."""
        if self._library.lane_wait(self._lane):
            raise self._hung()
        self._call = None

    def _keep(self) -> None:
        if self._call is not None:
            _lost_calls.append((self._call, self._call.reads(*self._what)))
            self._call = None

    def _hung(self) -> LaneHung:
        self._keep()
        layer, experts = self._what
        named = ", ".join(str(ExpertRef(layer, expert)) for expert in experts) or "no experts"
        return LaneHung(
            f"the CPU lane ({self.threads} threads beside the caller's) did not end a call of layer {layer} ({named}) "
            f"within {self.limit_s:g} s: a thread hangs; start again, without the CPU's experts if it happens again"
        )

    def close(self) -> None:
        if self._lane is not None:
            if self._library.lane_wait(self._lane):
                self._keep()
            self._library.lane_close(self._lane)
            self._lane = self._call = None

    __del__ = close
