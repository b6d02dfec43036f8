"""``planaria serve``: a model behind the OpenAI API until a signal ends it."""

from __future__ import annotations

import asyncio
import copy
import hashlib
import importlib.metadata
import ipaddress
import os
import resource
import signal
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import uvicorn

from inference.errors import InferenceError
from inference.prompts import ChatPrompts, read_template
from inference.runtime import Runtime
from inference.server.app import Limits, make_app
from inference.server.engine_thread import EngineThread
from inference.server.gate import Gate, Http
from inference.server.metrics import Metrics
from inference.server.service import Served, Service
from lora.manifest import MANIFEST_FILE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from inference.batching import Engine
    from inference.engine import LLM

_AFTER_DRAIN_S = 5  # for the answers that the drain has ended to reach their clients
_HURRY_S = 0.5  # the same, after a second signal
_QUEUE = 1024  # connections that the kernel keeps until they are accepted
_AT_ONCE = 16  # connections that are accepted in one turn of the loop, before any of them can be closed
_OTHER_FILES = 6 * _AT_ONCE  # descriptors that connections leave: the closed ones live for a few turns


@dataclass(frozen=True)
class ServeOptions:
    """What the command line says; ``planaria serve --help`` explains each."""

    model_dir: str
    runtime: Runtime
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    model_name: str | None = None
    adapters: tuple[tuple[str, str], ...] = ()
    chat_template: str | None = None
    max_running: int = 64
    max_queue: int = 256
    max_new_tokens: int = 4096
    max_body: int = 4 * 2**20
    body_s: float = 30.0
    drain_s: float = 30.0
    step_s: float = 300.0
    exit_when_hung: bool = False
    log_requests: bool = False


def serve(options: ServeOptions) -> int:
    """Blocks until SIGTERM or SIGINT. Returns the exit status: 0, or 1 if the engine died.

    If it hangs in a step then, the process ends here with status 1: nothing that a step uses can be closed below it.

    Raises InferenceError or AdapterError for a folder or setting that cannot be served.
    """
    listener = _listen(options.host, options.port)
    template = read_template(options.chat_template)
    metrics = Metrics()
    llm, served = _open(options)
    with llm:
        return _run(llm, served, options, metrics, template, listener)


def _run(
    llm: LLM, served: Served, options: ServeOptions, metrics: Metrics, template: str | None, listener: socket.socket
) -> int:
    if template is not None and llm.tokenizer is not None:
        ChatPrompts(llm.tokenizer, template).check()
    _add_figures(llm, metrics)
    server = make_server(llm.engine, served, llm.tokenizer, options, metrics, template)
    if options.api_key is None and not ipaddress.ip_address(listener.getsockname()[0]).is_loopback:
        print(f"warning: anybody who reaches {options.host} may use this server; give --api-key", file=sys.stderr)

    def end(*_: object) -> None:
        # For signals before uvicorn takes them over.
        server.should_exit = True

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    server.run(sockets=[listener])
    return _status(server.engine)


