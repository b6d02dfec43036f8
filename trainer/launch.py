"""`planaria train` outside a launcher: start the workers through torchrun, with restarts.

torchrun notices a dead worker, stops its siblings and starts all of them again; the keeper, which is not its child,
holds their memory meanwhile.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from trainer.documents import matching_files
from trainer.recipe import RecipeError, load_recipe, recipe_warnings
from trainer.refusal import VARIABLE
from trainer.runfolder import claim, lock, run_folder
from trainer.schema import Recipe

FAILED, USER_MISTAKE, RESUMABLE = 1, 2, 75
_PARTING = {
    FAILED: "failed: a worker died and no restart is left; its own message is above. The same command resumes",
    RESUMABLE: "stopped; the same command resumes from the last sealed step",
}


def worker_environment(workers: int) -> dict[str, str]:
    """What every worker needs, however many share this machine."""
    environment = dict(os.environ)
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))
    # A store shared with the agent outlives an attempt and would serve dead workers' addresses to the next one.
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    root = str(Path(__file__).resolve().parent.parent)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environment.get("PYTHONPATH")]))
    return environment


def torchrun_arguments(workers: int, restarts: int, arguments: Sequence[str]) -> list[str]:
    """What follows `torchrun` on the command line."""
    return [
        "--standalone",
        f"--nproc-per-node={workers}",
        f"--max-restarts={restarts}",
        "--monitor-interval=0.1",
        *arguments,
    ]


def train(recipe_path: str, overrides: Sequence[str]) -> int:
    """Validate, then run the job to its end. Returns 0, 1 (failed), 2 (the user must act), 75 (stopped, resumable)."""
    recipe = load_recipe(recipe_path, overrides)
    for warning in recipe_warnings(recipe):
        print(f"warning: {warning}", file=sys.stderr)
    _check_inputs(recipe)
    with lock(run_folder(recipe), patience_s=1):  # rank 0 takes it for the run; here it is asked for, to refuse early
        claim(recipe)
    parallel = recipe.parallel
    worker = ["-m", "trainer", "train", str(recipe_path), *overrides]
    with tempfile.TemporaryDirectory(prefix="planaria-") as scratch:
        refusal = Path(scratch) / "refusal"
        os.environ.update(worker_environment(parallel.workers), **{VARIABLE: str(refusal)})
        status = run_agent(torchrun_arguments(parallel.workers, parallel.restarts, worker))
        if refusal.exists():
            print(refusal.read_text(), file=sys.stderr)
            return USER_MISTAKE
    if status != 0:
        print(_PARTING[status], file=sys.stderr)
    return status


def _check_inputs(recipe: Recipe) -> None:
    """What would make every worker fail alike is found before any is started. Raises DataError or RecipeError."""
    matching_files(recipe.data)
    base = recipe.model.path
    if base is not None and not (Path(base) / "config.json").is_file():
        raise RecipeError([f"model.path: {base} is not a Hugging Face model folder: it has no config.json"])


def run_agent(arguments: Sequence[str]) -> int:
    """Be torchrun's agent in this process: what it raises becomes an exit status instead of a traceback."""
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        torchrun.run(torchrun.parse_args(list(arguments)))
    except ChildFailedError:
        return FAILED
    except (SignalException, KeyboardInterrupt):
        return RESUMABLE
    return 0
