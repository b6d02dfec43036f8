"""How much of the gap between one LoRA and one LoRA per task do routed presets close, at equal trainable parameters?

    python -m benchmarks.lora_quality                            # all presets, 3 seeds
    python -m benchmarks.lora_quality --presets mola loramoe --seeds 1 --steps 100

A small base is pretrained (once, and kept) to infer from examples which of eight tasks is meant. Every arm then learns
eight changes of them that conflict. Learning rates come from one grid for all arms, by the mean exact match of a seed
that is not reported. Writes the figures as JSON and a plot as SVG beside it.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.lora_quality_arms import ARMS, Arm, fitted, reference_size
from benchmarks.lora_quality_base import BaseSetting, frozen_base
from benchmarks.lora_quality_probe import task_known
from benchmarks.lora_quality_report import LARGE_ORACLE, LORA, ORACLE, plot, summarise, table, task_table, verdict
from benchmarks.lora_quality_run import TrainSetting, train_arm
from benchmarks.lora_quality_tasks import learnt as learnt_tasks
from benchmarks.machine import describe_machine, result_path, save, say
from lora.config import BankConfig

RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
TUNING_SEED = 1000


@dataclass(frozen=True)
class Work:
    """One training run, as a worker process gets it."""

    arm: str
    banks: Mapping[str, BankConfig]
    parameters: int
    lr: float
    seed: int
    base: BaseSetting
    train: TrainSetting
    folder: str
    device: str


def carry_out(work: Work) -> dict[str, Any]:
    """Train and score; the base comes from the cache."""
    device = torch.device(work.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    base, _ = frozen_base(work.base, Path(work.folder), device)
    found = train_arm(base, ARMS[work.arm], work.banks, work.train, work.lr, work.seed)
    return {"arm": work.arm, "lr": work.lr, "seed": work.seed, "parameters": work.parameters, **found}


def pool_of(jobs: int) -> Executor:
    """One process per job; this one, if there is one job."""
    if jobs == 1:
        return ThreadPoolExecutor(1)
    return ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"))


def in_turn(pool: Executor, jobs: Sequence[Work], width: int, until: float) -> Iterator[dict[str, Any]]:
    """Results as they come. No job is begun after ``until``."""
    waiting, running = list(jobs), set[Future[dict[str, Any]]]()
    while waiting or running:
        while waiting and len(running) < width and time.monotonic() < until:
            running.add(pool.submit(carry_out, waiting.pop(0)))
        if not running:
            return
        done, running = wait(running, return_when=FIRST_COMPLETED)
        for future in done:
            yield future.result()


def best_rates(tuning: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Each arm's learning rate: of the best mean exact match; of the lower loss where that is equal."""
    best: dict[str, dict[str, Any]] = {}
    for run in tuning:
        now = best.get(run["arm"])
        if now is None or (run["mean"], -run["loss"]) > (now["mean"], -now["loss"]):
            best[run["arm"]] = run
    return {arm: run["lr"] for arm, run in best.items()}


def facts_of(arm: Arm, parameters: int, lr: float) -> dict[str, Any]:
    """What the tables say of an arm besides its scores."""
    if arm.name in (LORA, ORACLE, LARGE_ORACLE):
        group = "bound"
    elif arm.names_task:
        group = "task"
    elif not arm.routed:
        group = "plain"
    else:
        group = "variant" if arm.variant else "routed"
    kind = " (told the task)" if group == "task" else " (not as published)" if group == "variant" else ""
    return {"parameters": parameters, "lr": lr, "group": group, "kind": kind}


