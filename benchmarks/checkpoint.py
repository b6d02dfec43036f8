"""What checkpoints cost a training run, and how fast they come back: this project's modes beside DeepSpeed and torch.

    torchrun --standalone --nproc-per-node 1 -m benchmarks.checkpoint --config gpu-1b
    torchrun --standalone --nproc-per-node 2 -m benchmarks.checkpoint --config cpu

One model, one engine, one run: blocks of steps without checkpoints and with one arm alternate, so that whatever else
slows the machine slows both. Costs are ratios of medians; the machine's own limits are measured in the same run and
stand beside them. Loads of the others read files that were just written, from the page cache.

Prints tables and writes JSON to --json, or checkpoint-CONFIG.json in the folder that the variable OUT names (else
build/), again after every arm: what was measured is kept if the time runs out. Needs memory for the slots of one mode
beside another (docs/recovery.md) and disk for three copies of the state in --work.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from benchmarks.arms import Arm, Dcp, DeepSpeed, Off, Planaria
from benchmarks.blocks import run_block, run_loads, run_recoveries
from benchmarks.ceilings import device_copy_gbps, disk_gbps, hash_gbps, memcpy_gbps
from benchmarks.machine import describe_machine, result_path, save, say
from benchmarks.report import summarise, tables
from benchmarks.workload import CONFIGS, Job, build_job, device_of, shrunk
from checkpointing.cost import BudgetError
from checkpointing.keeper.protocol import KeeperRefused
from checkpointing.state.zero import zero_buffers
from trainer.rendezvous import die_with_launcher, join

# Of the time, for the blocks of the product's modes; recoveries and peers, if they run, need the rest.
_MODES_SHARE, _MODES_SHARE_ALONE = 0.5, 0.8
_RECOVERY_S = 25.0  # of a mode's recoveries, a guess


class Budget:
    """The time that is left, as all ranks see it. An arm is begun only if what it took before still fits."""

    def __init__(self, seconds: float) -> None:
        self._started, self._seconds = time.monotonic(), seconds
        self._took: dict[str, float] = {}

    @property
    def spent_s(self) -> float:
        return time.monotonic() - self._started

    def allows(self, what: str, guess_s: float = 0.0, share: float = 1.0) -> bool:
        """Whether ``what`` ends before that share of the budget is spent. A collective: rank 0 decides."""
        answer = [self.spent_s + self._took.get(what, guess_s) < share * self._seconds]
        dist.broadcast_object_list(answer, src=0)
        return bool(answer[0])

    def spend(self, what: str, work: Callable[[], Any]) -> Any:
        started = time.monotonic()
        try:
            return work()
        finally:
            self._took[what] = time.monotonic() - started


class Benchmark:
    """Runs the arms in their order and keeps the result, which rank 0 writes."""

    def __init__(self, job: Job, budget: Budget, path: Path, machine: dict[str, Any], share: float) -> None:
        self.job, self.budget, self._path, self._share = job, budget, path, share
        self.off = Off()
        buffers = zero_buffers(job.zero_optimizer)
        self.result: dict[str, Any] = {
            "machine": machine,
            "config": dataclasses.asdict(job.config),
            "world": job.process.world,
            "tokens_per_step": job.config.tokens,
            "parameters_per_rank": job.parameters,
            "state_bytes_per_rank": sum(b.tensor.numel() * b.tensor.element_size() for b in buffers),
            "ceilings": {},
            "arms": {},
            "blocks": [],
            "recoveries": {},
            "skipped": {},
        }

    @property
    def first(self) -> bool:
        return self.job.process.rank == 0

    def say(self, text: str) -> None:
        if self.first:
            say(f"[{self.budget.spent_s:5.0f} s] {text}")

    def save(self) -> None:
        if self.first:
            self.result["seconds"] = self.budget.spent_s
            self.result["summary"] = summarise(self.result)
            save(self._path, self.result)

    def skip(self, what: str, why: str) -> None:
        self.result["skipped"][what] = why
        self.say(f"{what}: left out, {why}")

    def attempt(self, what: str, work: Callable[[], object]) -> None:
        """Do the work; alone on a machine, go on without it if it fails. Other ranks would wait for this one."""
        try:
            work()
        except Exception as error:
            if self.job.process.world > 1:
                raise
            traceback.print_exc()
            self.skip(what, f"{type(error).__name__}: {error}")

    def measure_ceilings(self) -> None:
        if self.first:
            nbytes = self.job.config.ceiling_bytes
            cores = len(os.sched_getaffinity(0))
            threads = sorted({n for n in (1, 4, 8, 16) if n <= cores} | {min(cores, 16)})
            self.result["ceilings"] = {
                "device": device_copy_gbps(nbytes),
                "memcpy": memcpy_gbps(nbytes, threads),
                "xxh3_128": hash_gbps(nbytes, threads),
                "disk": disk_gbps(self.job.folder, nbytes),
            }
            self.say(f"ceilings in GB/s: {self.result['ceilings']}")
        self.save()
        dist.barrier()

    def block(self, arm: Arm) -> dict[str, Any]:
        """One block, noted; the larger stall of all ranks counts."""
        figures = self.budget.spend(arm.name, lambda: run_block(self.job, arm))
        gathered: list[Any] = [None] * self.job.process.world
        dist.all_gather_object(gathered, figures["stalls"])
        figures["stalls"] = [max(stalls) for stalls in zip(*gathered, strict=True)]
        self.result["blocks"].append({k: v for k, v in figures.items() if k != "saved"})
        middle = statistics.median(figures["durations"])
        self.say(
            f"{arm.name:16s} {len(figures['durations']):3d} steps of {1e3 * middle:8.1f} ms, longest "
            f"{1e3 * max(figures['durations']):8.1f} ms, longest stall {1e3 * max(figures['stalls']):8.2f} ms"
        )
        return figures

    def compare_modes(self, modes: Sequence[str], rotation: int | None) -> None:
        """Every mode of the product against off in turn, then its recoveries."""
        arms = [self._open(mode, rotation) for mode in modes]
        for _ in range(self.job.config.rounds):
            for arm in filter(None, arms):
                if arm.name not in self.result["skipped"] and self.budget.allows(arm.name, share=self._share):
                    self.attempt(arm.name, lambda arm=arm: self._pair(arm))
            self.save()
        for arm in filter(None, arms):
            if arm.name not in self.result["skipped"]:
                self.attempt(f"{arm.name} recovery", lambda arm=arm: self._recover(arm))
            arm.close()
            self.say(f"{arm.name}: closed")

    def _open(self, mode: str, rotation: int | None) -> Planaria | None:
        try:
            arm = Planaria(self.job, mode, rotation)
        except (KeeperRefused, BudgetError) as error:  # too little memory, on every rank of this node alike
            self.skip(mode, str(error))
            return None
        assert arm.snapshots.client is not None
        protection = arm.snapshots.protection
        assert protection is not None
        self.result["arms"][mode] = {
            "opened_s": arm.opened_s,
            "bytes_per_step_per_rank": arm.bytes_per_step,
            "parts": len(protection.fragments),
            "memory_bytes_per_rank": arm.snapshots.client.arena.shape.nbytes,
        }
        self.say(f"{mode}: {self.result['arms'][mode]}")
        return arm

    def _recover(self, arm: Planaria) -> None:
        if not self.budget.allows(f"{arm.name} recovery", guess_s=_RECOVERY_S):
            self.skip(f"{arm.name} recovery", "the time ran out")
            return
        found = run_recoveries(self.job, arm)
        self.result["recoveries"][arm.name] = found
        self.say(f"{arm.name} recoveries: {found}")
        self.save()

    def _pair(self, arm: Arm) -> dict[str, Any]:
        self.block(self.off)
        return self.block(arm)

    def compare_peers(self, arms: Sequence[DeepSpeed | Dcp]) -> None:
        """Each peer's saves against off in turn; then loads of its last save."""
        saved: dict[str, list[int]] = {}

        def save_once(arm: DeepSpeed | Dcp) -> None:
            saved.pop(arm.name, None)
            saved[arm.name] = self._pair(arm)["saved"]
            self.save()

        for _ in range(self.job.config.saves):
            for arm in arms:
                if arm.name not in self.result["skipped"] and self.budget.allows(arm.name, guess_s=60):
                    self.attempt(arm.name, lambda arm=arm: save_once(arm))
        for arm in arms:
            if arm.name in saved and self.budget.allows("load", guess_s=20):
                self.attempt(f"{arm.name} load", lambda arm=arm: self._load(arm, saved[arm.name]))
            else:
                self.skip(f"{arm.name} load", "there is no save, or the time ran out")
            self.attempt(f"{arm.name} close", arm.close)
            self.save()

    def _load(self, arm: DeepSpeed | Dcp, saved: list[int]) -> None:
        repeats = self.job.config.recoveries if self.job.process.device.type == "cpu" else 1
        found = self.budget.spend("load", lambda: run_loads(self.job, arm, saved, repeats))
        self.result["recoveries"][arm.name] = found
        self.say(f"{arm.name} loads: {found}")


