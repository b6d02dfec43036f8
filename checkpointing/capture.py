"""Copying live state into slots beside the training step, and back.

On CPU a thread copies with memmove, which releases the GIL and, unlike a tensor copy, starts no second pool of compute
threads. On CUDA the arena is registered once as pinned memory and a side stream copies.
"""

from __future__ import annotations

import ctypes
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future

import torch

from checkpointing.keeper.client import Grant, KeeperClient
from checkpointing.keeper.protocol import KeeperError
from checkpointing.records import PAGE, Header, Kind, RecordError, encode_table, extras_entries, finish, whole_pages
from checkpointing.state.buffers import StateBuffer, layout_of

_PIECE = 64 << 20
_SIGN_OF_LIFE_S = 5.0
_Job = tuple[int, dict[str, bytes], int, "torch.cuda.Event | None"]


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """A flat tensor's memory as uint8, sharing storage."""
    return tensor.detach().view(torch.uint8)


class Capturer:
    """Copies all buffers into a fresh slot after a step, in the background.

    Args:
        client: attached to the keeper.
        buffers: the buffers that the client was attached with.
        reached: a drill's failpoint, called with ("capture", step) when half of a capture's bytes have been copied.
    """

    def __init__(
        self,
        client: KeeperClient,
        buffers: Sequence[StateBuffer],
        reached: Callable[[str, int], None] | None = None,
    ) -> None:
        self._client, self._buffers, self._reached = client, buffers, reached
        self._layout = layout_of(buffers)
        self._table = encode_table(self._layout.entries)
        devices = {b.tensor.device for b in buffers if b.tensor.is_cuda}
        assert len(devices) <= 1, "one worker's state lies on one device"
        self._device = next(iter(devices), None)
        self._memory = torch.frombuffer(client.arena.memory, dtype=torch.uint8)
        self._stream: torch.cuda.Stream | None = None
        if self._device is not None:
            self._stream = torch.cuda.Stream(self._device)
            _register(self._memory)
        self._condition = threading.Condition()
        self._sealed_step = client.restored_step
        self._started_step = -1
        self._copied_step = -1
        self._error: BaseException | None = None
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="capture", daemon=True)
        self._thread.start()

    @property
    def sealed_step(self) -> int:
        """The newest step that the keeper has sealed for this worker, -1 if none."""
        return self._sealed_step

    def start(self, step: int, extras: dict[str, bytes], committed: int) -> None:
        """Begin to capture the state as it is now, and return.

        Args:
            extras: this rank's small state.
            committed: the newest step that all ranks of the job have sealed; nothing at or above it is overwritten.
        Raises the error of an earlier capture.
        """
        self._raise_error()
        assert self._copied_step == self._started_step, "call wait_copied() before the next start()"
        event = None
        if self._stream is not None:
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(self._device))
        self._started_step = step
        self._jobs.put((step, extras, committed, event))

    def wait_copied(self) -> float:
        """Wait until the last started capture holds its own copy of everything: call before state is changed.

        Returns the seconds waited. Raises the error of the capture, or KeeperError if the keeper is silent for minutes.
        """
        return self._wait(lambda: self._copied_step >= self._started_step)

    def wait_sealed(self, step: int) -> float:
        """Wait until ``step`` is sealed. Returns the seconds waited; raises what the keeper reported."""
        return self._wait(lambda: self._sealed_step >= step)

    def close(self) -> None:
        """End after the captures that were started; if the client is closed already, they end with it.

        After a failure close the client first: a capture may be waiting for memory that no one will free.
        """
        self._jobs.put(None)
        self._thread.join()
        if self._stream is not None:
            _check(torch.cuda.cudart().cudaHostUnregister(self._memory.data_ptr()), "cudaHostUnregister")
            self._stream = None
        # This view would keep the arena mapped.
        self._memory = torch.empty(0, dtype=torch.uint8)

    def _wait(self, condition: Callable[[], bool]) -> float:
        started = time.perf_counter()
        since, ended = time.monotonic(), False
        while not ended:
            with self._condition:
                ended = self._condition.wait_for(lambda: condition() or self._error is not None, _SIGN_OF_LIFE_S)
            if not ended:
                self._client.check_heard(since)
        self._raise_error()
        return time.perf_counter() - started

    def _raise_error(self) -> None:
        if self._error is not None:
            raise KeeperError(f"capturing failed: {self._error}") from self._error

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                self._capture(*job)
            except BaseException as error:
                self._fail(error)

    def _fail(self, error: BaseException) -> None:
        with self._condition:
            self._error = self._error or error
            self._condition.notify_all()

    def _capture(self, step: int, extras: dict[str, bytes], committed: int, event: torch.cuda.Event | None) -> None:
        grant = self._client.acquire(step, committed)
        places = self._client.arena.shape.slots()
        base = places[grant.slots[Kind.BASE]]
        offset = self._client.arena.shape.payload_offset
        half = self._layout.nbytes // 2
        moves = self._moves(base.offset + offset)
        if self._stream is not None:
            self._copy_on_stream(moves, half, step, event)
        else:
            self._copy(moves, half, step)
        self._close_record(Kind.BASE, grant, step, self._table, offset, self._layout.nbytes)
        self._write_extras(grant, step, extras)
        with self._condition:
            self._copied_step = step
            self._condition.notify_all()
        self._client.copied(step, grant).add_done_callback(lambda done: self._on_sealed(step, done))

    def _moves(self, start: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
        """(from, to, payload bytes done afterwards), in pieces."""
        for buffer, offset in zip(self._buffers, self._layout.offsets, strict=True):
            source = bytes_of(buffer.tensor)
            piece = _PIECE if buffer.nbytes > _PIECE else max(-(-buffer.nbytes // 2), 1)
            for at in range(0, buffer.nbytes, piece):
                stop = min(at + piece, buffer.nbytes)
                yield source[at:stop], self._memory[start + offset + at : start + offset + stop], offset + stop

    def _copy(self, moves: Iterator[tuple[torch.Tensor, torch.Tensor, int]], half: int, step: int) -> None:
        reached = self._reached
        for source, target, done in moves:
            ctypes.memmove(target.data_ptr(), source.data_ptr(), source.numel())
            if reached is not None and done >= half:
                reached("capture", step)
                reached = None

    def _copy_on_stream(
        self,
        moves: Iterator[tuple[torch.Tensor, torch.Tensor, int]],
        half: int,
        step: int,
        event: torch.cuda.Event | None,
    ) -> None:
        assert self._stream is not None
        assert event is not None
        reached = self._reached
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            self._stream.wait_event(event)
            for source, target, done in moves:
                target.copy_(source, non_blocking=True)
                if reached is not None and done >= half:
                    self._stream.synchronize()
                    reached("capture", step)
                    reached = None
            copied = torch.cuda.Event()
            copied.record(self._stream)
        copied.synchronize()

    def _write_extras(self, grant: Grant, step: int, extras: dict[str, bytes]) -> None:
        entries = extras_entries(extras)
        table, payload = encode_table(entries), b"".join(extras.values())
        offset = PAGE + whole_pages(len(table))
        slot = self._client.arena.slots[grant.slots[Kind.EXTRAS]]
        if offset + len(payload) > len(slot):
            raise RecordError(f"extras of {len(payload):,} bytes do not fit their slot of {len(slot):,}")
        slot[offset : offset + len(payload)] = payload
        self._close_record(Kind.EXTRAS, grant, step, table, offset, len(payload))

    def _close_record(self, kind: Kind, grant: Grant, step: int, table: bytes, offset: int, nbytes: int) -> None:
        header = Header(kind, step, self._client.attempt, grant.sequence, len(table), offset, nbytes)
        finish(self._client.arena.slots[grant.slots[kind]], header, table)

    def _on_sealed(self, step: int, done: Future[None]) -> None:
        error = done.exception()
        if error is not None:
            self._fail(error)
            return
        with self._condition:
            self._sealed_step = max(self._sealed_step, step)
            self._condition.notify_all()


def _register(memory: torch.Tensor) -> None:
    """Pin the arena's pages, as a whole: one call per slot or tensor would be slow."""
    _check(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.numel(), 0), "cudaHostRegister")


def _check(status: object, what: str) -> None:
    if int(status) != 0:  # type: ignore[call-overload]
        raise KeeperError(f"{what} failed with CUDA error {int(status)}")  # type: ignore[call-overload]
