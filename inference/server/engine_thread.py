"""The engine in a thread of its own; asyncio's thread hands it requests and gets its outputs.

Everything but ``_run`` and what it calls happens in asyncio's thread, so nothing here needs a lock.
"""

from __future__ import annotations

import asyncio
import itertools
import sys
import threading
import time
import traceback
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from checkpointing.phases import Ticker
from inference.requests import Output, Request
from inference.server.errors import ApiError, engine_failed, queue_full, shutting_down
from inference.server.metrics import Metrics

if TYPE_CHECKING:
    from inference.batching import Engine

_HUNG_S = 5.0  # how long after the drain a step may take
_IDLE_S = 0.5  # how often an idle engine looks whether it should end


@dataclass(eq=False)
class Call:
    """The answers that one HTTP request waits for; ``index`` numbers them by the engine's request id."""

    index: Mapping[str, int]
    arrived: float
    outputs: asyncio.Queue[Output | ApiError] = field(default_factory=asyncio.Queue)
    unfinished: set[str] = field(default_factory=set)
    last_token: dict[str, float] = field(default_factory=dict)
    first_token_s: float | None = None
    new_tokens: int = 0

    async def events(self) -> AsyncIterator[tuple[int, Output]]:
        """(answer's number, output) until all answers are finished. Raises ApiError if one fails."""
        open_ids = set(self.index)
        while open_ids:
            output = await self.outputs.get()
            if isinstance(output, ApiError):
                raise output
            if output.finish == "error":
                raise engine_failed(output.error or "it gave no reason")
            if output.finish is not None:
                open_ids.discard(output.id)
            yield self.index[output.id], output


