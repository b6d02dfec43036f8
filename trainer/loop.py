"""The training loop. One optimizer step is :func:`train_step`; the order of things around it is in :func:`fit`."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lora.watch import AdapterWatch
from moe.bias import BiasBalance
from moe.context import BatchContext, batch_context
from moe.stats import RoutingMeter
from trainer.batches import Batch, labels_of_step, make_batch, training_rows
from trainer.data import DataBundle
from trainer.engine import set_learning_rate
from trainer.evaluation import is_evaluated, report_heldout
from trainer.events import EventLog
from trainer.exchange import Exchange
from trainer.failpoints import Failpoints
from trainer.phases import Phases
from trainer.progress import Progress
from trainer.rendezvous import Process
from trainer.routing_report import report_routing
from trainer.routing_trace import Tape
from trainer.schedules import learning_rate
from trainer.schema import Recipe
from trainer.snapshots import Snapshots
from trainer.tenants import Tenants


class DivergedError(ValueError):
    """Loss or gradients stopped being numbers."""


@dataclass
class Run:
    """Everything one worker trains with."""

    recipe: Recipe
    process: Process
    run_dir: Path
    data: DataBundle
    engine: Any
    snapshots: Snapshots
    events: EventLog
    failpoints: Failpoints
    meter: RoutingMeter
    phases: Phases
    watch: AdapterWatch | None = None
    bias: BiasBalance | None = None
    tape: Tape = field(default_factory=Tape)
    tenants: Tenants | None = None
    progress: Progress = field(default_factory=Progress)
    gradients_there: float | None = None  # when, in unix seconds, in the last step
    labels: int | None = None  # chat: tokens with loss of the last step's global batch


def fit(run: Run) -> None:
    """Train from ``run.progress`` to the recipe's last step, evaluating on held-out text at both ends."""
    train, tenants = run.recipe.train, run.tenants
    one_step, evaluate = train_step, report_heldout
    if tenants is not None:
        one_step, evaluate = tenants.train_step, tenants.report_heldout
    if is_evaluated(train, run.progress.step):
        evaluate(run, run.progress.step)  # an attempt that was killed may have captured the step and not done it
    for step in range(run.progress.step + 1, train.steps + 1):
        started = time.monotonic()
        loss = one_step(run, step)
        run.phases.enter("capture", step)
        run.snapshots.after_step(step, run.progress)
        if run.watch is not None:
            _check_adapters(run, run.watch, last=step == train.steps)
        _report_step(run, step, loss, time.monotonic() - started)
        if is_evaluated(train, step):
            evaluate(run, step)


def train_step(run: Run, step: int) -> float:
    """Forward and backward over this rank's share of the batch, then one optimizer step.

    Returns the mean loss over all ranks. Raises DivergedError before a state that is not finite can be captured.
    """
    train, engine = run.recipe.train, run.engine
    rate = learning_rate(
        step,
        peak=train.lr,
        steps=train.steps,
        warmup_steps=train.warmup_steps,
        min_lr_ratio=train.min_lr_ratio,
        schedule=train.schedule,
    )
    set_learning_rate(engine, rate)
    total = torch.zeros((), device=run.process.device)
    labels = labels_of_step(run.recipe, run.data.train, step)
    for micro in range(run.recipe.accumulation):
        run.phases.enter("forward", step)
        batch, scale = next_batch(run, step, micro, labels), 1 / run.recipe.accumulation
        context = BatchContext(aux_scale=scale, micro_step=micro, **batch.facts, **run.tape.at(step, micro))
        with batch_context(context):
            loss = engine(**batch.inputs, use_cache=False).loss
            run.phases.enter("backward", step)
            engine.backward(loss)
        total += loss.detach().float() / run.recipe.accumulation
        if micro == run.recipe.accumulation - 1:
            run.phases.enter("exchange", step)
            run.tape.flush()
            exchange = Exchange(total, run.snapshots.settle(), run.process.world)
            run.events.write("optimizer", step=step)
            run.phases.enter("optimizer", step)
        engine.step()
    if run.bias is not None:
        run.bias.commit()
    run.progress.step = step
    run.labels = labels
    # Not before the update is queued: a GPU would stand idle from its last gradient on until the host has read this.
    mean, run.snapshots.committed = exchange.read()
    run.gradients_there = exchange.ended
    run.snapshots.reserve(step)
    _check_finite(run, step, "loss", mean)
    _check_finite(run, step, "gradient norm", engine.get_global_grad_norm())
    return mean


def next_batch(run: Run, step: int, micro: int, labels: int | None) -> Batch:
    """What this rank trains on in one micro-step.

    The engine averages gradients over ranks and micro-steps. So that chat's loss is the mean over the ``labels`` tokens
    of the global batch that have loss, and not a mean of means, each micro-batch's sum is divided by their mean number.
    """
    process, recipe = run.process, run.recipe
    global_ids, rows = training_rows(recipe, run.data.train, step, micro, process.rank, process.world)
    mean_over = None if labels is None else labels / (process.world * recipe.accumulation)
    batch = make_batch(rows, process.device, mean_over)
    run.progress.consume(global_ids, batch.consumed)
    run.progress.samples += len(global_ids) * process.world
    return batch


def _check_finite(run: Run, step: int, what: str, value: float) -> None:
    if not math.isfinite(value):
        raise DivergedError(
            f"step {step} diverged: its {what} is {value}. The newest checkpoint is of a step before {step}; lower "
            "train.lr or raise train.warmup_steps, with log.run=NAME"
        )


def _check_adapters(run: Run, watch: AdapterWatch, last: bool) -> None:
    """Fail loudly if an adapter whose site saw tokens has no gradient."""
    line = watch.after_step(run.process.total, last)
    if run.process.rank == 0 and line:
        print(line, flush=True)


def _report_step(run: Run, step: int, loss: float, seconds: float) -> None:
    train, stall = run.recipe.train, run.snapshots.stall
    printed = step % run.recipe.log.every == 0 or step == train.steps or step == 1
    routing = report_routing(run.meter, run.process, run.events, step) if printed else ""
    if run.process.rank != 0:
        return
    tokens = train.global_batch_size * run.recipe.data.sequence_length
    if run.tenants is not None:
        tokens = run.tenants.tokens(step)
    run.events.write(
        "step",
        step=step,
        loss=loss,
        lr=run.engine.optimizer.param_groups[0]["lr"],
        grad_norm=run.engine.get_global_grad_norm(),
        seconds=seconds,
        tokens_per_s=tokens / seconds,
        **({} if run.labels is None else {"label_tokens": run.labels}),
        samples=run.progress.samples,
        consumed=run.progress.consumed,
        committed=run.snapshots.committed,
        stall_copied_s=stall.copied_s,
        gradients_there=run.gradients_there,
    )
    if printed:
        age = step - run.snapshots.committed if run.snapshots.committed > 0 else "-"
        print(
            f"step {step}/{train.steps}  loss {loss:.4f}  grad norm {run.engine.get_global_grad_norm():.3f}  "
            f"{tokens / seconds:,.0f} tok/s  snapshot age {age}{'  ' * bool(routing)}{routing}",
            flush=True,
        )
    if run.tenants is not None:
        run.tenants.report_step(run, step, seconds, printed)