def main() -> None:
    options = _parse()
    path = result_path("lora_quality.json", options.out)
    device = torch.device(options.device)
    folder = Path(options.cache)
    setting = BaseSetting(stages=_scaled(options.base_steps))
    train = TrainSetting(options.shown, setting.examples, options.steps, held_out=options.held_out)
    if device.type == "cpu":
        torch.set_num_threads(1)
    started = time.monotonic()
    base, learnt = frozen_base(setting, folder, device)
    parameters = reference_size(base)
    say(f"base: {sum(p.numel() for p in base.parameters()):,} parameters; adapters: {parameters:,}")
    names = [name for name in ARMS if name in {LORA, ORACLE, *options.presets}]
    probed = task_known(base, learnt_tasks(setting.examples, options.shown))
    say("where the base knows the task, of the inputs of linear layers:")
    say("\n".join(f"  {path}: {100 * share:.0f} %" for path, share in probed.items()))
    sized = {name: fitted(base, ARMS[name], parameters) for name in names}
    common = {"base": setting, "train": train, "folder": str(folder), "device": str(device)}
    result: dict[str, Any] = {
        "machine": describe_machine(),
        "base": learnt,
        "task_known": probed,
        "train": asdict(train),
        "rates": options.rates,
        "tuning": [],
        "runs": [],
    }
    until = started + options.budget_seconds
    with pool_of(options.jobs) as pool:
        known = _given(options.lr)
        tune = [Work(n, *sized[n], lr, TUNING_SEED, **common) for n in names if n not in known for lr in options.rates]
        for found in in_turn(pool, tune, options.jobs, until):
            _keep(result, "tuning", found, path)
        rates = best_rates(result["tuning"]) | known
        runs = [
            Work(name, *sized[name], rates[name], seed, **common)
            for seed in range(options.seeds)
            for name in names
            if name in rates
        ]
        for found in in_turn(pool, runs, options.jobs, until):
            _keep(result, "runs", found, path)
    left = len(tune) - len(result["tuning"]), len(runs) - len(result["runs"])
    if any(left):
        say(f"the time was over: {left[0]} runs of the grid and {left[1]} of the seeds were left out")
    result["seconds"] = time.monotonic() - started
    _report(result, rates, path)


def _given(rates: Sequence[str]) -> dict[str, float]:
    """From ``["mola=0.01"]``."""
    return {name: float(rate) for name, _, rate in (text.rpartition("=") for text in rates)}


def _scaled(steps: int | None) -> tuple[tuple[int, int], ...]:
    """The base's stages, shortened to ``steps`` in all."""
    stages = BaseSetting.stages
    whole = sum(count for _, count in stages)
    return stages if steps is None else tuple((k, max(1, steps * count // whole)) for k, count in stages)


def _keep(result: dict[str, Any], where: str, found: dict[str, Any], path: Path) -> None:
    result[where].append(found)
    say(
        f"{where} {found['arm']}: lr {found['lr']:g}, seed {found['seed']}, exact {found['mean']:.3f}, "
        f"worst {found['worst']:.3f}, {found['seconds']:.0f} s"
    )
    save(path, result)


def _report(result: dict[str, Any], rates: dict[str, float], path: Path) -> None:
    by_arm: dict[str, list[dict[str, Any]]] = {}
    for run in result["runs"]:
        by_arm.setdefault(run["arm"], []).append(run)
    facts = {name: facts_of(ARMS[name], found[0]["parameters"], rates[name]) for name, found in by_arm.items()}
    rows = summarise(by_arm)
    result["rows"], result["facts"] = rows, facts
    if rows:
        result["verdict"] = verdict(rows, facts)
        seeds, steps = max(row["seeds"] for row in rows.values()), result["train"]["steps"]
        title = f"Exact match on eight conflicting tasks: {seeds} seeds, {steps} steps; line: seeds, dot: worst task"
        path.with_suffix(".svg").write_text(plot(rows, facts, title))
        say(f"\n{table(rows, facts)}\n\n{task_table(rows)}\n\n{result['verdict']}")
    save(path, result)
    say(f"written to {path} and {path.with_suffix('.svg')}")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--presets", nargs="+", choices=sorted(ARMS), default=sorted(ARMS), metavar="ARM")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=TrainSetting.steps)
    parser.add_argument("--held-out", type=int, default=TrainSetting.held_out, help="scored samples of each task")
    parser.add_argument("--rates", nargs="+", type=float, default=RATES, help="the grid of learning rates")
    parser.add_argument("--lr", nargs="+", default=[], metavar="ARM=RATE", help="learning rates that are known already")
    parser.add_argument("--shown", choices=("old", "new"), default="old", help="how the examples are solved")
    parser.add_argument("--base-steps", type=int, help="all steps of the base's stages together")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=None, help="processes; each has one thread")
    parser.add_argument("--budget-seconds", type=float, default=1500, help="nothing is begun after that")
    parser.add_argument("--cache", default="build/lora_quality", help="where bases are kept")
    parser.add_argument("--out", help="where to write the JSON; the plot goes beside it")
    options = parser.parse_args()
    if options.jobs is None:
        options.jobs = len(os.sched_getaffinity(0)) if options.device == "cpu" else 1
    if unknown := [text for text in options.lr if text.rpartition("=")[0] not in ARMS]:
        parser.error(f"--lr: no arm in {', '.join(unknown)}; give ARM=RATE with an arm of {', '.join(ARMS)}")
    return options


if __name__ == "__main__":
    main()
