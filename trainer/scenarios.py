"""Cases of the drill matrix that are more than a kill: damaged checkpoints, bad disks, too little memory, signals."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from trainer import damage
from trainer.failpoints import DISK_VARIABLE
from trainer.faults import DiskFaultSpec, KillSpec
from trainer.launch import RESUMABLE
from trainer.matrix import Case
from trainer.matrix_jobs import Bench, Job, Rows
from trainer.matrix_verdict import CaseVerdict, final_hash, of_kind
from trainer.timesplit import split_seconds

_USER_MISTAKE = 2
_LONGEST_STALL_S = 2.0
_SOON_HUNG = "checkpoint.disk.hung_after_s=1"
_ONLY_DURING = "checkpoint.disk.final=false"  # a disk that takes nothing must not keep the run from ending


def carry_out(case: Case, bench: Bench) -> CaseVerdict:
    """Run one scenario to its verdict."""
    started = time.monotonic()
    verdict = _SCENARIOS[case.kind](case, bench)
    return replace(verdict, wall_s=time.monotonic() - started)


def _ended(case: Case, job: Job, status: int, problems: Sequence[str], calm: Rows, since: int = 0) -> CaseVerdict:
    """The verdict of a job that should have ended well; ``since`` is how many rows its folder had before."""
    rows = job.rows()[since:]
    leftovers = job.leftovers()
    found = list(problems)
    if status != 0:
        found.append(f"the run exited with status {status}; {job.last_words()}")
    hashes = final_hash(calm), final_hash(rows)
    if hashes[0] != hashes[1]:
        found.append("the state hashes differ" if hashes[1] else "the run did not finish")
    plan = of_kind(rows, "recovery_plan")
    kill = of_kind(rows, "kill")
    verdict = CaseVerdict(case.name, tuple(found), state_hash_undisturbed=hashes[0], state_hash=hashes[1],
                          leftovers=leftovers)  # fmt: skip
    if plan and plan[-1]["tier"] != "fresh":
        completed = _completed_before(rows, plan[-1])
        verdict = replace(verdict, tier=plan[-1]["tier"], recovered_step=plan[-1]["step"],
                          steps_lost=max(0, completed - plan[-1]["step"]))  # fmt: skip
        if kill:
            verdict = replace(verdict, kill=kill[0]["at"], seconds=split_seconds(rows, kill[0], completed))
    return verdict


def _completed_before(rows: Rows, plan: dict[str, Any]) -> int:
    steps = [row["step"] for row in of_kind(rows, "step") if row["time"] <= plan["time"]]
    return max(steps, default=int(plan["step"]))


# Damaged checkpoints


def _damaged(hurt: Callable[[Path], None], expect_newest: bool = False) -> Callable[[Case, Bench], CaseVerdict]:
    """A finished run whose newest checkpoint is damaged must be trained to the same end from the one before."""

    def carry(case: Case, bench: Bench) -> CaseVerdict:
        calm = bench.calm(case.ranks)
        folder = bench.base / case.name
        shutil.copytree(bench.base / bench.calm_name(case.ranks), folder)
        newest, path = damage.newest_checkpoint(folder)
        hurt(path)
        job = bench.start(case.name, case.ranks)
        status, problems = job.wait()
        verdict = _ended(case, job, status, problems, calm, len(calm))
        verdict = replace(verdict, steps_lost=max(0, newest - verdict.recovered_step))
        every = job.recipe.checkpoint.disk.every
        wanted = newest if expect_newest else newest - every
        if verdict.tier != "disk" or verdict.recovered_step != wanted:
            verdict = verdict.with_problems(
                f"step {wanted} on disk was to be restored, not step {verdict.recovered_step} ({verdict.tier})"
            )
        return verdict

    return carry


# Bad disks


def _killed_on(
    bench: Bench, case: Case, environment: dict[str, str], prefix: Sequence[str] = ()
) -> tuple[CaseVerdict, Rows]:
    """A worker is killed while the disk is bad: memory must serve, and training never have waited for the disk."""
    calm = bench.calm(case.ranks)
    kill = KillSpec(case.ranks - 1, 11)
    job = bench.start(case.name, case.ranks, [_ONLY_DURING, _SOON_HUNG], ((kill,),), environment, prefix)
    status, problems = job.wait()
    rows = job.rows()
    verdict = replace(_ended(case, job, status, problems, calm), kill=str(kill))
    if verdict.tier != "memory" or verdict.steps_lost > 1:
        verdict = verdict.with_problems("memory did not serve")
    stall = max((row["stall_copied_s"] for row in of_kind(rows, "step")), default=0.0)
    if stall > _LONGEST_STALL_S:
        verdict = verdict.with_problems(f"a step waited {stall:.1f} s for its capture")
    return verdict, rows


def _full_disk(case: Case, bench: Bench) -> CaseVerdict:
    """The checkpoints' folder is a file system with room for half a checkpoint."""
    bench.calm(case.ranks)
    _, newest = damage.newest_checkpoint(bench.base / bench.calm_name(case.ranks))
    room = sum(path.stat().st_size for path in newest.iterdir()) // 2
    folder = bench.base / case.name / "checkpoints"
    folder.mkdir(parents=True)
    prefix = in_namespace([f"mount -t tmpfs -o size={max(room, 1 << 16)} tmpfs {folder}"])
    problem = unsupported(prefix)
    if problem:
        return CaseVerdict(case.name, (problem,))
    verdict, rows = _killed_on(bench, case, {}, prefix)
    if not of_kind(rows, "disk_failed"):
        verdict = verdict.with_problems("nobody said that the disk is full")
    return verdict


