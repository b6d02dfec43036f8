"""Processes that begin with torch, transformers and DeepSpeed imported.

A program of its own takes eight seconds of CPU to import them. Here one server imports them once in a session, and what
is started is a copy of it. The server runs nothing else, so a copy is as fresh as a new interpreter: no threads, no
groups. Neither holds in the process that runs the tests. Copies compute on the CPU.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from datetime import timedelta
from multiprocessing import forkserver
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import DupFd
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from trainer import cli
from trainer.rendezvous import die_with_launcher

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.preloaded"])
_ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}  # as it is before any test changes it


def start(
    body: Callable[..., object],
    *args: Any,
    output: int | Sequence[int],
    stdin: int | None = None,
    environment: Mapping[str, str] | None = None,
) -> Copy:
    """Start ``body(*args)`` in a session of its own; what it returns is the process's exit status.

    Args:
        body: A function of a module that can be imported.
        output: File descriptor of its output and errors, or one for each.
        stdin: By default there is no input.
    """
    _server_is_ready()
    out, errors = (output, output) if isinstance(output, int) else output
    with open(os.devnull, "rb") as null:
        streams = _Streams(null.fileno() if stdin is None else stdin, out, errors)
        variables = {**_ENVIRONMENT, **(environment or {})}
        process = _CONTEXT.Process(target=_be, args=(streams, variables, body, args))
        process.start()
    return Copy(process)


@functools.cache
def _server_is_ready() -> None:
    """So that no copy's time limit counts the server's imports."""
    first = _CONTEXT.Process(target=int)
    first.start()
    first.join()


class Copy:
    """A started process. The interface is Popen's."""

    def __init__(self, process: BaseProcess) -> None:
        self._process = process
        self.pid: int = process.pid
        self.sentinel = process.sentinel

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    poll = returncode.fget

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(str(self._process), timeout)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def planaria(*arguments: object, output: int | Sequence[int], **options: Any) -> Copy:
    """``planaria ARGUMENTS`` without the seconds that its imports take."""
    return start(cli.main, [str(argument) for argument in arguments], output=output, **options)


def run_planaria(*arguments: object, timeout_s: float = 120, **environment: str) -> subprocess.CompletedProcess[str]:
    """:func:`planaria`, what it said, and its exit status."""
    with TemporaryFile("w+") as out, TemporaryFile("w+") as errors:
        process = planaria(*arguments, output=(out.fileno(), errors.fileno()), environment=environment)
        try:
            status = process.wait(timeout=timeout_s)
        finally:
            process.kill()
        out.seek(0)
        errors.seek(0)
        return subprocess.CompletedProcess(arguments, status, out.read(), errors.read())


class _Streams:
    """Descriptors that become 0, 1 and 2 of the process that they are sent to."""

    def __init__(self, *descriptors: int) -> None:
        self.descriptors = descriptors

    def __getstate__(self) -> list[Any]:
        return [DupFd(descriptor) for descriptor in self.descriptors]

    def __setstate__(self, sent: list[Any]) -> None:
        for number, descriptor in enumerate(sent):
            opened = descriptor.detach()
            os.dup2(opened, number)
            os.close(opened)


def _be(_: _Streams, environment: dict[str, str], body: Callable[..., object], args: tuple[Any, ...]) -> None:
    # Without this descriptor the server ends with the process that runs the tests, and the copies with the server.
    os.close(forkserver._forkserver._forkserver_alive_fd)
    die_with_launcher()
    os.setsid()
    sys.stdin = open(0, closefd=False)  # noqa: SIM115 - multiprocessing has put an empty one there
    os.environ.clear()
    os.environ.update(environment)
    sys.exit(body(*args))


def run_program(name: str | Path, arguments: Sequence[object]) -> None:
    """The body of ``python NAME ARGUMENTS``, or of ``python -m NAME ARGUMENTS``."""
    sys.argv = [str(name), *map(str, arguments)]
    run = runpy.run_path if isinstance(name, Path) else runpy.run_module
    run(str(name), run_name="__main__")


def run_workers(world: int, name: str | Path, *arguments: object, timeout_s: float = 150) -> list[str]:
    """:func:`run_program` on so many ranks, which find each other as torchrun's do. What each of them printed."""
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    with ExitStack() as kept:
        outputs = [kept.enter_context(TemporaryFile("w+")) for _ in range(world)]
        running = []
        for rank, output in enumerate(outputs):
            environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **_places(rank, world)}
            copy = start(run_program, name, arguments, output=output.fileno(), environment=environment)
            kept.callback(copy.kill)
            running.append(copy)
        codes = [copy.wait(timeout_s) for copy in running]
        printed = [(output.seek(0), output.read())[1] for output in outputs]
    assert codes == [0] * world, "\n".join(text[-3000:] for text in printed)
    return printed


def _places(rank: int, world: int) -> dict[str, str]:
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    return {name: str(number) for name, number in places.items()}


def run_ranks(body: Callable[..., None], folder: Path, *args: Any, world: int = 2, timeout_s: float = 150) -> None:
    """Run ``body(rank, world, *args)`` in every rank of a gloo group. Fails with their last words if one fails.

    Args:
        folder: Where they meet; nobody may have met there before.
    """
    logs = [folder / f"log-{rank}" for rank in range(world)]
    running: dict[int, Copy] = {}
    try:
        for rank, log in enumerate(logs):
            with log.open("wb") as output:
                process = start(
                    _rank, body, folder, rank, world, args, output=output.fileno(), environment=_places(rank, world)
                )
            running[process.sentinel] = process
        deadline = time.monotonic() + timeout_s
        while running:
            ended = wait(list(running), timeout=max(0.0, deadline - time.monotonic()))
            codes = [running.pop(sentinel).wait() for sentinel in ended]
            words = "\n".join(log.read_text()[-3000:] for log in logs)
            assert ended, f"a rank does not end\n{words}"
            assert not any(codes), f"a rank ended with {codes}\n{words}"
    finally:
        for process in running.values():
            process.kill()
            process.wait()


def _rank(body: Callable[..., None], folder: Path, rank: int, world: int, args: tuple[Any, ...]) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    meet = f"file://{folder}/meet"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=world, timeout=timedelta(seconds=100))
    body(rank, world, *args)
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's and DeepSpeed's threads end with the process
