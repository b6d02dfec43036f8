"""One worker process: join the job, build, recover, train, finish. Started by torchrun or the deepspeed launcher."""

from __future__ import annotations

import os
import shutil
import sys
import time
import traceback
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from checkpointing.keeper.memory import available_bytes
from checkpointing.keeper.protocol import KeeperError, KeeperRefused, OtherMemory, TooLittleMemory
from checkpointing.recovery import RecoveryError
from checkpointing.state.extras import seed_streams
from lora.tenant_watch import TenantWatch
from lora.watch import AdapterWatch
from moe.stats import RoutingMeter
from trainer import data as data_module
from trainer.admission import admitted
from trainer.build import build_model, training_dtype
from trainer.clipping import GroupClip
from trainer.determinism import make_deterministic
from trainer.engine import create_engine, prepare_deepspeed
from trainer.events import EventLog, read_events
from trainer.failpoints import Failpoints, place_failpoints
from trainer.loop import Run, fit
from trainer.origin import Origin
from trainer.partial_experts import open_partial
from trainer.phases import Phases, longest_deadline_s
from trainer.plan import admission
from trainer.recipe import RecipeError, check_world, load_recipe
from trainer.refusal import is_users_mistake, refuse
from trainer.rendezvous import Process, die_with_launcher, join, process_started
from trainer.routing import prepare_gates
from trainer.routing_trace import open_tape
from trainer.runfolder import check_place, claim, lock, next_attempt, run_folder
from trainer.schema import Recipe
from trainer.snapshots import Snapshots, open_snapshots
from trainer.tenants import Tenants, data_key, load_members

USER_MISTAKE = 2


def main(recipe_path: str, overrides: Sequence[str]) -> int:
    """Run this worker to the end of the recipe. Returns the exit status."""
    die_with_launcher()
    times = {"spawned": process_started(), "imported": time.time()}
    recipe = load_recipe(recipe_path, overrides)
    check_world(recipe, int(os.environ["WORLD_SIZE"]))
    phases = Phases.open(recipe.parallel.deadlines)
    phases.enter("build")
    try:
        process = join(recipe.parallel.device, _patience(recipe))
        times["joined"] = time.time()
        train(recipe, process, phases, times)
        dist.barrier()
    except Exception as error:
        status = _explain(error, recipe, phases)
        sys.stderr.flush()
        # The others may be inside a collective: no clean shutdown can be agreed on. The launcher restarts everyone.
        os._exit(status)
    dist.destroy_process_group()
    return 0


def _patience(recipe: Recipe) -> timedelta:
    """How long a collective may wait: longer than any phase of the peer that it waits for."""
    longest_s = longest_deadline_s(recipe.parallel.deadlines)
    return timedelta(seconds=longest_s + 60) if longest_s is not None else timedelta(days=30)


def _explain(error: Exception, recipe: Recipe, phases: Phases) -> int:
    """Say what went wrong, in as many words as it takes; returns the exit status."""
    status = _say(error)
    if status != USER_MISTAKE:
        folder, lost_peer = run_folder(recipe), _lost_peer(error)
        words = (str(error).splitlines() or [""])[0][:300]
        with EventLog(folder, int(os.environ["RANK"]), max(0, next_attempt(folder) - 1)) as events:
            events.write("failed", phases.step, pid=os.getpid(), phase=phases.phase, lost_peer=lost_peer,
                         error=f"{type(error).__name__}: {words}")  # fmt: skip
    return status


def _lost_peer(error: Exception) -> bool:
    return isinstance(error, ConnectionError | dist.DistBackendError) or "by peer" in str(error)


def _say(error: Exception) -> int:
    rank = os.environ.get("RANK")
    if isinstance(error, TooLittleMemory | OtherMemory):
        refuse(str(error))
        return USER_MISTAKE
    if isinstance(error, RecoveryError | KeeperRefused | KeeperError):
        # What damaged bytes or a keeper that is still leaving call for is another attempt, which sees them set aside.
        print(f"rank {rank}: {error}", file=sys.stderr)
        return 1
    if isinstance(error, OSError) and error.filename:
        print(f"rank {rank}: {error.filename}: {error.strerror}", file=sys.stderr)
        return 1
    if is_users_mistake(error):
        refuse(str(error))
        return USER_MISTAKE
    text = str(error)
    if _lost_peer(error):
        print(f"rank {rank}: lost another worker ({text.splitlines()[0][:200]})", file=sys.stderr)
    else:
        print(f"rank {rank} failed:\n{''.join(traceback.format_exception(error))}", file=sys.stderr)
    return 1