class EngineThread:
    """Drives an engine while it has work.

    Args:
        engine: nobody else may call its ``step``.
        max_queue: answers that may wait for their first token; more are refused with status 429.
        step_s: a step that takes longer hangs; 0: none ever does.
    """

    def __init__(self, engine: Engine, metrics: Metrics, max_queue: int, step_s: float = 0.0) -> None:
        self.engine, self.metrics, self.max_queue, self.step_s = engine, metrics, max_queue, step_s
        self.failure: str | None = None  # the engine is dead
        self.hanging: str | None = None  # it is in a step that takes too long
        self.trouble: str | None = None  # the last answer that ended did so by an error of the engine
        self._calls: dict[str, Call] = {}
        self._waiting: set[str] = set()
        self._numbers = itertools.count()
        self._step: int | None = None  # number of the one that is being made
        self._seen: int | None = None
        self._step_age_s = 0.0
        self._ticker = Ticker()
        self._wake = threading.Event()
        self._ended = threading.Event()
        self._drain_until: float | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # -- asyncio's thread ----------------------------------------------------------------------------------------------

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def stop(self) -> None:
        """End the thread after the step that it is in, unless that hangs."""
        self._ended.set()
        self._wake.set()
        self._thread.join(timeout=0 if self.hanging else 30)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def look(self) -> None:
        """Whether the step that is being made hangs; to be called several times a second.

        Time in which nobody looked does not count: a process that was stopped for an hour has no step of an hour.
        """
        if self.failure:  # a dead engine is in no step
            return
        elapsed, step = self._ticker.elapsed(), self._step
        self._step_age_s = self._step_age_s + elapsed if step is not None and step == self._seen else 0.0
        self._seen = step
        too_long = 0 < self.step_s < self._step_age_s
        until = self._drain_until
        if too_long or (until is not None and self._calls and time.monotonic() > until + _HUNG_S):
            self._hang()
        elif self.hanging and not self.draining:
            print("the engine's step has ended after all", file=sys.stderr, flush=True)
            self.hanging = None

    def _hang(self) -> None:
        if self.hanging:
            return
        age = f"one step has taken {self._step_age_s:.1f} s"
        self.hanging = f"{age} and hangs; the log says where"
        stack = sys._current_frames().get(self._thread.ident or 0)
        where = "".join(traceback.format_stack(stack)) if stack is not None else ""
        print(f"the engine hangs: {age}; its thread is at\n{where}", file=sys.stderr, flush=True)
        self._fail_all(engine_failed(self.hanging))

    def drain(self, seconds: float) -> None:
        """Take no more requests; fail those that are not answered in time. May be called in a signal handler."""
        # The thread notices by itself: a handler that runs while `_wake` is being set would wait for its lock for ever.
        self._drain_until = time.monotonic() + seconds

    @property
    def draining(self) -> bool:
        return self._drain_until is not None

    @property
    def drained(self) -> bool:
        """Draining, and nothing is open any more."""
        return self.draining and not self._calls

    @property
    def waiting(self) -> int:
        """Answers without a token yet."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Answers that have begun."""
        return len(self._calls) - len(self._waiting)

    def check_open(self) -> None:
        """Raises ApiError if no request can be taken."""
        if reason := self.failure or self.hanging:
            raise engine_failed(reason)
        if self.draining:
            raise shutting_down()

    def submit(self, requests: Sequence[Request], arrived: float) -> Call:
        """Takes all of ``requests``, under names of its own, or none of them.

        Raises ApiError if there is no room or no engine, and whatever the engine raises for a bad request.
        """
        self.check_open()
        if self.waiting + len(requests) > self.max_queue:
            raise queue_full(self.max_queue)
        named = [replace(request, id=f"r{next(self._numbers)}") for request in requests]
        taken: list[str] = []
        try:
            for request in named:
                self.engine.submit(request)
                taken.append(request.id)
        except BaseException:
            for name in taken:
                self.engine.cancel(name)
            raise
        call = Call({name: i for i, name in enumerate(taken)}, arrived, unfinished=set(taken))
        self._calls.update(dict.fromkeys(taken, call))
        self._waiting.update(taken)
        self._wake.set()
        return call

    def cancel(self, call: Call) -> bool:
        """Stop what is unfinished of a call, from the next step on. Whether anything was."""
        left = bool(call.unfinished)
        for name in list(call.unfinished):
            self.engine.cancel(name)
            self._forget(name)
        if left:
            self._wake.set()
        return left

    def _forget(self, name: str) -> None:
        self._waiting.discard(name)
        if (call := self._calls.pop(name, None)) is not None:
            call.unfinished.discard(name)

    def _deliver(self, outputs: Sequence[Output], now: float) -> None:
        for output in outputs:
            call = self._calls.get(output.id)
            if call is None:
                continue  # cancelled since
            self._count(call, output, now)
            if output.finish is not None:
                if output.finish != "cancelled":
                    self.trouble = (output.error or "no reason given") if output.finish == "error" else None
                self._forget(output.id)
            call.outputs.put_nowait(output)

    def _count(self, call: Call, output: Output, now: float) -> None:
        new = len(output.new_ids)
        if not new:
            return
        self.metrics.new_tokens.add(new)
        call.new_tokens += new
        self._waiting.discard(output.id)
        before = call.last_token.get(output.id)
        if before is not None:
            self.metrics.inter_token.observe((now - before) / new, new)
        else:
            self.metrics.first_token.observe(now - call.arrived)
            if call.first_token_s is None:
                call.first_token_s = now - call.arrived
        call.last_token[output.id] = now

    def _fail_all(self, error: ApiError) -> None:
        calls = set(self._calls.values())
        for call in calls:
            self.cancel(call)
            call.outputs.put_nowait(error)

    # -- the engine's thread -------------------------------------------------------------------------------------------

    def _run(self) -> None:
        assert self._loop is not None
        try:
            while not self._ended.is_set():
                if self._drain_until is not None and time.monotonic() > self._drain_until:
                    self._loop.call_soon_threadsafe(self._fail_all, shutting_down())
                    self._wake.wait(_IDLE_S)  # until the cancellations are there
                    self._wake.clear()
                if not self.engine.has_work():
                    self._wake.wait(_IDLE_S)
                    self._wake.clear()
                    continue
                self._step = next(self._numbers)
                outputs = self.engine.step()
                self._step = None
                if outputs and not self._ended.is_set():
                    self._loop.call_soon_threadsafe(self._deliver, outputs, time.monotonic())
        except BaseException as error:
            traceback.print_exc(file=sys.stderr)
            self.failure = f"{type(error).__name__}; restart the server, its log says more"
            self._step = None  # it has ended
            self._loop.call_soon_threadsafe(self._fail_all, engine_failed(self.failure))
