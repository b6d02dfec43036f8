"""Runs of a drill matrix as whole process trees, started as a user starts them and reaped whatever happens."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from checkpointing.keeper.control import stop_keeper
from checkpointing.keeper.protocol import KeeperError
from trainer.data import cache_root
from trainer.events import read_events
from trainer.failpoints import KILL_VARIABLE
from trainer.faults import Attempts, format_attempts
from trainer.leftovers import MARK, Traces
from trainer.matrix import settings
from trainer.recipe import load_recipe
from trainer.schema import Recipe

_POLL_S = 0.03
_OBSERVE_S = 1.0
Rows = list[dict[str, Any]]


class MatrixError(RuntimeError):
    """The matrix cannot go on: what all cases are compared with is missing."""


@dataclass
class Job:
    """One run of the recipe. ``seconds_allowed`` bounds each :meth:`wait`."""

    name: str
    recipe: Recipe
    run_dir: Path
    log: Path
    process: subprocess.Popen[bytes]
    traces: Traces
    seconds_allowed: float
    _observed: float = 0.0

    def rows(self) -> Rows:
        return read_events(self.run_dir)

    def wait(self, during: Callable[[], None] = lambda: None) -> tuple[int, list[str]]:
        """The exit status, and in words what is wrong with the job as a whole. ``during`` is called all the time."""
        deadline = time.monotonic() + self.seconds_allowed
        while self.process.poll() is None and time.monotonic() < deadline:
            self.observe()
            during()
            time.sleep(_POLL_S)
        if self.process.poll() is None:
            words = self.last_words()
            self.end()
            return -1, [f"the run {self.name} did not end in {self.seconds_allowed:.0f} s: {words}"]
        return self.process.returncode, []

    def wait_until(self, condition: Callable[[Rows], bool]) -> bool:
        """Whether the run's events came to meet a condition while it lived."""
        deadline = time.monotonic() + self.seconds_allowed
        while time.monotonic() < deadline:
            self.observe()
            ended = self.process.poll() is not None
            if condition(self.rows()):
                return True
            if ended:
                return False
            time.sleep(_POLL_S)
        return False

    def observe(self) -> None:
        if time.monotonic() - self._observed > _OBSERVE_S:
            self.traces.observe()
            self._observed = time.monotonic()

    def last_words(self) -> str:
        text = self.log.read_text(errors="replace").strip()
        return f"see {self.log}: {text[-300:]}" if text else f"see {self.log}"

    def end(self) -> None:
        """Nothing of the run lives after this."""
        if self.process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(timeout=30)
        if self.run_dir.exists():
            with suppress(KeeperError, OSError):
                stop_keeper(self.run_dir, persist=False, timeout_s=5)

    def leftovers(self) -> tuple[str, ...]:
        """What outlived the job; it is ended then."""
        found = self.traces.remaining(self.run_dir)
        self.end()
        return tuple(found)


@dataclass
class Bench:
    """Starts the jobs of one matrix in one folder, so that they share the data cache."""

    recipe_path: str
    overrides: Sequence[str]
    base: Path
    jobs: list[Job] = field(default_factory=list)
    _calm: dict[int, Rows] = field(default_factory=dict)

    def start(
        self,
        name: str,
        ranks: int,
        extra: Sequence[str] = (),
        kills: Attempts = (),
        environment: Mapping[str, str] | None = None,
        prefix: Sequence[str] = (),
        seconds_allowed: float = 180.0,
    ) -> Job:
        """Start ``prefix planaria train RECIPE`` with the matrix's settings and ``extra`` over them."""
        original = load_recipe(self.recipe_path, self.overrides)
        where = [f"log.dir={self.base}", f"log.run={name}", f"data.cache_dir={cache_root(original)}"]
        restarts = [f"parallel.restarts={len(kills) + 3}"]
        overrides = [*self.overrides, *settings(original, ranks), *where, *restarts, *extra]
        mark = secrets.token_hex(8)
        variables = {k: v for k, v in os.environ.items() if k != KILL_VARIABLE} | {MARK: mark} | dict(environment or {})
        root = str(Path(__file__).resolve().parent.parent)
        variables["PYTHONPATH"] = os.pathsep.join(filter(None, [root, variables.get("PYTHONPATH")]))
        if kills:
            variables[KILL_VARIABLE] = format_attempts(kills)
        log = self.base / "logs" / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        command = [*prefix, sys.executable, "-m", "trainer", "train", self.recipe_path, *overrides]
        with log.open("ab") as output:
            process = subprocess.Popen(command, env=variables, stdout=output, stderr=subprocess.STDOUT,
                                       stdin=subprocess.DEVNULL, start_new_session=True)  # fmt: skip
        recipe = load_recipe(self.recipe_path, overrides)
        job = Job(name, recipe, self.base / name, log, process, Traces(mark), seconds_allowed)
        self.jobs.append(job)
        return job

    def calm_name(self, ranks: int) -> str:
        return f"undisturbed-{ranks}"

    def calm(self, ranks: int) -> Rows:
        """The events of the undisturbed run; it is run once. Raises MatrixError if it fails."""
        if ranks not in self._calm:
            name = self.calm_name(ranks)
            rows = read_events(self.base / name)
            if not any(row["kind"] == "done" for row in rows):
                job = self.start(name, ranks)
                status, problems = job.wait()
                rows = job.rows()
                problems += job.leftovers()
                if status != 0 or problems:
                    raise MatrixError(f"the undisturbed run failed ({status}): {problems or job.last_words()}")
            self._calm[ranks] = rows
        return self._calm[ranks]

    def close(self) -> None:
        for job in self.jobs:
            job.end()