def peers_of(job: Job) -> list[DeepSpeed | Dcp]:
    """DeepSpeed last: its load replaces the tensors that the others point at."""
    group = dist.new_group(backend="gloo")
    arms: list[DeepSpeed | Dcp] = [Dcp(job, group, pinned=False)]
    if job.process.device.type == "cuda":
        arms.append(Dcp(job, group, pinned=True))
    return [*arms, DeepSpeed(job)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", choices=sorted(CONFIGS), required=True)
    parser.add_argument("--budget-seconds", type=float, default=540, help="begin nothing that would end later")
    parser.add_argument("--rounds", type=int, help="of blocks per mode, instead of the config's")
    parser.add_argument("--modes", nargs="*", default=["wal", "dense"])
    parser.add_argument("--rotation", type=int, help="of mode wal; default: what the product finds best here")
    parser.add_argument("--no-peers", action="store_true", help="leave DeepSpeed and torch out")
    parser.add_argument("--work", help="a folder for run folders and saves, emptied of them; default: a temporary one")
    parser.add_argument("--json", help="where to write the figures")
    options = parser.parse_args()
    die_with_launcher()
    budget = Budget(options.budget_seconds)
    config = shrunk(CONFIGS[options.config], options.rounds)
    process = join(device_of(config))
    work = [tempfile.mkdtemp(prefix="planaria-benchmark-", dir=options.work)] if process.rank == 0 else [""]
    dist.broadcast_object_list(work, src=0)
    folder = Path(work[0])
    try:
        job = build_job(config, process, folder)
        path = result_path(f"checkpoint-{options.config}.json", options.json)
        share = _MODES_SHARE
        if options.no_peers:
            left = 1 - 1.2 * _RECOVERY_S * len(options.modes) / options.budget_seconds
            share = min(_MODES_SHARE_ALONE, max(left, _MODES_SHARE))
        benchmark = Benchmark(job, budget, path, describe_machine(), share)
        benchmark.say(f"{options.config}: {config}")
        benchmark.say(f"{benchmark.result['machine']}")
        benchmark.say(f"{job.parameters:,} parameters and {benchmark.result['state_bytes_per_rank']:,} bytes a rank")
        benchmark.measure_ceilings()
        benchmark.block(benchmark.off)  # the first steps are slow; this block is not counted
        benchmark.result["blocks"].clear()
        benchmark.compare_modes(options.modes, options.rotation)
        if options.no_peers:
            benchmark.skip("peers", "--no-peers was given")
        else:
            benchmark.compare_peers(peers_of(job))
        benchmark.save()
        if process.rank == 0:
            say(tables(benchmark.result))
            say(f"written to {path}")
        dist.barrier()
    finally:
        if process.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
    sys.stdout.flush()
    os._exit(0)  # background threads of the peers would hold the process


if __name__ == "__main__":
    main()
