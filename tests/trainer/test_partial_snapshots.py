"""Mode pec through the snapshots of one worker and a real keeper: bootstrap, growth of K, the exact mode, the end."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from checkpointing.keeper.control import stop_keeper
from checkpointing.partial import Experts
from checkpointing.records import Kind
from checkpointing.state.buffers import StateBuffer, StateSpan
from checkpointing.store import Checkpoint, list_checkpoints
from checkpointing.units import Range
from moe.stats import RoutingMeter
from trainer import snapshots as module
from trainer.events import EventLog, read_events
from trainer.partial_experts import PartialExperts
from trainer.progress import Progress
from trainer.recipe import load_recipe

pytestmark = pytest.mark.drill

RECIPE = Path(__file__).parents[1] / "drills" / "drill.yaml"
SETTINGS = "checkpoint={mode: pec, pec: {k_snapshot: 1, max_plt: 0.19, fallback: dense}, linger_s: 20}"
ONE = ["parallel.workers=1", "parallel.ep=1"]
COPIES = 8 * 32 * 2


@pytest.fixture(scope="module", autouse=True)
def group(tmp_path_factory):
    store = dist.FileStore(str(tmp_path_factory.mktemp("group") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class OneWorker:
    """A worker whose state is one number per element: the step that wrote it."""

    def __init__(self, run_dir: Path, attempt: int, patch: pytest.MonkeyPatch, settings: str) -> None:
        recipe = load_recipe(RECIPE, [settings or SETTINGS, *ONE])
        self.buffers = [self._buffer(kind) for kind in ("master", "exp_avg", "exp_avg_sq")]
        patch.setattr(module, "zero_buffers", lambda _: self.buffers)
        patch.setattr(module, "describe_tensors", lambda _: {})
        patch.setattr(module, "data_order", lambda _: {})
        patch.setattr(module, "describe_partitions", lambda *_: "")
        patch.setattr(module, "optimizer_steps", lambda _: [float(self.progress.step)])
        patch.setattr(module, "after_restore", lambda *_: None)
        patch.setattr(module, "asdict", lambda _: {})
        inner = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
        origin: Any = SimpleNamespace(recipe="0" * 16, dump=lambda: b"", check=lambda _: None)
        points: Any = SimpleNamespace(reached=lambda *_: None, keeper_kill=lambda: None, disk_fault=lambda: None)
        process: Any = SimpleNamespace(rank=0, world=1, coordinate="dp0000", device=torch.device("cpu"))
        self.progress, self.routing = Progress(), RoutingMeter(drained=True)
        experts = Experts((0, 1), 4)
        partial = PartialExperts.of(recipe, experts, self.routing, lambda counts: counts, first_k=1)
        self.snapshots = module.open_snapshots(
            recipe, process, run_dir, SimpleNamespace(optimizer=inner), EventLog(run_dir, 0, attempt), points, origin,
            partial=partial,
        )  # fmt: skip
        self.plan = self.snapshots.recover(self.progress)

    def _buffer(self, kind: str) -> StateBuffer:
        units = ["model.a", *(f"L{layer:02d}.E{expert:03d}.up" for layer in (0, 1) for expert in range(4))]
        spans = tuple(StateSpan(Range(unit, kind, 0, 100), 100 * i) for i, unit in enumerate(units))
        return StateBuffer(f"group0.{kind}", torch.zeros(900), spans)

    def steps_of_experts(self) -> list[int]:
        return [int(self.buffers[0].tensor[100 * i]) for i in range(1, 9)]

    def train(self, last: int) -> None:
        for step in range(self.progress.step + 1, last + 1):
            for layer in (0, 1):
                self.routing.add(layer, torch.arange(COPIES).remainder(4)[None], 4)
            self.snapshots.committed = self.snapshots.settle()
            for buffer in self.buffers:
                buffer.tensor.fill_(float(step))
            self.progress.step = step
            self.snapshots.after_step(step, self.progress)
        self.snapshots.settle()

    def die(self) -> None:
        self.snapshots.capturer.wait_sealed(self.progress.step)
        self.snapshots.client.close()
        self.snapshots.capturer.close()


@pytest.fixture
def worker(tmp_path, monkeypatch):
    attempts = iter(range(99))

    def start(settings: str = "") -> OneWorker:
        return OneWorker(tmp_path, next(attempts), monkeypatch, settings)

    yield start
    stop_keeper(tmp_path, persist=False, timeout_s=5)


def of_kind(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [row for row in read_events(folder) if row["kind"] == kind]


def test_a_fault_makes_k_grow_and_the_next_one_makes_the_run_exact(worker, tmp_path):
    first = worker()
    first.train(5)
    first.die()
    second = worker()
    assert (second.plan.step, second.plan.tier) == (5, "memory")
    assert sorted(second.steps_of_experts()) == [2, 2, 3, 3, 4, 4, 5, 5]
    assert int(second.buffers[0].tensor[0]) == 5
    (_, grown) = of_kind(tmp_path, "plt")
    # Of 12 steps one and a half are lost on average.
    assert grown["plt"] == pytest.approx(1.5 / 12)
    assert (grown["k"], grown["mode"]) == (2, "pec")
    second.train(8)
    second.die()
    third = worker()
    assert third.plan.step == 8
    assert sorted(third.steps_of_experts()) == [7, 7, 7, 7, 8, 8, 8, 8]
    assert of_kind(tmp_path, "plt")[-1]["plt"] == pytest.approx(2 / 12)
    assert [row["mode"] for row in of_kind(tmp_path, "mode_changed")] == ["dense"]
    third.train(10)
    third.die()
    fourth = worker()
    assert (fourth.plan.step, fourth.steps_of_experts()) == (10, [10] * 8)
    assert of_kind(tmp_path, "plt")[-1]["plt"] == pytest.approx(2 / 12)
    fourth.train(12)
    fourth.snapshots.finish(fourth.progress)
    assert len(of_kind(tmp_path, "reshaped")) == 2
    ((step, path),) = list_checkpoints(tmp_path / "checkpoints")
    assert step == 12
    assert Checkpoint.open(path).is_whole


def test_the_last_step_of_a_lossy_run_is_whole_on_disk(worker, tmp_path):
    settings = "checkpoint={mode: pec, pec: {k_snapshot: 1, max_plt: 0.9}, disk: {every: 4}, linger_s: 20}"
    run = worker(settings)
    run.train(12)
    run.snapshots.finish(run.progress)
    checkpoint = Checkpoint.open(tmp_path / "checkpoints" / "step-12")
    assert checkpoint.is_whole
    assert {record.step for record in checkpoint.records if record.kind is Kind.BASE} == {12}
    again = worker(settings)
    assert (again.plan.step, again.plan.tier) == (12, "disk")
    assert again.steps_of_experts() == [12] * 8
    assert of_kind(tmp_path, "plt")[-1]["lost"] == 0
    again.snapshots.finish(again.progress)


def test_a_run_too_short_for_one_fault_is_exact_from_its_start(worker, tmp_path):
    run = worker("checkpoint={mode: pec, pec: {k_snapshot: 1, fallback: dense}, linger_s: 20}")
    assert of_kind(tmp_path, "mode_changed")[0]["mode"] == "dense"
    run.train(4)
    run.die()
    again = worker("checkpoint={mode: pec, pec: {k_snapshot: 1, fallback: dense}, linger_s: 20}")
    assert again.steps_of_experts() == [4] * 8
    again.snapshots.client.close()
    again.snapshots.capturer.close()
