"""Small state, real keepers, real worker processes."""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpointing.capture import Capturer
from checkpointing.keeper.client import KeeperClient
from checkpointing.keeper.control import stop_keeper
from checkpointing.keeper.launch import is_alive, read_info
from checkpointing.partial import Experts, select
from checkpointing.protection import dense, pec, wal
from checkpointing.recover import Recovery
from checkpointing.recovery import RecoveryPlan, plan_recovery
from checkpointing.redo import Redo
from checkpointing.restore import Target
from checkpointing.state.buffers import StateBuffer, StateSpan
from checkpointing.state.gradients import StepLog, settings_of
from checkpointing.state.partitions import describe_partitions
from checkpointing.units import Range, expert_of
from moe.refs import ExpertRef
from tests.checkpointing.driver import pinned

FINGERPRINT = "0123456789abcdef"
UNIT = "L00.E003.down_proj"
ELEMENTS = 3000


def make_buffers(rank: int, world: int, seed: int = 0) -> list[StateBuffer]:
    """One rank's equal share of an expert tensor (fp32, two kinds, padded) and a bf16 parameter of its own."""
    torch.manual_seed(1000 * seed + rank)
    share = ELEMENTS // world
    lo = rank * share
    buffers = []
    for kind in ("master", "exp_avg"):
        spans = (StateSpan(Range(UNIT, kind, lo, lo + share), 7),)
        buffers.append(StateBuffer(f"group0.{kind}", torch.randn(share + 20), spans))
    own = StateSpan(Range(f"model.norm{rank}.weight", "master", 0, 33), 0)
    buffers.append(StateBuffer("group1.master", torch.randn(33).bfloat16(), (own,)))
    return buffers


def contents(buffers: Sequence[StateBuffer]) -> list[bytes]:
    """The bytes that spans name, in order: what must survive."""
    return [
        b.tensor[s.offset : s.offset + s.range.size].view(torch.uint8).numpy().tobytes()
        for b in buffers
        for s in b.spans
    ]


def extras(rank: int, step: int) -> dict[str, bytes]:
    return {"rng": f"rank {rank} step {step}".encode(), "empty": b""}


