"""`planaria train` outside a launcher: start the workers through torchrun, with restarts.

torchrun notices a dead worker, stops its siblings and starts all of them again; the keeper, which is not its child,
holds their memory meanwhile.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from trainer.recipe import load_recipe, recipe_warnings
from trainer.refusal import VARIABLE

USER_MISTAKE, RESUMABLE = 2, 75


def worker_environment(workers: int) -> dict[str, str]:
    """What every worker needs, however many share this machine."""
    environment = dict(os.environ)
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))
    # A store shared with the agent outlives an attempt and would serve dead workers' addresses to the next one.
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    root = str(Path(__file__).resolve().parent.parent)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environment.get("PYTHONPATH")]))
    return environment


def torchrun_command(workers: int, restarts: int, arguments: Sequence[str]) -> list[str]:
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={workers}",
        f"--max-restarts={restarts}",
        "--monitor-interval=0.1",
        "-m",
        "trainer",
        *arguments,
    ]


def train(recipe_path: str, overrides: Sequence[str]) -> int:
    """Validate, then run the job to its end. Returns 0, 1 (failed), 2 (the user must act) or 75 (stopped, resumable)."""
    recipe = load_recipe(recipe_path, overrides)
    for warning in recipe_warnings(recipe):
        print(f"warning: {warning}", file=sys.stderr)
    parallel = recipe.parallel
    command = torchrun_command(parallel.workers, parallel.restarts, ["train", str(recipe_path), *overrides])
    with tempfile.TemporaryDirectory(prefix="planaria-") as scratch:
        refusal = Path(scratch) / "refusal"
        environment = {**worker_environment(parallel.workers), VARIABLE: str(refusal)}
        with subprocess.Popen(command, env=environment) as job:
            stopped = _forward_signals(job)
            status = job.wait()
        if refusal.exists():
            print(refusal.read_text(), file=sys.stderr)
            return USER_MISTAKE
    if stopped:
        print("stopped; the same command resumes from the last sealed step", file=sys.stderr)
        return RESUMABLE
    return 0 if status == 0 else 1


def _forward_signals(job: subprocess.Popen[bytes]) -> list[int]:
    """Pass SIGTERM and SIGINT on to the agent, once; returns a list that tells whether one came."""
    received: list[int] = []

    def handler(number: int, _frame: object) -> None:
        if not received:
            job.send_signal(signal.SIGTERM)
        received.append(number)

    signal.signal(signal.SIGTERM, handler)
    signal.signal(signal.SIGINT, handler)
    return received
