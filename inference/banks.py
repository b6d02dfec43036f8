"""Experts in host memory that a GPU's copy engines can read: one arena per layer, page-locked in the background.

Copies from memory that is not page-locked are 13 times slower and stop the host, and torch's own allocator rounds
page-locked memory up to powers of two. So each layer's experts, converted to the precision that computes, go into an
anonymous mapping of just their size, which is then registered with CUDA. Serving need not wait for that: an expert
whose layer is not ready passes through one of a few staging buffers.

Banks may keep experts packed (:mod:`inference.packed`): less memory, and fewer bytes for the link and for processors to
read. A layer with an expert that cannot be packed stays as it is.

Shapes: E experts, B elements of a block, N bytes of a packed one.
"""

from __future__ import annotations

import logging
import mmap
import os
import resource
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from checkpointing.keeper.memory import available_bytes
from inference.errors import InferenceError
from inference.expert_block import ExpertBlock
from inference.packed import PackedBlock, packable
from inference.packing import pack_into
from inference.store import ExpertStore
from inference.transfer import Mark, is_packed
from moe.refs import ExpertRef

STAGING_BUFFERS = 4
_READERS = 8  # beyond that, threads that copy out of the page cache only get into each other's way
_GIB = 1 << 30
_NAME = "expert-banks"  # of threads

_log = logging.getLogger(__name__)


class Registrar(Protocol):
    """Page-locks memory for a device."""

    def register(self, address: int, nbytes: int) -> None:
        """Raises RuntimeError if it is refused."""

    def unregister(self, address: int) -> None: ...


