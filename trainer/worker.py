"""One worker process: join the job, build, recover, train, finish. Started by torchrun or the deepspeed launcher."""

from __future__ import annotations

import os
import shutil
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from checkpointing.state.extras import seed_streams
from lora.attach import attach, format_table
from lora.watch import AdapterWatch
from moe.build import load_model, new_model
from moe.convert import convert, observe_gates
from moe.families import MoEBlock
from moe.layout import Layout
from moe.stats import RoutingMeter
from trainer import data as data_module
from trainer.data import DataBundle
from trainer.engine import create_engine, prepare_deepspeed
from trainer.events import EventLog
from trainer.failpoints import Failpoints
from trainer.loop import Run, fit
from trainer.recipe import RecipeError, check_world, load_recipe
from trainer.refusal import is_users_mistake, refuse
from trainer.rendezvous import Process, join
from trainer.runfolder import claim, next_attempt, run_folder
from trainer.schema import Recipe
from trainer.snapshots import layout_metadata, open_snapshots

USER_MISTAKE = 2


def main(recipe_path: str, overrides: Sequence[str]) -> int:
    """Run this worker to the end of the recipe. Returns the exit status."""
    recipe = load_recipe(recipe_path, overrides)
    check_world(recipe, int(os.environ["WORLD_SIZE"]))
    process = None
    try:
        process = join(recipe.parallel.device)
        train(recipe, process)
    except Exception as error:
        if is_users_mistake(error):
            refuse(str(error))
            status = USER_MISTAKE
        else:
            print(f"rank {process.rank if process else '?'} failed: {_in_short(error)}", file=sys.stderr)
            status = 1
        sys.stderr.flush()
        # The others may be inside a collective: no clean shutdown can be agreed on. The launcher restarts everyone.
        os._exit(status)
    dist.barrier()
    dist.destroy_process_group()
    return 0


def _in_short(error: Exception) -> str:
    """One line when a peer died, since its own message tells why; the whole traceback otherwise."""
    text = str(error)
    if any(sign in text for sign in ("Connection reset by peer", "Connection closed by peer", "NCCL")):
        return "another worker is gone (the connection to it broke)"
    return "".join(traceback.format_exception(error))


def train(recipe: Recipe, process: Process) -> None:
    run_dir, attempt = _enter_folder(recipe, process)
    events = EventLog(run_dir, process.rank, attempt)
    events.write("start", pid=os.getpid(), world=process.world, device=str(process.device))
    failpoints = Failpoints.from_environment(
        rank=process.rank, first_attempt=attempt == 0, run_dir=run_dir, events=events
    )
    _make_deterministic(process)
    prepare_deepspeed()
    data = data_module.load(recipe, rank=process.rank)
    if process.rank == 0:
        shutil.copytree(data.tokenizer_dir, run_dir / "tokenizer", dirs_exist_ok=True)

    model, blocks = build(recipe, process, data)
    meter = RoutingMeter()
    observe_gates(blocks, meter, recipe.model.router_aux_loss_coef)
    model.model.layers[len(model.model.layers) // 2].register_forward_pre_hook(
        lambda *_: failpoints.reached("forward", run.progress.step + 1) if model.training else None
    )
    accumulation = recipe.train.global_batch_size // (recipe.train.micro_batch_size * process.world)
    engine = create_engine(model, recipe, _dtype(recipe, process), accumulation)
    inner = engine.optimizer.optimizer
    # ZeRO steps the inner optimizer once per parameter group: after the first group the step is half done.
    inner.register_step_post_hook(lambda *_: failpoints.reached("optimizer", run.progress.step + 1))
    seed_streams(recipe.train.seed, "train", process.rank)
    metadata = layout_metadata(recipe, process, inner)
    snapshots = open_snapshots(recipe, process, run_dir, engine.optimizer, events, failpoints, metadata)
    watch = AdapterWatch(model) if recipe.adapter else None
    run = Run(recipe, process, run_dir, data, engine, snapshots, events, failpoints, meter, watch)
    events.write("ready")
    snapshots.recover(run.progress)
    model.train()
    fit(run)
    _finish(run)


def build(recipe: Recipe, process: Process, data: DataBundle) -> tuple[torch.nn.Module, list[MoEBlock]]:
    """The model with its seams swapped, adapters attached, on its device; nothing of DeepSpeed's engine yet."""
    dtype = _dtype(recipe, process)
    section = recipe.model
    if section.path is not None:
        overrides = {"attention_dropout": section.attention_dropout}
        model = load_model(section.path, dtype=dtype, overrides=overrides)
    else:
        fields = shape_fields(recipe)
        model = new_model(section.family, fields, vocab_size=data.vocab_size, seed=recipe.train.seed, dtype=dtype)
    model.config.use_cache = False
    layout = Layout(process.world, recipe.parallel.ep)
    blocks = convert(model, layout, process.rank)
    if recipe.adapter:
        report = attach(model, recipe.adapter, blocks, layout_ep=layout.ep)
        if process.rank == 0:
            print(format_table(report), flush=True)
    model.to(process.device)
    if process.rank == 0:
        backend = blocks[0].experts.backend
        print(f"experts run as {backend.name}: {backend.reason}", flush=True)
    return model, blocks


def shape_fields(recipe: Recipe) -> dict[str, Any]:
    """The model section's fields that transformers' configuration takes."""
    ours = {"family", "path", "router_aux_loss_coef"}
    return {name: value for name, value in vars(recipe.model).items() if name not in ours}


def _dtype(recipe: Recipe, process: Process) -> torch.dtype:
    name = recipe.parallel.dtype
    if name == "auto":
        name = "bf16" if process.device.type == "cuda" else "fp32"
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[name]


def _make_deterministic(process: Process) -> None:
    """Same recipe, same bits: on CUDA ask for kernels without atomics."""
    if process.device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cuda.enable_cudnn_sdp(False)  # its backward has no deterministic form


def _enter_folder(recipe: Recipe, process: Process) -> tuple[Path, int]:
    """Rank 0 claims the run folder and counts the attempt; everyone learns the outcome before anyone goes on."""
    outcome: list[Any] = [None]
    if process.rank == 0:
        try:
            folder = claim(recipe)
            outcome = [next_attempt(folder)]
        except RecipeError as error:
            outcome = [str(error)]
    dist.broadcast_object_list(outcome, src=0)
    if isinstance(outcome[0], str):
        raise RecipeError([outcome[0]])
    return run_folder(recipe), outcome[0]


def _finish(run: Run) -> None:
    started = time.monotonic()
    digest = run.snapshots.state_hash(run.progress)
    run.snapshots.finish()
    if run.process.rank == 0:
        run.events.write("done", step=run.progress.step, state_hash=digest, consumed=run.progress.consumed)
        print(f"done: step {run.progress.step}, state hash {digest[:16]}, {time.monotonic() - started:.1f} s to close")