def _faulty_disk(fault: DiskFaultSpec, reports: Sequence[str]) -> Callable[[Case, Bench], CaseVerdict]:
    def carry(case: Case, bench: Bench) -> CaseVerdict:
        verdict, rows = _killed_on(bench, case, {DISK_VARIABLE: str(fault)})
        if not any(of_kind(rows, kind) for kind in reports):
            verdict = verdict.with_problems(f"nobody reported the disk: no event {' or '.join(reports)}")
        return verdict

    return carry


# Too little memory


def _refused_start(case: Case, bench: Bench, prefix: Sequence[str]) -> CaseVerdict:
    """Refused before the first step, with both figures, as a mistake of the user's."""
    problem = unsupported(prefix)
    if problem:
        return CaseVerdict(case.name, (problem,))
    job = bench.start(case.name, case.ranks, prefix=prefix)
    status, problems = job.wait()
    text = job.log.read_text(errors="replace")
    if status != _USER_MISTAKE:
        problems.append(f"the run exited with status {status}, not {_USER_MISTAKE}; {job.last_words()}")
    if not ("bytes" in text and "are available" in text):
        problems.append(f"the bytes that are needed were not said; {job.last_words()}")
    if "Traceback" in text:
        problems.append(f"a traceback for a user's mistake; see {job.log}")
    if of_kind(job.rows(), "optimizer"):
        problems.append("training began all the same")
    return CaseVerdict(case.name, tuple(problems), leftovers=job.leftovers())


def _too_large_for_machine(case: Case, bench: Bench) -> CaseVerdict:
    lines = Path("/proc/meminfo").read_text().splitlines()
    told = bench.base / "meminfo"
    told.write_text("\n".join("MemAvailable: 64 kB" if line.startswith("MemAvailable:") else line for line in lines))
    return _refused_start(case, bench, in_namespace([f"mount --bind {told} /proc/meminfo"]))


def _too_large_for_cgroup(case: Case, bench: Bench) -> CaseVerdict:
    """A limit of this process's own control group, as the kernel shows it; the real groups are left alone."""
    commands = ["mount -t tmpfs tmpfs /sys/fs/cgroup"]
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root = "/sys/fs/cgroup/memory" if controllers else "/sys/fs/cgroup"
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
        group = f"{root}/{path.lstrip('/')}"
        commands.append(f"mkdir -p '{group}'")
        commands += [f"echo {value} > '{group}/{name}'" for name, value in zip(names, (1 << 20, 1 << 19), strict=True)]
        commands.append(f"echo inactive_file 0 > '{group}/memory.stat'")
    return _refused_start(case, bench, in_namespace(commands))


