"""The keeper's socket loop: one thread that owns all bookkeeping. Slow work happens elsewhere and calls back in."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

from checkpointing.keeper.protocol import Inbox, Message, encode, send_with_fds


class Connection:
    """A worker's end of the line. Sending never blocks: what the socket does not take is kept."""

    def __init__(self, loop: Loop, sock: socket.socket) -> None:
        self.sock = sock
        self.inbox = Inbox()
        self.authenticated = False
        self.closed = False
        self._loop = loop
        self._out: deque[tuple[memoryview, list[int]]] = deque()

    def answer(self, request: Message, fields: Message, fds: Sequence[int] = ()) -> None:
        """Queue an answer. Descriptors are duplicated, so the caller keeps its own."""
        if not self.closed:
            kept = [os.dup(fd) for fd in fds]
            self._out.append((memoryview(encode({"id": request["id"], **fields}, kept)), kept))
            self.flush()

    def flush(self) -> None:
        while self._out:
            data, fds = self._out[0]
            try:
                sent = send_with_fds(self.sock, data, fds)
            except BlockingIOError:
                break
            except OSError:
                # The reading side will find out and clean up.
                self._drop_output()
                break
            for fd in fds:
                os.close(fd)
            self._out[0] = (data[sent:], [])
            if sent == len(data):
                self._out.popleft()
        self._loop.watch(self, writing=bool(self._out))

    @property
    def idle(self) -> bool:
        return not self._out

    def _drop_output(self) -> None:
        for _, fds in self._out:
            for fd in fds:
                os.close(fd)
        self._out.clear()

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self._drop_output()
            self._loop.forget(self)
            self.inbox.close()
            self.sock.close()


class Loop:
    """Accepts, reads and writes until ``stop``.

    Args:
        listener: a listening socket; the loop takes it over.
        on_message: called with (connection, message, descriptors).
        on_closed: called once for a connection that its worker closed.
        on_signal: called when SIGTERM arrives.
    """

    def __init__(
        self,
        listener: socket.socket,
        on_message: Callable[[Connection, Message, list[int]], None],
        on_closed: Callable[[Connection], None],
        on_signal: Callable[[], None],
    ) -> None:
        self._selector = selectors.DefaultSelector()
        self._listener = listener
        self._on_message, self._on_closed, self._on_signal = on_message, on_closed, on_signal
        self._calls: deque[Callable[[], None]] = deque()
        self._wake_in, self._wake_out = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._timers: dict[str, tuple[float, Callable[[], None]]] = {}
        self._stopping = False
        self.connections: set[Connection] = set()
        listener.setblocking(False)
        self._selector.register(listener, selectors.EVENT_READ)
        self._selector.register(self._wake_in, selectors.EVENT_READ)

    def install_signals(self) -> None:
        """SIGTERM ends the keeper in good order; a closed terminal or Ctrl-C does not concern it."""
        signal.signal(signal.SIGTERM, lambda *_: self.call(self._on_signal))
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    def call(self, function: Callable[[], None]) -> None:
        """Have the loop call ``function``; from any thread."""
        self._calls.append(function)
        # When the pipe is full, wake-ups enough are in it.
        with contextlib.suppress(BlockingIOError):
            os.write(self._wake_out, b"!")

    def set_timer(self, name: str, seconds: float | None, function: Callable[[], None] = lambda: None) -> None:
        """Call ``function`` once after ``seconds``, in place of the earlier timer of this name; None clears it."""
        self._timers.pop(name, None)
        if seconds is not None:
            self._timers[name] = (time.monotonic() + seconds, function)

    def watch(self, connection: Connection, writing: bool) -> None:
        if not connection.closed:
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if writing else 0)
            self._selector.modify(connection.sock, events, connection)

    def forget(self, connection: Connection) -> None:
        self.connections.discard(connection)
        self._selector.unregister(connection.sock)

    def stop(self) -> None:
        """End after what is queued for the workers has been sent."""
        self._stopping = True

    def run(self) -> None:
        while not (self._stopping and all(c.idle for c in self.connections)):
            first = min((when for when, _ in self._timers.values()), default=None)
            timeout = None if first is None else max(first - time.monotonic(), 0)
            # While stopping, a worker that no longer reads must not keep us.
            ready = self._selector.select(1.0 if self._stopping else timeout)
            if self._stopping and not ready:
                break
            for key, events in ready:
                self._handle(key, events)
            self._run_calls()
            self._run_timers()

    def _handle(self, key: selectors.SelectorKey, events: int) -> None:
        if key.fileobj is self._listener:
            self._accept()
        elif key.fileobj == self._wake_in:
            os.read(self._wake_in, 4096)
        elif not key.data.closed:
            if events & selectors.EVENT_WRITE:
                key.data.flush()
            if events & selectors.EVENT_READ:
                self._read(key.data)

    def _run_calls(self) -> None:
        while self._calls:
            self._guarded(self._calls.popleft())

    def _run_timers(self) -> None:
        now = time.monotonic()
        for name in [name for name, (when, _) in self._timers.items() if when <= now]:
            # An earlier one may have cleared it.
            if name in self._timers:
                self._guarded(self._timers.pop(name)[1])

    def _guarded(self, function: Callable[[], None]) -> None:
        """One failing call must not end the keeper: it holds everybody's state."""
        try:
            function()
        except Exception:
            traceback.print_exc()

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except BlockingIOError:
            return
        sock.setblocking(False)
        connection = Connection(self, sock)
        self.connections.add(connection)
        self._selector.register(sock, selectors.EVENT_READ, connection)

    def _read(self, connection: Connection) -> None:
        try:
            alive = connection.inbox.receive(connection.sock)
        except BlockingIOError:
            return
        except OSError:
            alive = False
        while not connection.closed and (got := connection.inbox.pop()) is not None:
            message, fds = got
            self._guarded(partial(self._on_message, connection, message, fds))
        if not alive and not connection.closed:
            connection.close()
            self._guarded(lambda: self._on_closed(connection))