class CudaRegistrar:
    """cudaHostRegister."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def register(self, address: int, nbytes: int) -> None:
        self._call("cudaHostRegister", address, nbytes, 0)

    def unregister(self, address: int) -> None:
        self._call("cudaHostUnregister", address)

    def _call(self, name: str, *args: int) -> None:
        with torch.cuda.device(self._device):
            status = getattr(torch.cuda.cudart(), name)(*args)
        if int(status) != 0:
            # CUDA keeps the error for whoever asks next, which would be somebody else's launch.
            with suppress(RuntimeError):
                torch.ones(1, device=self._device).neg()
            raise RuntimeError(f"{name} failed with CUDA error {int(status)}")


class NoRegistrar:
    """For memory that no device reads."""

    def register(self, address: int, nbytes: int) -> None:
        pass

    def unregister(self, address: int) -> None:
        pass


@dataclass
class _Shared:
    """What the filling thread has in common with the banks; it must not keep them alive."""

    registrar: Registrar
    stop: threading.Event = field(default_factory=threading.Event)
    filled: dict[int, Tensor] = field(default_factory=dict)  # by layer, [E,B]; or packed, [E,N]
    ready: dict[int, tuple[Tensor, ...]] = field(default_factory=dict)  # the experts of those that may be used
    registered: list[int] = field(default_factory=list)
    error: BaseException | None = None
    thread: threading.Thread | None = None


class ExpertBanks:
    """All experts of a store as blocks in host memory.

    Args:
        registrar: page-locks arenas.
        start: fill and register in the background, at once. Without, every expert is staged.
        packed: keep packed what can be; the layout must be :func:`~inference.packed.packable`.

    Attributes:
        packs: whether it does, but for layers that cannot be.

    Raises:
        InferenceError: there is not enough memory for the banks, with the figures.
    """

    def __init__(
        self,
        store: ExpertStore,
        layout: ExpertBlock,
        registrar: Registrar,
        *,
        start: bool = True,
        packed: bool = False,
    ) -> None:
        assert not packed or packable(layout), layout
        self.store, self.layout, self.packs = store, layout, packed
        self._shared = _Shared(registrar)
        self._staging = _arena(STAGING_BUFFERS, layout)
        _register(self._shared, self._staging, "staging buffers")
        self._busy: list[Mark | None] = [None] * STAGING_BUFFERS
        self._turn = 0
        self._finalizer = weakref.finalize(self, _close, self._shared)
        if start:
            check_memory(self.nbytes, "all experts")
            thread = threading.Thread(target=_fill, args=(self._shared, store, layout, packed), name=_NAME, daemon=True)
            self._shared.thread = thread
            thread.start()

    @property
    def nbytes(self) -> int:
        """Of all banks when they are full; more if some layers cannot be packed."""
        each = PackedBlock(self.layout.elements).stride if self.packs else self.layout.nbytes
        return self.store.total * each

    @property
    def ready_share(self) -> float:
        """How much of the model is page-locked, 0 to 1."""
        return len(self._shared.ready) / len(self.store.layers)

    @property
    def filling(self) -> bool:
        """Whether the model is, or comes to be, page-locked; without, every expert is staged."""
        return self._shared.thread is not None

    def join(self) -> None:
        """Wait until all is page-locked. Raises what went wrong."""
        if self._shared.thread is not None:
            self._shared.thread.join()
        self._raise()

    def close(self) -> None:
        """Stop filling and unregister everything. No copy may be under way."""
        self._finalizer()

    def block(self, ref: ExpertRef) -> Tensor | None:
        """See :class:`inference.transfer.Source`. Raises InferenceError if filling the banks failed."""
        if self._shared.error is not None:
            self._raise()
        blocks = self._shared.ready.get(ref.layer)
        return None if blocks is None else blocks[ref.expert]

    def staged(self, ref: ExpertRef, settle: Callable[[Mark], None]) -> tuple[Tensor, Callable[[Mark], None]]:
        """See :class:`inference.transfer.Source`: buffers take turns, each once its last copy is done."""
        turn = self._turn
        self._turn = (turn + 1) % STAGING_BUFFERS
        if self._busy[turn] is not None:
            settle(self._busy[turn])
        self.store.read(ref.layer, ref.expert, self.layout, self._staging[turn])

        def release(mark: Mark) -> None:
            self._busy[turn] = mark

        return self._staging[turn], release

    def packed(self, layer: int) -> bool:
        """Whether the experts of a layer that is ready are packed."""
        return is_packed(self._shared.filled[layer])

    def address(self, ref: ExpertRef) -> int:
        """Where an expert's block begins. Its layer must be ready: see :meth:`join`."""
        bank_EB = self._shared.filled[ref.layer]
        return bank_EB.data_ptr() + ref.expert * bank_EB.shape[1] * bank_EB.itemsize

    def stacked(self, layer: int) -> tuple[Tensor, ...]:
        """The parts of all experts of a layer that is ready and not packed, [E, ...] each."""
        assert not self.packed(layer), layer
        return self.layout.stacked(self._shared.filled[layer])

    def _raise(self) -> None:
        error = self._shared.error
        if error is not None:
            raise error if isinstance(error, InferenceError) else InferenceError(f"filling the host banks: {error}")


def check_memory(needed: int, what: str) -> None:
    """Raises InferenceError with the figures if the machine, or the group it limits us to, has less for ``what``."""
    available = available_bytes()
    if needed > available:
        raise InferenceError(
            f"page-locked memory for {what} takes {needed:,} bytes ({needed / _GIB:.2f} GiB), {available:,} "
            f"({available / _GIB:.2f} GiB) are available to this process; free memory, raise the container's limit, or "
            "serve without banks (--no-pin): experts then pass through staging buffers, which is slower"
        )


def _arena(blocks: int, layout: ExpertBlock) -> Tensor:
    return host_memory(blocks * layout.elements, layout.dtype).view(blocks, layout.elements)


def host_memory(elements: int, dtype: torch.dtype) -> Tensor:
    """An anonymous mapping of just their size, on page boundaries, as :class:`ExpertBanks` keeps experts in."""
    memory = mmap.mmap(-1, elements * dtype.itemsize)
    with suppress(AttributeError, OSError):  # where the system has them: a row of an expert is often a page of 4 KiB
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype)


