"""`planaria train` outside a launcher: start the workers, start them again when they die, and part in good order.

The keeper, which is nobody's child, holds their memory meanwhile.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from checkpointing.keeper.events import append_event
from checkpointing.keeper.retirement import Retirement, retire_keeper
from checkpointing.phases import Posted
from trainer.documents import matching_files
from trainer.endings import Ending, diagnosis, ending_of, is_loop, name_of_status
from trainer.events import read_events
from trainer.recipe import RecipeError, load_recipe, recipe_warnings
from trainer.refusal import VARIABLE
from trainer.runfolder import claim, lock, next_attempt, run_folder
from trainer.schema import Recipe
from trainer.supervisor import Signals, Worker, Workers
from trainer.tenant_recipe import data_sections

FAILED, USER_MISTAKE, RESUMABLE = 1, 2, 75
# Who ends a job gives it 30 seconds as a rule; the rest is for the workers' end and our own.
GRACE_S = 25.0


def worker_environment(workers: int) -> dict[str, str]:
    """What every worker needs, however many share this machine."""
    environment = dict(os.environ)
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))
    environment.setdefault("OPENBLAS_NUM_THREADS", "1")  # NumPy's: it would start them at its import
    # torchrun's own store outlives an attempt and would serve dead workers' addresses to the next one.
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    root = str(Path(__file__).resolve().parent.parent)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environment.get("PYTHONPATH")]))
    return environment


def train(recipe_path: str, overrides: Sequence[str]) -> int:
    """Validate, then run the job to its end. Returns 0, 1 (failed), 2 (the user must act), 75 (stopped, resumable)."""
    with Signals() as signals:
        recipe = load_recipe(recipe_path, overrides)
        for warning in recipe_warnings(recipe):
            print(f"warning: {warning}", file=sys.stderr)
        _check_inputs(recipe)
        with lock(run_folder(recipe), patience_s=1):  # rank 0 takes it for the run; this refuses early
            claim(recipe)
        command = [sys.executable, "-m", "trainer", "train", str(recipe_path), *overrides]
        with tempfile.TemporaryDirectory(prefix="planaria-") as scratch:
            job = Job(recipe, command, Path(scratch) / "refusal")
            status = job.run(signals)
        if status == RESUMABLE:
            words = part(recipe, signals)
            with contextlib.suppress(OSError):  # after SIGHUP there may be no terminal
                print(words, file=sys.stderr)
    return status


def _check_inputs(recipe: Recipe) -> None:
    """What would make every worker fail alike is found before any is started. Raises DataError or RecipeError."""
    for data in data_sections(recipe):
        matching_files(data)
    base = recipe.model.path
    if base is not None and not (Path(base) / "config.json").is_file():
        raise RecipeError([f"model.path: {base} is not a Hugging Face model folder: it has no config.json"])


class Job:
    """One launch: as many attempts as the recipe's restarts allow.

    Args:
        command: of a worker.
        refusal: the file in which a worker says that the user must act.
    """

    def __init__(self, recipe: Recipe, command: Sequence[str], refusal: Path) -> None:
        self.recipe, self.command, self.refusal = recipe, command, refusal
        self.run_dir = run_folder(recipe).resolve()
        self.environment = {**worker_environment(recipe.parallel.workers), VARIABLE: str(refusal)}
        self.endings: list[Ending | None] = []
        self._body = self._preload() if may_fork(recipe) else None

    def _preload(self) -> Callable[[], int] | None:
        """Import once what every worker of every attempt needs: a copy of this process has it at once.

        None if some library has started a thread, which a copy would lack.
        """
        os.environ.update(self.environment)
        import trainer.worker  # noqa: F401
        from trainer import engine

        engine.preload()
        return self._be_worker if len(os.listdir("/proc/self/task")) == 1 else None

    def _be_worker(self) -> int:
        from trainer import cli

        return cli.main(self.command[self.command.index("train") :])

    def run(self, signals: Signals) -> int:
        """Returns the exit status. Whenever it returns, no worker lives."""
        parallel = self.recipe.parallel
        for restart in range(parallel.restarts + 1):
            workers = Workers(
                self.command,
                parallel.workers,
                self.environment,
                parallel.deadlines.build,
                self._report_stuck,
                self._body,
            )
            with workers:
                ended = workers.wait(signals)
                dead = [worker for worker in ended if worker.status]
                self._report_ends(dead)
            if not ended:
                return RESUMABLE
            if self.refusal.exists():
                print(self.refusal.read_text(), file=sys.stderr)
                return USER_MISTAKE
            if not dead:
                return 0
            self._event("workers_ended")
            self.endings.append(self._ending({worker.process.pid for worker in workers.workers}))
            print(f"launcher: {self.endings[-1]}", file=sys.stderr, flush=True)
            if is_loop(self.endings) and self.endings[-1] is not None:
                self._event("crash_loop", ending=str(self.endings[-1]))
                print(diagnosis(self.endings[-1], self.run_dir), file=sys.stderr)
                return FAILED
            if restart < parallel.restarts:
                text = f"launcher: restart {restart + 1} of {parallel.restarts}"
                print(text, file=sys.stderr, flush=True)
        print("failed: no restart is left (parallel.restarts); the same command resumes", file=sys.stderr)
        return FAILED

    def _event(self, kind: str, step: int | None = None, **fields: object) -> None:
        append_event(self.run_dir, kind, step, max(0, next_attempt(self.run_dir) - 1), **fields)

    def _report_ends(self, dead: Sequence[Worker]) -> None:
        for worker in dead:
            posted = worker.board.read()
            self._event(
                "worker_exit",
                posted.step,
                worker=worker.rank,
                pid=worker.process.pid,
                status=worker.status,
                reason=name_of_status(worker.status or 0),
                phase=posted.phase,
            )

    def _report_stuck(self, worker: Worker, posted: Posted, seconds: float) -> None:
        self._event(
            "worker_stuck",
            posted.step,
            worker=worker.rank,
            pid=worker.process.pid,
            phase=posted.phase,
            seconds=round(seconds, 2),
            allowed_s=posted.allowed_s,
        )

    def _ending(self, pids: set[int]) -> Ending | None:
        return ending_of([row for row in read_events(self.run_dir) if row.get("pid") in pids])


def may_fork(recipe: Recipe) -> bool:
    """Whether workers may be copies of the launcher: CUDA must not be touched before a process forks."""
    device = recipe.parallel.device
    return device == "cpu" or (device == "auto" and not Path("/dev/nvidiactl").exists())


def part(recipe: Recipe, signals: Signals) -> str:
    """After a signal, with all workers dead: have the keeper put the newest step on disk. Returns the parting words."""
    deadline = time.monotonic() + GRACE_S
    name = signal.Signals(signals.received[0]).name
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)  # who asks twice does not want to wait
    retirement = retire_keeper(run_folder(recipe), max(deadline - time.monotonic(), 1.0))
    return f"stopped by {name}; {_kept(recipe, retirement)}; the same command resumes"


def _kept(recipe: Recipe, retirement: Retirement | None) -> str:
    if retirement is None:
        return "no keeper was running, so what is on disk stands"
    if retirement.in_memory >= 0:
        why = f" ({retirement.problem})" if retirement.problem else ": checkpoint.disk is off"
        return (
            f"step {retirement.in_memory} is in memory only{why}; the keeper (pid {retirement.pid}) holds it for "
            f"{recipe.checkpoint.linger_s} s"
        )
    if retirement.problem:
        return f"the keeper (pid {retirement.pid}) goes on: {retirement.problem}"
    if retirement.on_disk < 0:
        return "no step had been captured in memory"
    return f"step {retirement.on_disk} is on disk"
