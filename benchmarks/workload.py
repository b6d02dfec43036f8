"""The fixed training job that checkpoints are measured in: model, tokens per step, layout. Random tokens, real loop."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import yaml

from checkpointing.state.extras import seed_streams
from moe.stats import RoutingMeter
from trainer.build import build_model, training_dtype
from trainer.data import PackedDataset
from trainer.determinism import make_deterministic
from trainer.engine import create_engine, prepare_deepspeed
from trainer.events import EventLog
from trainer.failpoints import Failpoints
from trainer.loop import Run
from trainer.origin import Origin
from trainer.phases import Phases
from trainer.recipe import load_recipe
from trainer.rendezvous import Process
from trainer.routing import prepare_gates
from trainer.schema import Recipe
from trainer.snapshots import Snapshots, open_snapshots

_SAMPLES = 512


@dataclass(frozen=True)
class Config:
    """One job.

    Attributes:
        model: fields of the recipe's model section.
        sequences: per step, over all workers; ``micro`` of them per worker and forward pass.
        workers: ranks, which are also expert-parallel over ``ep``.
        timed: steps of one timed block; ``warm`` more precede them.
        rounds: of (off, arm) blocks for modes that capture every step; ``saves`` for those that save at times.
    """

    model: dict[str, int]
    vocab: int
    sequence: int
    sequences: int
    micro: int
    workers: int
    ep: int
    dtype: str
    device: str
    timed: int = 10
    warm: int = 3
    rounds: int = 10
    saves: int = 2
    recoveries: int = 3
    ceiling_bytes: int = 1 << 30

    @property
    def tokens(self) -> int:
        """Per optimizer step, over all workers."""
        return self.sequences * self.sequence


def _model(hidden: int, layers: int, heads: int, inner: int, experts: int, chosen: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "head_dim": hidden // heads,
        "moe_intermediate_size": inner,
        "num_experts": experts,
        "num_experts_per_tok": chosen,
    }


CONFIGS = {
    # 1.0 B parameters on one GPU: 8,192 tokens a step. Blocks of a third of a second: a machine that others use drifts
    # within seconds, and steps of one block are slow or fast together. One step warms up: captures are under way from
    # the second on. As many rounds as the time allows.
    "gpu-1b": Config(_model(1024, 12, 16, 384, 64, 8), 32768, 1024, 8, 8, 1, 1, "bf16", "cuda", 2, 1, 1000),
    # 21 M parameters on two CPU ranks that share the experts: 4,096 tokens, over a second a step on two cores.
    "cpu": Config(_model(256, 6, 4, 128, 32, 4), 2048, 256, 16, 8, 2, 2, "fp32", "cpu", 3, 2, 10, 3, 3, 256 << 20),
    # Shows within a minute that everything runs; its figures mean nothing.
    "tiny": Config(_model(64, 2, 2, 32, 8, 2), 256, 32, 4, 2, 2, 2, "fp32", "cpu", 3, 2, 2, 1, 1, 8 << 20),
}


def recipe_of(config: Config, name: str, folder: Path, process: Process, checkpoint: dict[str, Any]) -> Recipe:
    """The recipe of one arm, read by the reader that all recipes go through. Its run folder is ``folder/name``.

    Raises RecipeError.
    """
    world = process.world
    values = {
        "model": {"family": "qwen3_moe", "router_aux_loss_coef": 0.01, **config.model},
        "data": {
            "source": "stdlib",
            "include": ["json/*.py"],
            "tokenizer": {"kind": "bytes"},
            "sequence_length": config.sequence,
        },
        "parallel": {
            "workers": world,
            "ep": config.ep if world > 1 else 1,
            "zero": 1,
            "dtype": config.dtype,
            "device": config.device,
        },
        "train": {
            "steps": 10**6,
            "global_batch_size": config.sequences,
            "micro_batch_size": min(config.micro, config.sequences // world),
            "lr": 1e-4,
            "schedule": "constant",
        },
        "checkpoint": checkpoint,
        "log": {"run": name, "dir": str(folder)},
    }
    path = folder / f"{name}.rank{process.rank}.yaml"
    path.write_text(yaml.safe_dump(values))
    return load_recipe(path)


def random_tokens(vocab: int, sequence: int) -> PackedDataset:
    """Packed samples [S] of uniformly random tokens, always the same."""
    tokens = np.random.default_rng(7).integers(0, vocab, _SAMPLES * sequence, dtype=np.int64)
    return PackedDataset(tokens, sequence)


@dataclass(frozen=True)
class Job:
    """One worker's model and engine; ``run`` is what the product's training loop steps."""

    config: Config
    folder: Path
    run: Run
    parameters: int

    @property
    def process(self) -> Process:
        return self.run.process

    @property
    def zero_optimizer(self) -> Any:
        return self.run.engine.optimizer

    def open_snapshots(self, recipe: Recipe, attempt: int) -> Snapshots:
        """Attach to the keeper of an arm's run folder, as a worker does when it starts."""
        run_dir = Path(recipe.log.dir) / recipe.log.run
        events = EventLog(run_dir, self.process.rank, attempt)
        failpoints = Failpoints((), rank=self.process.rank, run_dir=run_dir, events=events)
        origin = Origin.of(recipe, self.process, "random", self.zero_optimizer.optimizer)
        return open_snapshots(recipe, self.process, run_dir, self.zero_optimizer, events, failpoints, origin)


NO_CHECKPOINTS = {"memory": {"enabled": False}, "disk": {"every": 0, "final": False}}


def build_job(config: Config, process: Process, folder: Path) -> Job:
    """Model and engine as a worker of `planaria train` makes them, without checkpoints."""
    make_deterministic(process.device)
    prepare_deepspeed()
    recipe = recipe_of(config, "off", folder, process, NO_CHECKPOINTS)
    model, blocks = build_model(recipe, process, config.vocab)
    meter = RoutingMeter()
    prepare_gates(recipe, process, model, blocks, meter)
    parameters = sum(p.numel() for p in model.parameters())
    engine = create_engine(model, recipe, training_dtype(recipe, process.device), recipe.accumulation)
    engine.module.train()
    run_dir = folder / recipe.log.run
    events = EventLog(run_dir, process.rank, 0)
    failpoints = Failpoints((), rank=process.rank, run_dir=run_dir, events=events)
    data = SimpleNamespace(train=random_tokens(config.vocab, config.sequence))
    origin = Origin.of(recipe, process, "random", engine.optimizer.optimizer)
    off = open_snapshots(recipe, process, run_dir, engine.optimizer, events, failpoints, origin)
    seed_streams(recipe.train.seed, "train", process.rank)
    phases = Phases.open(recipe.parallel.deadlines)  # nobody watches them: measuring is not training
    run = Run(recipe, process, run_dir, data, engine, off, events, failpoints, meter, phases)  # type: ignore[arg-type]
    return Job(config, folder, run, parameters)


def shrunk(config: Config, rounds: int | None) -> Config:
    return config if rounds is None else replace(config, rounds=rounds)


def device_of(config: Config) -> str:
    """Raises SystemExit with a sentence if this machine lacks what the config needs."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("this config needs a GPU; use --config cpu or --config tiny")
    return config.device