def _fill(shared: _Shared, store: ExpertStore, layout: ExpertBlock, packed: bool) -> None:
    experts = store.shape.num_experts
    try:
        with ThreadPoolExecutor(min(_READERS, os.cpu_count() or 1), _NAME) as pool:
            for done, layer in enumerate(store.layers, start=1):
                filled = _packed_layer(shared, pool, store, layout, layer) if packed else None
                if filled is None:
                    if packed:
                        left = (len(store.layers) - done) * PackedBlock(layout.elements).stride
                        what = f"layer {layer}, which cannot be packed, and those behind it"
                        check_memory(experts * (layout.nbytes + left), what)
                    arena_EB = _arena(experts, layout)
                    list(pool.map(_reader(shared, store, layout, layer), range(experts), arena_EB))
                    filled = arena_EB, arena_EB.unbind()
                if shared.stop.is_set():
                    return
                shared.filled[layer], blocks = filled
                _register(shared, filled[0], f"layer {layer}")
                shared.ready[layer] = blocks  # last: from here on it is used
    except BaseException as error:  # told to the thread that serves, at its next call
        shared.error = error


def _reader(shared: _Shared, store: ExpertStore, layout: ExpertBlock, layer: int) -> Callable[[int, Tensor], None]:
    def read(expert: int, block_B: Tensor) -> None:
        if not shared.stop.is_set():
            store.read(layer, expert, layout, block_B)

    return read


def _packed_layer(
    shared: _Shared, pool: ThreadPoolExecutor, store: ExpertStore, layout: ExpertBlock, layer: int
) -> tuple[Tensor, tuple[Tensor, ...]] | None:
    """The arena, and of each expert in it the bytes that are used; None, and why is said, if one cannot be packed."""
    experts, stride = store.shape.num_experts, PackedBlock(layout.elements).stride
    arena_EN = host_memory(experts * stride, torch.uint8).view(experts, stride)
    own, refused = threading.local(), list[int]()

    def read_packed(expert: int, into_N: Tensor) -> int:
        if refused or shared.stop.is_set():
            return 0
        if not hasattr(own, "block_B"):
            own.block_B = torch.empty(layout.elements, dtype=layout.dtype)
        store.read(layer, expert, layout, own.block_B)
        nbytes = pack_into(own.block_B, into_N)
        if not nbytes:
            refused.append(expert)
        return nbytes

    used = list(pool.map(read_packed, range(experts), arena_EN))
    if not refused:
        return arena_EN, tuple(block_N[:nbytes] for block_N, nbytes in zip(arena_EN, used, strict=True))
    _log.warning(
        "%s and perhaps others have weights of too many magnitudes to be packed: their layer stays as it is",
        ExpertRef(layer, refused[0]),
    )
    return None


def _register(shared: _Shared, arena: Tensor, what: str) -> None:
    try:
        shared.registrar.register(arena.data_ptr(), arena.nbytes)
    except RuntimeError as error:
        limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
        allowed = "unlimited" if limit == resource.RLIM_INFINITY else f"{limit:,} bytes"
        raise InferenceError(
            f"page-locking {arena.nbytes:,} bytes for {what}: {error}; {available_bytes():,} bytes of memory are "
            f"available, RLIMIT_MEMLOCK is {allowed} (ulimit -l); raise them, or serve without banks (--no-pin)"
        ) from error
    shared.registered.append(arena.data_ptr())


def _close(shared: _Shared) -> None:
    shared.stop.set()
    if threading.current_thread().name.startswith(f"{_NAME}_"):
        # Garbage was collected in a reader, which the filling thread waits for.
        threading.Thread(target=_close, args=(shared,), daemon=True).start()
        return
    if shared.thread is not None and shared.thread is not threading.current_thread():
        shared.thread.join()
    while shared.registered:
        shared.registrar.unregister(shared.registered.pop())
    shared.ready.clear()
    shared.filled.clear()
