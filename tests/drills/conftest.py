"""Real jobs for drills: whole process trees, reaped whatever happens.

What is started is ``planaria train`` as a user starts it, but for the seconds in which its launcher imports torch.
"""

import importlib.util
import os
import signal
import subprocess
from pathlib import Path

import pytest

from checkpointing.keeper.control import stop_keeper
from tests.forked import planaria, run_workers
from trainer.events import read_events
from trainer.failpoints import KILL_VARIABLE
from trainer.launch import worker_environment
from trainer.recipe import load_recipe

RECIPE = Path(__file__).parent / "drill.yaml"
LORA_RECIPE = Path(__file__).parent / "lora.yaml"
TIMEOUT_S = 150


def whole_overrides(folder, name, overrides):
    return [f"log.dir={folder}", f"log.run={name}", f"data.cache_dir={folder / 'cache'}", *overrides]


class Job:
    """One training job in its own session.

    Args:
        command: Another program that takes the recipe and the overrides, e.g. torchrun with ``-m trainer train``.
    """

    def __init__(self, folder, name, overrides=(), kill=None, command=None, environment=None, recipe=RECIPE):
        self.run_dir = folder / name
        self.recipe_path = recipe
        self.overrides = whole_overrides(folder, name, overrides)
        variables = {**worker_environment(2), "OMP_NUM_THREADS": "1", **(environment or {})}
        if kill is not None:
            variables[KILL_VARIABLE] = kill
        self.output = folder / f"{name}.log"
        with self.output.open("ab") as output:
            if command is None:
                output, arguments = output.fileno(), ["train", recipe, *self.overrides]
                self.process = planaria(*arguments, output=output, environment=variables)
            else:
                self.process = subprocess.Popen(
                    [*command, str(recipe), *self.overrides],
                    env=variables, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
                )  # fmt: skip

    @property
    def recipe(self):
        return load_recipe(self.recipe_path, self.overrides)

    def rows(self):
        return read_events(self.run_dir) if self.run_dir.exists() else []

    def wait(self):
        """Exit status of the whole job; fails the test with the job's output when it takes too long."""
        try:
            return self.process.wait(timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            pytest.fail(f"the job did not end in {TIMEOUT_S} s:\n{self.output.read_text()[-3000:]}")

    def finish(self):
        status = self.wait()
        assert status == 0, f"status {status}:\n{self.output.read_text()[-5000:]}"
        return self.rows()

    def reap(self):
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(timeout=10)
        if self.run_dir.exists():
            stop_keeper(self.run_dir, persist=False)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("drills")


@pytest.fixture(scope="session")
def start(folder):
    """Starts jobs in one folder, so that they share the data cache; all are gone when the tests end."""
    jobs = []

    def start_job(name, overrides=(), **options):
        jobs.append(Job(folder, name, overrides, **options))
        return jobs[-1]

    yield start_job
    for job in jobs:
        job.reap()


@pytest.fixture(scope="session")
def run_layout_workers(folder):
    """Runs ``layout_worker.py`` on so many ranks to its end; returns the run's folder."""
    folders = []

    def run(name, overrides, workers, *arguments):
        folders.append(folder / name)
        worker = Path(__file__).with_name("layout_worker.py")
        run_workers(workers, worker, *arguments, RECIPE, *whole_overrides(folder, name, overrides))
        return folders[-1]

    yield run
    for run_dir in folders:
        stop_keeper(run_dir, persist=False)


@pytest.fixture(scope="session")
def nothing_left():
    """Fails unless no process, memfd, lock or port of a run folder remains."""
    return load_module("leftovers").nothing_left


def load_module(name):
    """A helper beside the tests: pytest imports test files by path, so that they are no package."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def undisturbed(start):
    return start("undisturbed").finish()