def in_namespace(commands: Sequence[str]) -> list[str]:
    """What to put before a command so that it runs after these, in a mount namespace of its own."""
    user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    script = " && ".join([*commands, 'exec "$@"'])
    return ["unshare", *user, "--mount", "sh", "-c", script, "planaria"]


def unsupported(prefix: Sequence[str]) -> str:
    """Why such a namespace cannot be had here; empty if it can."""
    try:
        done = subprocess.run([*prefix, "true"], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"not run, this machine allows no mount namespace: {error}"
    return f"not run, this machine allows no mount namespace: {done.stderr.strip()}" if done.returncode else ""


# Signals


def _reached(step: int) -> Callable[[Rows], bool]:
    return lambda rows: any(row["step"] >= step for row in of_kind(rows, "step"))


def _sigterm(case: Case, bench: Bench) -> CaseVerdict:
    """Stopped resumably, and the same command ends with the same state."""
    calm = bench.calm(case.ranks)
    job = bench.start(case.name, case.ranks)
    problems = [] if job.wait_until(_reached(9)) else ["the run never came to step 9"]
    job.process.send_signal(signal.SIGTERM)
    status, late = job.wait()
    if status != RESUMABLE:
        problems.append(f"the stopped run exited with status {status}, not {RESUMABLE}; {job.last_words()}")
    again = bench.start(case.name, case.ranks)
    status, more = again.wait()
    verdict = _ended(case, again, status, [*problems, *late, *more], calm)
    if verdict.tier not in ("memory", "disk") or verdict.steps_lost > 1:
        verdict = verdict.with_problems(f"{verdict.steps_lost} completed steps were lost ({verdict.tier})")
    return verdict


def _sigstop(case: Case, bench: Bench) -> CaseVerdict:
    """A worker that stands still is found and killed, and the run goes on."""
    calm = bench.calm(case.ranks)
    job = bench.start(case.name, case.ranks)
    problems = [] if job.wait_until(_reached(9)) else ["the run never came to step 9"]
    pids = [row["pid"] for row in of_kind(job.rows(), "start") if row["rank"] == case.ranks - 1]
    if pids:
        os.kill(pids[-1], signal.SIGSTOP)
    status, late = job.wait()
    rows = job.rows()
    verdict = _ended(case, job, status, [*problems, *late], calm)
    if not of_kind(rows, "worker_stuck"):
        verdict = verdict.with_problems("nobody reported the stopped worker: no event worker_stuck")
    if verdict.tier != "memory" or verdict.steps_lost > 1:
        verdict = verdict.with_problems(f"{verdict.steps_lost} completed steps were lost ({verdict.tier})")
    return verdict


_SCENARIOS: dict[str, Callable[[Case, Bench], CaseVerdict]] = {
    "truncated-file": _damaged(damage.truncate),
    "missing-file": _damaged(damage.remove_file),
    "swapped-files": _damaged(damage.swap_files),
    "stale-latest": _damaged(damage.rewrite_hint("step-4\n"), expect_newest=True),
    "empty-latest": _damaged(damage.rewrite_hint(""), expect_newest=True),
    "full-disk": _full_disk,
    "slow-disk": _faulty_disk(DiskFaultSpec("throttle", bytes_per_s=1_000_000), ("disk_slow", "disk_written")),
    "hung-disk": _faulty_disk(DiskFaultSpec("hang", seconds=12, first=4, last=4), ("disk_hung",)),
    "too-large-for-machine": _too_large_for_machine,
    "too-large-for-cgroup": _too_large_for_cgroup,
    "sigterm": _sigterm,
    "sigstop": _sigstop,
}
