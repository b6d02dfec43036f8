"""The CPU lane: missing experts of a decode step computed in host memory while the link brings others.

The work is a small C file, compiled by the machine's own compiler when first used (Triton needs one too) and kept in
the user's cache; there is nothing to build at installation. It has threads of its own, and no call holds the
interpreter's lock, so the thread that feeds the GPU goes on meanwhile.

Shapes: T rows, P pairs of a row and one of its experts, H hidden, I intermediate.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from inference.errors import InferenceError
from moe.refs import ExpertRef

_SOURCE = Path(__file__).with_suffix(".c")
_FLAGS = ("-O3", "-march=native", "-shared", "-fPIC", "-pthread")
_POINTER = ctypes.c_void_p
_OPEN = [*[ctypes.c_int] * 3, ctypes.c_long, ctypes.c_int, ctypes.c_long]


LIMIT_S = 60.0  # a call takes milliseconds
_LOST = -2
_lost_calls: list[object] = []  # what a thread that was given up may still read and write, kept until the process ends


class LaneError(RuntimeError):
    """The CPU lane cannot run here, and why."""


class LaneHung(InferenceError):
    """A thread of the lane did not end its part of a call. The lane computes nothing from then on."""


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled lane. Raises LaneError without a compiler, or if it fails."""
    compiler = next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)
    if compiler is None:
        raise LaneError("no C compiler (cc, gcc or clang) on the PATH, so the CPU computes no experts beside the GPU")
    key = hashlib.sha256(_SOURCE.read_bytes() + repr((compiler, _FLAGS, _processor())).encode()).hexdigest()[:16]
    target = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "planaria" / f"cpu_lane-{key}.so"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            made = Path(folder) / target.name
            command = [compiler, *_FLAGS, str(_SOURCE), "-o", str(made), "-lm"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
            if done.returncode:
                raise LaneError(f"{compiler} could not compile {_SOURCE.name}: {done.stderr.strip()[-500:]}")
            made.replace(target)
    return _typed(ctypes.CDLL(str(target)))


def _processor() -> str:
    """What ``-march=native`` depends on: a home folder may be shared by machines."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


def _typed(lib: ctypes.CDLL) -> ctypes.CDLL:
    lib.lane_open.argtypes, lib.lane_open.restype = _OPEN, _POINTER
    lib.lane_submit.argtypes, lib.lane_submit.restype = (
        [
            *[_POINTER, ctypes.c_int, _POINTER, _POINTER, _POINTER, ctypes.c_int],
            *[_POINTER] * 3,
        ],
        ctypes.c_int,
    )
    lib.lane_count.argtypes, lib.lane_count.restype = [_POINTER, _POINTER], None
    lib.lane_wait.argtypes, lib.lane_wait.restype = [_POINTER], ctypes.c_int
    lib.lane_close.argtypes, lib.lane_close.restype = [_POINTER], None
    return lib


class LaneCall:
    """Where calls find their inputs and leave their results.

    Args:
        x_TH, score_TK, y_PH: fp32, contiguous.
        experts: of one call, at most.
        reads: what keeps the blocks of a layer's experts in memory, asked for if a thread hangs that may read them.
        count: int64 [1], to which the thread that ends a call adds 1, when all results are in y.
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
        self.addresses = tuple(array.ctypes.data for array in self.arrays)
        self.choices, self.reads = score_TK.shape[1], reads
        self.block = (_POINTER * experts)()
        self.first = (ctypes.c_int32 * (experts + 1))()
        self.pair = (ctypes.c_int32 * score_TK.size)()


class CpuLane:
    """Computes ``score * down(silu(gate) * up)`` of pairs, in fp32, beside the caller.

    Args:
        threads: besides the caller's, which helps while it waits. They look for work for about a millisecond after
            a call before they sleep.
        dtype: of the blocks; bf16 or fp32.
        down_start: the element of a block at which down begins; right behind up by default.
        limit_s: how long a thread may take for its part of a call.

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
        self._library = library()
        self._lane = self._library.lane_open(
            threads,
            hidden,
            inner,
            down_start or 2 * inner * hidden,
            dtype == torch.bfloat16,
            int(limit_s * 1000),
        )
        if self._lane is None:
            raise LaneError("no memory for the CPU lane")

    def submit(
        self,
        call: LaneCall,
        blocks: Sequence[int],
        first: Sequence[int],
        pairs: Sequence[int],
        what: tuple[int, Sequence[int]] = (-1, ()),
    ) -> None:
        """Begins; an earlier call is waited for. Raises LaneHung if that does not end.

        Args:
            call: where inputs are and results go.
            blocks: address of each expert's block: gate [I,H], up [I,H], then down [H,I].
            first: ``pairs[first[e]:first[e + 1]]`` are of expert ``e``.
            pairs: pair p takes row ``p // K`` of x, times score p, to row p of y. No other row of y is touched.
            what: the layer and its experts, for an error.
        """
        self.wait()
        if call.count_at != self._count_at:
            self._library.lane_count(self._lane, call.count_at)
            self._count_at = call.count_at
        call.block[: len(blocks)] = blocks
        call.first[: len(first)] = first
        call.pair[: len(pairs)] = pairs
        given = (self._lane, len(blocks), call.block, call.first, call.pair, call.choices, *call.addresses)
        status = self._library.lane_submit(*given)
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
