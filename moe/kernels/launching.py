"""Launches of Triton kernels that take the host less time than Triton's own.

Before each launch Triton looks at all arguments, makes texts of what it finds, and calls hooks, in Python; that takes
the host longer than many of our kernels run. Here what a launch compiled is remembered by as much of the arguments as
Triton compiles for (its ``JITFunction.run`` and ``native_specialize_impl``), and launched again without asking.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs

_VERSION = "3.6."  # whose compiled kernels are launched as below; with others Triton launches them


def is_quick() -> bool:
    return triton.__version__.startswith(_VERSION) and not knobs.runtime.interpret


def ceil_div(n: int, size: int) -> int:
    """How many pieces of ``size`` hold ``n``. Triton's own can be called in kernels, too, and is slow here for that."""
    return -(-n // size)


def power_of_two(n: int) -> int:
    """The next from ``n`` on, which is positive."""
    return 1 << (n - 1).bit_length()


class Quick:
    """A kernel: ``kernel[grid](*args, **options)``, all arguments by position and the first of them a tensor.

    Attributes:
        kernel: Triton's own.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self._compiled: dict[Hashable, Any] = {}
        self._constant = tuple(parameter.is_constexpr for parameter in kernel.params) if is_quick() else None

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        if self._constant is None or knobs.runtime.launch_enter_hook.calls or knobs.runtime.launch_exit_hook.calls:
            return self.kernel[grid]  # type: ignore[no-any-return]
        return functools.partial(self._launch, grid)

    def _launch(self, grid: tuple[int, ...], *args: Any, **options: int) -> None:
        device = args[0].device.index
        key = (device, *options.items(), *map(kind, args, self._constant or ()))
        again = self._compiled.get(key)
        if again is None:
            with torch.cuda.device(device):
                self._compiled[key] = _launcher(self.kernel[grid](*args, **options))
            return
        first, second, third = (*grid, 1, 1)[:3]
        again(first, second, third, torch._C._cuda_getCurrentRawStream(device), *args)


def _launcher(compiled: Any) -> Callable[..., None]:
    """Launches it on a grid of three and a stream, without hooks; in C if it needs no memory besides its arguments."""
    run, function, described = compiled.run, compiled.function, (compiled.packed_metadata, None, None, None)
    if run.global_scratch_size or run.profile_scratch_size:
        return lambda first, second, third, stream, *args: run(
            first, second, third, stream, function, *described, *args
        )
    ways = (function, run.launch_cooperative_grid, run.launch_pdl, None, None, *described)
    return lambda first, second, third, stream, *args: run.launch(first, second, third, stream, *ways, *args)


def kind(value: Any, constant: bool) -> Hashable:
    """What Triton compiles for: constants, types, whether an address or number is a multiple of 16, or a number one."""
    if isinstance(value, Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    if constant or value is None:
        return type(value), value
    return value == 1, value % 16 == 0, -(1 << 31) <= value < 1 << 31
