"""The training loop. One optimizer step is :func:`train_step`; the order of things around it is in :func:`fit`."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lora.watch import AdapterWatch
from moe.bias import BiasBalance
from moe.context import BatchContext, batch_context
from moe.stats import RoutingMeter
from trainer.data import DataBundle, batch_ids, sample_order
from trainer.engine import set_learning_rate
from trainer.events import EventLog
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


def fit(run: Run) -> None:
    """Train from ``run.progress`` to the recipe's last step, evaluating on held-out text at both ends."""
    train, tenants = run.recipe.train, run.tenants
    one_step, report_heldout = train_step, _report_heldout
    if tenants is not None:
        one_step, report_heldout = tenants.train_step, tenants.report_heldout
    if run.progress.step == 0:
        report_heldout(run, 0)
    for step in range(run.progress.step + 1, train.steps + 1):
        started = time.monotonic()
        loss = one_step(run, step)
        run.phases.enter("capture", step)
        run.snapshots.after_step(step, run.progress)
        if run.watch is not None:
            run.watch = _check_adapters(run, run.watch)
        _report_step(run, step, loss, time.monotonic() - started)
        if step == train.steps or (train.eval_every and step % train.eval_every == 0):
            report_heldout(run, step)


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
    for micro in range(run.recipe.accumulation):
        run.phases.enter("forward", step)
        ids_BS = next_batch(run, step, micro)
        scale, shape = 1 / run.recipe.accumulation, (ids_BS.shape[0], ids_BS.shape[1])
        context = BatchContext(aux_scale=scale, shape=shape, micro_step=micro, **run.tape.at(step, micro))
        with batch_context(context):
            loss = engine(input_ids=ids_BS, labels=ids_BS, use_cache=False).loss
            run.phases.enter("backward", step)
            engine.backward(loss)
        total += loss.detach().float() / run.recipe.accumulation
        if micro == run.recipe.accumulation - 1:
            run.phases.enter("exchange", step)
            run.tape.flush()
            mean = _exchange(run, total)
            _check_finite(run, step, "loss", mean)
            run.events.write("optimizer", step=step)
            run.phases.enter("optimizer", step)
        engine.step()
    if run.bias is not None:
        run.bias.commit()
    run.progress.step = step
    _check_finite(run, step, "gradient norm", _grad_norm(engine))
    return mean


def next_batch(run: Run, step: int, micro: int) -> torch.Tensor:
    """The samples this rank trains on in one micro-step, [B,S]; a function of the step, never of what came before."""
    train, dataset = run.recipe.train, run.data.train
    global_ids = batch_ids(
        step, micro, run.process.rank, run.process.world, train.global_batch_size, train.micro_batch_size
    )
    rows = [dataset[sample_order(i, len(dataset), train.seed)] for i in global_ids]
    ids_BS = torch.stack([torch.from_numpy(row) for row in rows])
    run.progress.consume(global_ids, ids_BS.numpy().tobytes())
    run.progress.samples += len(global_ids) * run.process.world
    return ids_BS.to(run.process.device)


def _exchange(run: Run, loss: torch.Tensor) -> float:
    """The step's one small collective, just before the optimizer: every rank's loss and newest sealed step.

    After it all ranks know which step all have sealed, so a kill in the optimizer step loses no completed step. Returns
    the mean loss.
    """
    mine = torch.tensor([float(loss), float(run.snapshots.settle())], dtype=torch.float64, device=run.process.device)
    everyone = [torch.empty_like(mine) for _ in range(run.process.world)]
    dist.all_gather(everyone, mine)
    losses_R, sealed_R = torch.stack(everyone).cpu().unbind(1)
    run.snapshots.committed = int(sealed_R.min())
    return float(losses_R.mean())


def _check_finite(run: Run, step: int, what: str, value: float) -> None:
    if not math.isfinite(value):
        raise DivergedError(
            f"step {step} diverged: its {what} is {value}. The newest checkpoint is of a step before {step}; lower "
            "train.lr or raise train.warmup_steps, with log.run=NAME"
        )


def _check_adapters(run: Run, watch: AdapterWatch) -> AdapterWatch | None:
    """Fail loudly if an adapter whose site saw tokens has no gradient; None once all have been seen to train."""

    def total(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.to(run.process.device)
        dist.all_reduce(tensor)
        return tensor

    waiting = watch.check(reduce=total)
    if run.process.rank == 0 and waiting and run.progress.step == 1:
        print(f"not yet routed, checked when they are: {', '.join(waiting)}", flush=True)
    return watch if waiting else None


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
        grad_norm=_grad_norm(run.engine),
        seconds=seconds,
        tokens_per_s=tokens / seconds,
        samples=run.progress.samples,
        consumed=run.progress.consumed,
        committed=run.snapshots.committed,
        stall_copied_s=stall.copied_s,
    )
    if printed:
        age = step - run.snapshots.committed if run.snapshots.committed > 0 else "-"
        print(
            f"step {step}/{train.steps}  loss {loss:.4f}  grad norm {_grad_norm(run.engine):.3f}  "
            f"{tokens / seconds:,.0f} tok/s  snapshot age {age}{'  ' * bool(routing)}{routing}",
            flush=True,
        )
    if run.tenants is not None:
        run.tenants.report_step(run, step, seconds, printed)


def _grad_norm(engine: Any) -> float:
    norm = engine.get_global_grad_norm()
    return float(norm) if norm is not None else 0.0


def heldout_loss(run: Run) -> float:
    """Mean next-token loss in nats over ``train.eval_sequences`` held-out samples, spread over all ranks."""
    wanted = min(run.recipe.train.eval_sequences, len(run.data.heldout))
    rank, world = run.process.rank, run.process.world
    # Every rank makes the same number of forward passes: experts exchange tokens in each. Surplus passes count nothing.
    rounds = -(-wanted // world)
    module = run.engine.module
    module.eval()
    total = torch.zeros(2, dtype=torch.float64, device=run.process.device)
    with torch.no_grad():
        for i in range(rounds):
            index = i * world + rank
            row = torch.from_numpy(run.data.heldout[index % wanted])[None].to(run.process.device)
            loss = module(input_ids=row, labels=row, use_cache=False).loss.double()
            total += torch.stack([loss, torch.ones_like(loss)]) * (index < wanted)
    module.train()
    dist.all_reduce(total)
    return float(total[0] / total[1])


def _report_heldout(run: Run, step: int) -> None:
    run.phases.enter("evaluate", step)
    loss = heldout_loss(run)
    if run.process.rank == 0:
        entropy = run.data.unigram_entropy_nats
        run.events.write("heldout", step=step, loss=loss, unigram_entropy=entropy)
        print(f"held-out loss at step {step}: {loss:.4f} nats (unigram entropy {entropy:.4f})", flush=True)