@dataclass
class Job:
    """All workers of a job in this process: clients, capturers and what each step's state was."""

    run_dir: Path
    world: int = 2
    attempt: int = 0
    disk: dict[str, int] | None = None
    generations: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    reached: Callable[[str, int], None] | None = None
    history: dict[int, list[list[bytes]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.names = [f"dp{rank:04d}" for rank in range(self.world)]
        self.make_state()
        self.clients = [
            KeeperClient.attach(self.run_dir, name, self.names, p.shape, FINGERPRINT, rules=p.rules,
                                attempt=self.attempt, disk=self.disk, partitions=self.partitions(rank), **self.options)
            for rank, (name, p) in enumerate(zip(self.names, self.protections, strict=True))
        ]  # fmt: skip
        self.capturers: list[Capturer] = []

    def make_state(self) -> None:
        self.buffers = [make_buffers(rank, self.world) for rank in range(self.world)]
        generations = self.generations or (4 if self.disk and self.disk["every"] else 3)
        self.protections = [dense(buffers, generations) for buffers in self.buffers]

    def partitions(self, rank: int) -> str:
        return ""

    def target(self, rank: int) -> Target:
        return Target(self.buffers[rank], self.names[rank])

    def recover(self) -> tuple[RecoveryPlan, list[dict[str, bytes]], list[Recovery]]:
        ranks = [Recovery(client, self.run_dir, self.target(rank)) for rank, client in enumerate(self.clients)]
        plan = plan_recovery([rank.report() for rank in ranks])
        return plan, [rank.apply(plan) for rank in ranks], ranks

    def begin(self) -> None:
        self.capturers = [
            Capturer(client, buffers, p.log, self.reached)
            for client, buffers, p in zip(self.clients, self.buffers, self.protections, strict=True)
        ]

    def step(self, step: int, wait: bool = True) -> None:
        """Change all state, as an optimizer would, and capture it."""
        committed = min(c.sealed_step for c in self.capturers)
        for rank, (buffers, capturer) in enumerate(zip(self.buffers, self.capturers, strict=True)):
            torch.manual_seed(100 * step + rank)
            for buffer in buffers:
                buffer.tensor.copy_(torch.randn(buffer.tensor.numel()))
            capturer.start(step, extras(rank, step), committed, self.protections[rank].fragments)
        self.history[step] = [contents(buffers) for buffers in self.buffers]
        for capturer in self.capturers:
            capturer.wait_copied()
        if wait:
            for capturer in self.capturers:
                capturer.wait_sealed(step)

    def run(self, *steps: int) -> None:
        if not self.capturers:
            self.begin()
        for step in steps:
            self.step(step)

    def state(self) -> list[list[bytes]]:
        return [contents(buffers) for buffers in self.buffers]

    def wipe(self) -> None:
        for buffers in self.buffers:
            for buffer in buffers:
                buffer.tensor.zero_()

    def close(self) -> None:
        # Clients first: a capture that waits for memory then ends.
        for client in self.clients:
            client.close()
        for capturer in self.capturers:
            capturer.close()


@dataclass
class WalJob(Job):
    """Workers whose state is stepped by a real AdamW on two flat partitions each, captured in rotation and logged."""

    rotation: int = 3
    whole: tuple[int, ...] = ()  # steps that are captured whole
    dtype: str = "float32"  # of logged gradients; others are clipped by a factor, too

    def make_state(self) -> None:
        self.optimizers, self.buffers = [], []
        for rank in range(self.world):
            torch.manual_seed(rank)
            flats = [torch.nn.Parameter(torch.randn(numel)) for numel in (1000, 77)]
            optimizer = torch.optim.AdamW([{"params": [flat]} for flat in flats], lr=1e-2, fused=True)
            for flat in flats:
                optimizer.state[flat] = {"step": torch.zeros(()), "exp_avg": torch.zeros_like(flat.data),
                                         "exp_avg_sq": torch.zeros_like(flat.data)}  # fmt: skip
            self.optimizers.append(optimizer)
            self.buffers.append([
                StateBuffer(f"group{i}.{kind}", tensor, self._spans(rank, i, kind, flat.numel()))
                for i, flat in enumerate(flats)
                for kind, tensor in [("master", flat.data), *list(optimizer.state[flat].items())[1:]]
            ])  # fmt: skip
        disk = bool(self.disk)
        self.protections = [wal(buffers, self.rotation, self.dtype, disk) for buffers in self.buffers]

    def _spans(self, rank: int, group: int, kind: str, numel: int) -> tuple[StateSpan, ...]:
        if group == 1:
            return (StateSpan(Range(f"model.norm{rank}.weight", kind, 0, numel), 0),)
        lo = 990 * rank  # ten elements of padding at the end
        cut = 400 + 37 * rank
        return (
            StateSpan(Range("L00.E000.up", kind, lo, lo + cut), 0),
            StateSpan(Range("L00.E001.up", kind, lo, lo + 990 - cut), cut),
        )

    def target(self, rank: int) -> Target:
        return Target(self.buffers[rank], self.names[rank], Redo(self.optimizers[rank]))

    def partitions(self, rank: int) -> str:
        return describe_partitions(self.buffers[rank], self.optimizers[rank])

    def begin(self) -> None:
        super().begin()
        for rank, capturer in enumerate(self.capturers):
            if capturer.sealed_step < 0:
                capturer.start(0, extras(rank, 0), -1, self.protections[rank].fragments)
        self.history.setdefault(0, self.state())
        for capturer in self.capturers:
            capturer.wait_copied()

    def step(self, step: int, wait: bool = True) -> None:
        committed = min(c.sealed_step for c in self.capturers)
        for rank, (optimizer, capturer) in enumerate(zip(self.optimizers, self.capturers, strict=True)):
            torch.manual_seed(100 * step + rank)
            for group in optimizer.param_groups:
                group["lr"] = 1e-2 / step
                group["params"][0].grad = torch.randn_like(group["params"][0])
            groups = [
                settings_of(group) | {"step": float(optimizer.state[group["params"][0]]["step"])}
                for group in optimizer.param_groups
            ]
            grads = [group["params"][0].grad.to(getattr(torch, self.dtype)) for group in optimizer.param_groups]
            factors = [torch.tensor([0.5 + 0.1 * i]) for i in range(len(grads))] if self.dtype != "float32" else []
            for group, grad, factor in zip(optimizer.param_groups, grads, factors, strict=False):
                group["params"][0].grad = grad.float().mul_(factor)
            log = StepLog(grads, factors, groups)
            optimizer.step()
            fragments = self.protections[rank].due(step)
            fragments = fragments if step in self.whole else fragments[:1]
            capturer.start(step, extras(rank, step), committed, fragments, log, least=1)
        self.history[step] = self.state()
        for capturer in self.capturers:
            capturer.wait_copied()
        if wait:
            for capturer in self.capturers:
                capturer.wait_sealed(step)


@dataclass
class PecJob(Job):
    """Workers that hold two of four experts of each of two layers, captured ``k`` of a layer at a time."""

    k: int = 1
    k_persist: int = 1
    experts: Experts = field(default_factory=lambda: Experts((0, 1), 4, ep=2))

    def make_state(self) -> None:
        self.buffers = [self._buffers(rank) for rank in range(self.world)]
        self.protections = [pec(buffers, self.experts, self.k, True, bool(self.disk)) for buffers in self.buffers]

    def _buffers(self, rank: int) -> list[StateBuffer]:
        torch.manual_seed(rank)
        buffers = []
        for kind in ("master", "exp_avg"):
            own = (StateSpan(Range("model.embed.weight", kind, 900 * rank, 900 * rank + 900), 0),)
            mine = [f"L{layer:02d}.E{2 * rank + i:03d}.up" for layer in (0, 1) for i in (0, 1)]
            spans = tuple(StateSpan(Range(unit, kind, 0, 300), 300 * i) for i, unit in enumerate(mine))
            buffers += [
                StateBuffer(f"group0.{kind}", torch.randn(910), own),
                StateBuffer(f"group1.{kind}", torch.randn(1200), spans),
            ]
        return buffers

    def begin(self) -> None:
        super().begin()
        for rank, capturer in enumerate(self.capturers):
            if capturer.sealed_step < 0:
                capturer.start(0, extras(rank, 0), -1, self.protections[rank].fragments)
        self.history.setdefault(0, self.state())
        for capturer in self.capturers:
            capturer.wait_copied()

    def step(self, step: int, wait: bool = True, whole_on_disk: bool = False) -> None:
        committed = min(c.sealed_step for c in self.capturers)
        chosen = select(self.experts, step, self.k)
        every = self.disk["every"] if self.disk else 1
        kept = list(self.experts.all()) if whole_on_disk else select(self.experts, step // every, self.k_persist)
        for rank, (buffers, capturer) in enumerate(zip(self.buffers, self.capturers, strict=True)):
            torch.manual_seed(100 * step + rank)
            for buffer in buffers:
                buffer.tensor.copy_(torch.randn(buffer.tensor.numel()))
            parts = self.protections[rank].experts
            assert parts is not None
            capturer.start(step, extras(rank, step), committed, parts.of(chosen), persist=parts.numbers(kept))
        self.history[step] = self.state()
        for capturer in self.capturers:
            capturer.wait_copied()
        if wait:
            for capturer in self.capturers:
                capturer.wait_sealed(step)

    def expected(self, step: int, ages: dict[ExpertRef, int]) -> list[list[bytes]]:
        """The state at ``step`` with experts of these ages."""
        return [
            [
                self.history[ages.get(ref, step) if (ref := expert_of(span.range.unit)) else step][rank][i]
                for i, span in enumerate(span for buffer in self.buffers[rank] for span in buffer.spans)
            ]
            for rank in range(self.world)
        ]


@pytest.fixture
def run_dir(tmp_path: Path) -> Iterator[Path]:
    """A run folder; whatever keeper it has at the end of the test is ended."""
    folder = tmp_path / "run"
    yield folder
    info = read_info(folder)
    stop_keeper(folder, persist=False, timeout_s=5)
    assert not is_alive(info)


@pytest.fixture
def wal_job_class() -> type[WalJob]:
    return WalJob


@pytest.fixture
def make_pec_job(make_job: Callable[..., Job]) -> Callable[..., Job]:
    return partial(make_job, PecJob)


@pytest.fixture
def make_wal_job(make_job: Callable[..., Job]) -> Callable[..., Job]:
    return partial(make_job, WalJob)


@pytest.fixture
def make_job(run_dir: Path) -> Iterator[Callable[..., Job]]:
    jobs: list[Job] = []

    def make(kind: type[Job] = Job, **options: Any) -> Job:
        jobs.append(kind(run_dir, **options))
        return jobs[-1]

    yield make
    for job in jobs:
        job.close()


@dataclass
class Worker:
    process: BaseProcess
    pipe: Connection

    def expect(self, word: str) -> None:
        assert self.pipe.poll(30), f"the worker never said {word!r}"
        assert self.pipe.recv() == word

    def end(self, expected: int) -> None:
        self.process.join(30)
        assert self.process.exitcode == expected


@pytest.fixture
def spawn() -> Iterator[Callable[..., Worker]]:
    """Start ``function(pipe, *arguments)`` in a process of its own."""
    context = multiprocessing.get_context("fork")
    workers: list[Worker] = []

    def start(function: Callable[..., None], *arguments: Any) -> Worker:
        ours, theirs = context.Pipe()
        process = context.Process(target=function, args=(theirs, *arguments))
        process.start()
        theirs.close()
        workers.append(Worker(process, ours))
        return workers[-1]

    yield start
    for worker in workers:
        if worker.process.is_alive():
            worker.process.kill()
        worker.process.join(30)


@pytest.fixture
def events(run_dir: Path) -> Callable[..., list[dict[str, Any]]]:
    def read(kind: str | None = None) -> list[dict[str, Any]]:
        path = run_dir / "events.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [row for row in rows if kind in (None, row["kind"])]

    return read


@pytest.fixture
def wait_until() -> Callable[..., None]:
    """For what only the file system tells: poll, and fail after the deadline."""

    def wait(condition: Callable[[], object], seconds: float = 30.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "it never happened"
            time.sleep(0.005)

    return wait


@pytest.fixture
def pinning_of(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A Pinning of an arena on a machine with a device, and the driver that it calls."""
    with pinned(monkeypatch) as make:
        yield make