def train(recipe: Recipe, process: Process, phases: Phases, times: dict[str, float]) -> None:
    run_dir, attempt, finished = _enter_folder(recipe, process)
    events = EventLog(run_dir, process.rank, attempt)
    events.write("start", pid=os.getpid(), world=process.world, device=str(process.device), **times)
    failpoints = Failpoints.from_environment(rank=process.rank, attempt=attempt, run_dir=run_dir, events=events)
    run = prepare(recipe, process, run_dir, events, failpoints, phases)
    events.write("ready")
    phases.enter("load")
    plan = run.snapshots.recover(run.progress)
    if plan.tier == "fresh" and finished:
        if process.rank == 0:
            print("this run has finished and kept no checkpoint; give log.run=NAME to train again", flush=True)
        run.snapshots.finish(run.progress, keep=False)
        return
    run.engine.module.train()
    fit(run)
    phases.enter("finish", run.progress.step)
    _finish(run)


def prepare(
    recipe: Recipe, process: Process, run_dir: Path, events: EventLog, failpoints: Failpoints, phases: Phases
) -> Run:
    """Data, model, engine and checkpoints of this worker, everything but the state."""
    make_deterministic(process.device)
    prepare_deepspeed()
    _admit(recipe, process, events)
    members = load_members(recipe, process)
    data = members[0].data if members else data_module.load(recipe, rank=process.rank)
    if process.rank == 0 and data.chat:
        events.write("data", **data.chat)
    if process.rank == 0 and not (run_dir / "tokenizer").exists():
        shutil.copytree(data.tokenizer_dir, run_dir / "tokenizer", dirs_exist_ok=True)
    model, blocks = build_model(recipe, process, data.vocab_size)
    meter = RoutingMeter(drained=recipe.checkpoint.mode == "pec")
    tape = open_tape(recipe, process, run_dir, model.config, blocks)
    bias = prepare_gates(recipe, process, model, blocks, meter)
    engine = create_engine(model, recipe, training_dtype(recipe, process.device), recipe.accumulation)
    tenants = None
    if members:
        tenants = Tenants(recipe, members, GroupClip(engine), TenantWatch(model, list(recipe.tenants)))
    inner = engine.optimizer.optimizer
    origin = Origin.of(recipe, process, data_key(members) if members else data.key, inner)
    partial = open_partial(recipe, process, run_dir, events, blocks, meter)
    snapshots = open_snapshots(
        recipe, process, run_dir, engine.optimizer, events, failpoints, origin, phases.board, partial
    )
    snapshots.bias = bias
    watch = AdapterWatch(model) if recipe.adapter and tenants is None else None
    run = Run(recipe, process, run_dir, data, engine, snapshots, events, failpoints, meter, phases, watch, bias, tape)
    run.tenants = tenants
    place_failpoints(run, model, [block.experts for block in blocks], inner)
    seed_streams(recipe.train.seed, "train", process.rank)
    return run


def _admit(recipe: Recipe, process: Process, events: EventLog) -> None:
    """Before anything is loaded: whether the tenants fit into what is free here. Raises AdmissionError.

    Asked until all workers of some start have had room, never again: later the keeper holds captures of the run, and
    workers that are still dying their weights, and a recovery must not be refused for them.
    """
    if not recipe.tenants:
        return
    before = [process.rank == 0 and admitted(read_events(events.path.parent))]
    dist.broadcast_object_list(before, src=0)
    if before[0]:
        return
    if process.device.type == "cuda":
        free = torch.cuda.mem_get_info(process.device)[0]
    else:
        free = available_bytes() // int(os.environ.get("LOCAL_WORLD_SIZE", process.world))
    found = admission(recipe, free)
    assert found is not None
    found.check()
    dist.barrier()  # nobody takes memory before everybody has looked
    if process.rank == 0:
        events.write("admitted", needed=found.total, free=found.free)


def _enter_folder(recipe: Recipe, process: Process) -> tuple[Path, int, bool]:
    """Rank 0 claims the run folder; everyone learns the outcome before anyone goes on.

    Returns the folder, the number of this attempt, and whether the run has finished before.
    """
    outcome: list[Any] = [None]
    if process.rank == 0:
        try:
            process.held.append(lock(run_folder(recipe)))
            check_place(recipe)
            folder = claim(recipe)
            finished = any(row["kind"] == "done" for row in read_events(folder))
            outcome = [(next_attempt(folder), finished)]
        except RecipeError as error:
            outcome = [str(error)]
    dist.broadcast_object_list(outcome, src=0)
    if isinstance(outcome[0], str):
        raise RecipeError([outcome[0]])
    return run_folder(recipe), *outcome[0]


def _finish(run: Run) -> None:
    """Record the outcome, and only then let the keeper go: a kill in between must find one of the two."""
    started = time.monotonic()
    snapshots: Snapshots = run.snapshots
    digest = snapshots.state_hash(run.progress)
    if run.process.rank == 0:
        run.events.write("done", step=run.progress.step, state_hash=digest, consumed=run.progress.consumed)
    snapshots.finish(run.progress)
    if run.process.rank == 0:
        took = time.monotonic() - started
        print(f"done: step {run.progress.step}, state hash {digest[:16]}, {took:.1f} s to close", flush=True)