def _status(engine: EngineThread) -> int:
    if engine.alive:
        print("the engine's step does not end; the process ends without it", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(1)
    return 1 if engine.failure else 0


def make_server(
    engine: Engine,
    served: Served,
    tokenizer: PreTrainedTokenizerBase,
    options: ServeOptions,
    metrics: Metrics,
    template: str | None = None,
) -> Server:
    """A server over an engine that is there already; ``run(sockets=[listener])`` starts it."""
    thread = EngineThread(engine, metrics, options.max_queue, options.step_s)
    metrics.gauge("planaria_answers_waiting", "Answers without a token yet", lambda: thread.waiting)
    metrics.gauge("planaria_answers_running", "Answers that have begun", lambda: thread.running)
    metrics.gauge("process_resident_memory_bytes", "Memory of this process", _resident_bytes)
    # A copy: the engine's thread decodes with its own while ours encodes.
    service = Service(thread, served, copy.deepcopy(tokenizer), template)
    limits = Limits(options.max_body, options.body_s)
    config = uvicorn.Config(
        Gate(make_app(service, limits), metrics, options.api_key, options.log_requests),
        http=Http,
        ws="none",
        log_level="error",
        access_log=False,
        server_header=False,
        lifespan="on",
        backlog=_AT_ONCE,
        limit_concurrency=_most_connections() + 1,
        timeout_graceful_shutdown=2 * _AFTER_DRAIN_S,
    )
    return Server(config, service, options.drain_s, options.exit_when_hung)


class Server(uvicorn.Server):
    """Prints the ready line when it listens.

    At the first signal it goes on listening, so that /health can say so, until the engine has finished what it has; at
    the second one it ends.
    """

    def __init__(self, config: uvicorn.Config, service: Service, drain_s: float, exit_when_hung: bool) -> None:
        super().__init__(config)
        self.service, self.engine, self._drain_s = service, service.engine, drain_s
        self._exit_when_hung = exit_when_hung
        self._said_full = -float("inf")

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self.loop = asyncio.get_running_loop()
        self.loop.set_exception_handler(self._on_exception)
        await super().startup(sockets)
        for listener in sockets or ():
            listener.listen(_QUEUE)
            _say_ready(_ready_line(listener, self.service))

    def _on_exception(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """asyncio prints a traceback for each connection that it cannot accept, many times a second."""
        if "socket.accept()" not in context["message"]:
            loop.default_exception_handler(context)
        elif time.monotonic() > self._said_full + 60:
            self._said_full = time.monotonic()
            print(f"cannot accept connections: {context.get('exception')}", file=sys.stderr, flush=True)

    async def on_tick(self, counter: int) -> bool:
        self.engine.look()
        if self.engine.drained or (self.engine.hanging and self._exit_when_hung):
            self.should_exit = True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        late = self.loop.call_later(_AFTER_DRAIN_S, self._abort)
        await super().shutdown(sockets)
        late.cancel()

    def _abort(self) -> None:
        """Closes the connections of clients that do not read: uvicorn would cancel their tasks, with tracebacks."""
        connections = list(self.server_state.connections)
        if connections:
            print(f"{len(connections)} connections did not end in time and were closed", file=sys.stderr, flush=True)
        for connection in connections:
            connection.transport.abort()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if not self.engine.draining:
            self.engine.drain(self._drain_s)
            return
        self.engine.drain(0)
        self.loop.call_soon_threadsafe(self.loop.call_later, _HURRY_S, self._abort)


def _most_connections() -> int:
    """As many as the limit of descriptors allows beside what is open now. Raises InferenceError if that is none."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = soft - len(os.listdir("/proc/self/fd")) - _OTHER_FILES
    if most < 1:
        raise InferenceError(
            f"a process may open {soft} files here, which leaves none for clients; raise it, as with `ulimit -n 1024`"
        )
    return min(most, 4096)


def _listen(host: str, port: int) -> socket.socket:
    """Taken before the model is loaded: a port that is in use is said at once."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_QUEUE)  # two that bind before either listens would both succeed
    except (OSError, OverflowError) as error:
        raise InferenceError(
            f"cannot listen on {host}, port {port}: {error}; give another --host or --port (0: any that is free)"
        ) from error
    return listener


def _ready_line(listener: socket.socket, service: Service) -> str:
    host, port = listener.getsockname()[:2]
    host = f"[{host}]" if ":" in host else host
    models = ", ".join(service.served.models)
    chat = "" if service.has_chat_template else "; no chat template, so plain completions only"
    return f"ready: http://{host}:{port}/v1 serves {models}{chat}"


def _say_ready(line: str) -> None:
    try:
        print(line, flush=True)
    except OSError as error:  # no reason not to serve
        print(f"standard output: {error.strerror}; {line}", file=sys.stderr, flush=True)


def _open(options: ServeOptions) -> tuple[LLM, Served]:
    from inference.limits import MAX_ROWS

    names = [name for name, _ in options.adapters]
    if len(set(names)) < len(names):
        raise InferenceError(f"--adapter: two adapters have one name in {', '.join(names)}; give each its own")
    llm = options.runtime.open(
        options.model_dir,
        adapters=dict(options.adapters),
        max_sequences=options.max_running,
        max_rows=max(MAX_ROWS, options.max_running),
    )
    if llm.tokenizer is None:
        raise InferenceError(f"{options.model_dir} has no tokenizer, which serving needs; add tokenizer.json")
    limits = llm.engine.limits
    positions = limits.kv_tokens if limits.positions is None else min(limits.positions, limits.kv_tokens)
    folder = Path(options.model_dir).resolve()
    return llm, Served(
        name=options.model_name or folder.name,
        adapters=tuple(names),
        positions=positions,
        vocabulary=limits.vocabulary,
        max_new_tokens=min(options.max_new_tokens, positions),
        fingerprints={None: _fingerprint(folder)} | {name: _fingerprint(folder, at) for name, at in options.adapters},
    )


def _fingerprint(folder: Path, adapter: str | None = None) -> str:
    """Of the model's files, without reading the weights, of the adapter's hashes, and of what computes."""
    files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(folder.glob("*.safetensors"))]
    versions = [importlib.metadata.version(name) for name in ("torch", "transformers")]
    hashes = None if adapter is None else (Path(adapter) / MANIFEST_FILE).read_text(encoding="utf-8")
    text = repr((files, versions, (folder / "config.json").read_text(), hashes))
    return f"fp_{hashlib.sha256(text.encode()).hexdigest()[:10]}"


def _add_figures(llm: LLM, metrics: Metrics) -> None:
    from inference.cache import CacheCounts

    counts = CacheCounts() if llm.cache is None else llm.cache.counts
    metrics.total("planaria_expert_hits_total", "Experts found resident", lambda: counts.hits)
    metrics.total("planaria_expert_misses_total", "Experts that had to be fetched", lambda: counts.misses)
    metrics.total("planaria_expert_bytes_total", "Bytes of experts fetched", lambda: llm.stats().bytes_fetched)
    metrics.gauge("planaria_recording_failed", "1 when --trace has stopped", lambda: llm.recording_failed)
    metrics.gauge("planaria_kv_blocks", "Blocks of the key-value cache", lambda: llm.engine.load().blocks)
    metrics.gauge("planaria_kv_blocks_used", "Blocks that running requests hold", lambda: llm.engine.load().used)


def _resident_bytes() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
