"""A tiny model with a chat template, one real server for all tests of it, and an engine that does as it is told."""

from __future__ import annotations

import http.client
import json
import os
import queue
import re
import shutil
import signal
import socket
import threading
import time
from contextlib import contextmanager

import pytest

from inference.requests import Output
from tests.forked import planaria

KEY = "sk-secret"
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="session")
def chat_folder(model_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("served") / "tiny"
    shutil.copytree(model_folder, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="session")
def tokenizer(chat_folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(chat_folder)


class Address:
    """Where a server is, and ways to talk to it."""

    key = KEY

    def __init__(self, port: int) -> None:
        self.port = port

    def client(self, key: str = KEY, **options):
        import openai

        return openai.OpenAI(
            base_url=f"http://127.0.0.1:{self.port}/v1", api_key=key, max_retries=0, timeout=30, **options
        )

    def raw(self, method: str, path: str, body: bytes | None = None, **headers: str):
        """(status, headers, body) of a request as it stands."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(method, path, body, {"authorization": f"Bearer {KEY}"} | headers)
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read()
        finally:
            connection.close()

    def post(self, path: str, body: object):
        text = body if isinstance(body, bytes) else json.dumps(body).encode()
        status, headers, answer = self.raw("POST", path, text, **{"content-type": "application/json"})
        return status, headers, json.loads(answer)

    def metrics(self) -> dict[str, float]:
        _, _, text = self.raw("GET", "/metrics")
        samples = [line.rpartition(" ") for line in text.decode().splitlines() if not line.startswith("#")]
        return {name: float(value) for name, _, value in samples}

    def until(self, reached, seconds: float = 20):
        """The metrics once ``reached(metrics)`` holds."""
        end = time.monotonic() + seconds
        while not reached(metrics := self.metrics()):
            assert time.monotonic() < end, metrics
        return metrics

    @contextmanager
    def open_request(self, path: str, body: dict):
        """A request that was sent and whose answer nobody has read; its socket is closed in the end."""
        text = json.dumps(body).encode()
        head = (
            f"POST {path} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}\r\n"
            f"content-type: application/json\r\ncontent-length: {len(text)}\r\n\r\n"
        )
        with socket.create_connection(("127.0.0.1", self.port), timeout=30) as connection:
            connection.sendall(head.encode() + text)
            yield connection


@pytest.fixture(scope="session")
def adapter_folder(chat_folder, tmp_path_factory):
    """An adapter whose every factor is set, so that it moves the output."""
    import torch
    from transformers import AutoModelForCausalLM

    from lora.attach import attach
    from lora.config import BankConfig
    from lora.format import collect_adapter, save_adapter
    from moe.convert import convert
    from moe.fingerprint import fingerprint

    folder = tmp_path_factory.mktemp("adapters") / "tuned"
    banks = {"experts": BankConfig(preset="expert-lora", targets=("gate_up_proj", "down_proj"), r=4, alpha=8.0)}
    model = AutoModelForCausalLM.from_pretrained(chat_folder)
    attach(model, banks, convert(model), layout_ep=1)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".B"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    save_adapter(folder, collect_adapter(model), banks, fingerprint(chat_folder))
    return folder


@pytest.fixture(scope="session")
def server(chat_folder, adapter_folder):
    """``planaria serve``; when the tests are done, SIGTERM must end it with status 0."""
    command = ["serve", chat_folder, "--port", "0", "--expert-budget", "0.25"]
    command += ["--api-key", KEY, "--adapter", f"tuned={adapter_folder}", "--max-queue", "20", "--max-body", "100000"]
    command += ["--max-tokens", "200", "--log-requests"]
    (out, its_out), (err, its_err) = os.pipe(), os.pipe()
    process = planaria(*command, output=(its_out, its_err))
    os.close(its_out)
    os.close(its_err)
    lines: queue.Queue[str] = queue.Queue()
    errors: list[str] = []
    readers = [
        threading.Thread(target=_each_line, args=(out, lines.put), daemon=True),
        threading.Thread(target=_each_line, args=(err, errors.append), daemon=True),
    ]
    for reader in readers:
        reader.start()
    try:
        line = lines.get(timeout=120)
        found = re.fullmatch(r"ready: http://127\.0\.0\.1:(\d+)/v1 serves tiny, tiny:tuned\n", line)
        assert found, line
        address = Address(int(found[1]))
        address.log = errors
        yield address
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=40) == 0
    except queue.Empty:
        pytest.fail("no ready line: " + "".join(errors))
    finally:
        process.kill()
        process.wait(timeout=10)


def _each_line(descriptor: int, take) -> None:
    with open(descriptor) as stream:
        for line in stream:
            take(line)


class ToldEngine:
    """An engine that does as it is told: for each :meth:`allow` every request gets one token, which spells ``A``."""

    def __init__(self) -> None:
        self.requests: dict = {}
        self.made: dict[str, int] = {}
        self.cancelled: list[str] = []
        self.raises: BaseException | None = None  # what the next step raises
        self.fails: str | None = None  # the error with which the next step ends all requests
        self.let_go = threading.Event()  # while it is not set, a step hangs
        self.let_go.set()
        self.refuses: Exception | None = None  # what submit raises for a prompt that begins with token 1
        self._cancel: set[str] = set()
        self._lock = threading.Lock()
        self._steps = threading.Semaphore(0)

    def allow(self, steps: int) -> None:
        for _ in range(steps):
            self._steps.release()

    def submit(self, request) -> None:
        if self.refuses is not None and request.prompt_ids[0] == 1:
            raise self.refuses
        with self._lock:
            self.requests[request.id] = request
            self.made[request.id] = 0

    def cancel(self, request_id: str) -> None:
        with self._lock:
            if request_id in self.requests:
                self._cancel.add(request_id)

    def has_work(self) -> bool:
        with self._lock:
            return bool(self.requests)

    def step(self) -> list[Output]:
        if self.raises is not None:
            raise self.raises
        self.let_go.wait()
        allowed = self._steps.acquire(timeout=0.02)
        with self._lock:
            outputs = [self._end(name, "cancelled") for name in self._cancel]
            self.cancelled += self._cancel
            self._cancel.clear()
            for name in [*self.requests] if allowed else ():
                if self.fails is not None:
                    outputs.append(self._end(name, "error", self.fails))
                    continue
                self.made[name] += 1
                if self.made[name] == self.requests[name].max_new_tokens:
                    outputs.append(Output(name, (65,), "A", finish=self._end(name, "length").finish))
                else:
                    outputs.append(Output(name, (65,), "A"))
        return outputs

    def _end(self, name: str, finish: str, error: str | None = None) -> Output:
        del self.requests[name]
        return Output(name, finish=finish, error=error)


@pytest.fixture
def told(tokenizer):
    """Starts servers in this process: ``engine, address, server = told(max_queue=2)``. They are ended afterwards."""
    from inference.runtime import Runtime
    from inference.server.metrics import Metrics
    from inference.server.serve import ServeOptions, make_server
    from inference.server.service import Served

    started = []

    def start(**options):
        engine = ToldEngine()
        served = Served("tiny", (), positions=256, vocabulary=512, max_new_tokens=200, fingerprints={None: "fp_x"})
        chosen = ServeOptions("tiny", Runtime(), api_key=KEY, **options)
        server = make_server(engine, served, tokenizer, chosen, Metrics())
        listener = socket.create_server(("127.0.0.1", 0))
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)  # so that a client can be slow soon
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        server.thread = thread
        thread.start()
        started.append((engine, server, thread))
        return engine, Address(listener.getsockname()[1]), server

    yield start
    for engine, server, thread in started:
        engine.let_go.set()
        engine.allow(10_000)
        server.should_exit = True
        thread.join(timeout=30)
        assert not thread.is_alive(), "the server does not end"
