"""Processes that begin with torch, transformers and DeepSpeed imported.

A program of its own takes eight seconds of CPU to import them. Here one server imports them once in a session, and what
is started is a copy of it. The server runs nothing else, so a copy is as fresh as a new interpreter: no threads, no
groups, CUDA untouched. None of this holds in the process that runs the tests.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.preloaded"])


def start(
    body: Callable[..., object],
    *args: Any,
    output: int | Sequence[int],
    stdin: int | None = None,
    environment: Mapping[str, str] | None = None,
) -> BaseProcess:
    """Start ``body(*args)``; its exit status is the process's.

    Args:
        body: A function of a module that can be imported.
        output: File descriptor of its output and errors, or one for each.
        stdin: By default there is no input.
    """
    from multiprocessing.forkserver import ensure_running

    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"  # who has threads cannot be copied
    try:
        ensure_running()
    finally:
        os.environ.pop("OMP_NUM_THREADS") if before is None else os.environ.update(OMP_NUM_THREADS=before)
    out, errors = (output, output) if isinstance(output, int) else output
    null = os.open(os.devnull, os.O_RDONLY)
    try:
        process = _CONTEXT.Process(target=_be, args=(_Streams(null if stdin is None else stdin, out, errors),
                                                     dict(environment or {}), body, args))  # fmt: skip
        process.start()
    finally:
        os.close(null)
    return process


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
    os.environ.update(environment)
    sys.exit(body(*args))


def run_ranks(body: Callable[..., None], folder: Path, *args: Any, world: int = 2, timeout_s: float = 150) -> None:
    """Run ``body(rank, world, *args)`` in every rank of a gloo group. Fails with their last words if one fails.

    Args:
        folder: Where they meet; nobody may have met there before.
    """
    logs = [folder / f"log-{rank}" for rank in range(world)]
    running = {}
    try:
        for rank, log in enumerate(logs):
            with log.open("wb") as output:
                places = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
                process = start(_rank, body, folder, rank, world, args, output=output.fileno(), environment=places)
            running[process.sentinel] = process
        deadline = time.monotonic() + timeout_s
        while running:
            ended = wait(list(running), timeout=max(0.0, deadline - time.monotonic()))
            codes = [(process.join(), process.exitcode)[1] for process in map(running.pop, ended)]
            words = "\n".join(log.read_text()[-3000:] for log in logs)
            assert ended, f"a rank does not end\n{words}"
            assert not any(codes), f"a rank ended with {codes}\n{words}"
    finally:
        for process in running.values():
            process.kill()
            process.join()


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
