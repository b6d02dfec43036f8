"""The ``planaria`` command. Nothing heavy is imported before a verb needs it.

Exit status: 0 done, 1 failed, 2 the user's mistake (said on stderr, without a traceback), 75 stopped but
resumable by the same command, 130 ended by ctrl-C, 141 nobody reads the output any more.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from types import ModuleType

from trainer.adapter_cli import add_adapter_verbs
from trainer.checkpoint_cli import add_verbs
from trainer.faults import POINTS
from trainer.generate_cli import add_generate_verb
from trainer.lookahead_cli import add_lookahead_verbs
from trainer.model_cli import add_model_verbs
from trainer.output import lasting_output
from trainer.plan_inference_cli import add_plan_inference_verb
from trainer.refusal import is_users_mistake, refused
from trainer.serve_cli import add_serve_verbs
from trainer.simulate_cli import add_simulate_verb

FAILED, USER_MISTAKE, INTERRUPTED, UNREAD = 1, 2, 130, 141
_OVERRIDES = "section.key=value, put over the recipe's own"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit status. Raises SystemExit for arguments that argparse refuses."""
    try:
        try:
            return _run(sys.argv[1:] if argv is None else argv)
        finally:
            sys.stdout.flush()
    except OSError as error:
        # Errors of a stream do not say whose they are, those of a file do. What cannot be written now is what could not
        # be written then.
        if error.filename is not None or (failed := _output_error()) is None:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes once more
        if isinstance(failed, BrokenPipeError):
            return UNREAD  # without a word, like every program in a pipe whose reader has enough
        print(f"standard output: {error.strerror}; what was to be printed is lost", file=sys.stderr)
        return FAILED


def _output_error() -> OSError | None:
    try:
        print(flush=True)
    except OSError as error:
        return error
    return None


def _run(argv: Sequence[str]) -> int:
    arguments = _parse(argv)
    verb: Callable[[argparse.Namespace], int] = arguments.run
    try:
        return verb(arguments)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except ValueError as error:
        if not is_users_mistake(error):
            raise
        print(error, file=sys.stderr)
        return USER_MISTAKE
    except OSError as error:
        if error.filename is None:
            raise
        print(f"{error.filename}: {error.strerror}; give another path or mend this one", file=sys.stderr)
        return USER_MISTAKE


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = _parser()
    if list(argv[:2]) == ["drill", "matrix"]:
        argv = ["drill matrix", *argv[2:]]
    arguments, rest = parser.parse_known_args(argv)
    # argparse stops collecting overrides at the first option behind the recipe; take the later ones too.
    unknown = [text for text in rest if text.startswith("-") or not hasattr(arguments, "overrides")]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest:
        arguments.overrides = [*arguments.overrides, *rest]
    return arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="planaria",
        description="Train mixture-of-experts models that survive any failure, bit for bit.",
        allow_abbrev=False,
    )
    # The deepspeed launcher puts this before the verb; the environment says the same.
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False)
        sub.set_defaults(run=run)
        return sub

    train = verb("train", _train, "train, or go on with, the run that a recipe describes")
    validate = verb("validate", _validate, "check a recipe and print what it would train, without training")
    drill = verb("drill", _drill, "kill a worker mid-run and compare the end with an undisturbed run")
    matrix = verb("drill matrix", _drill_matrix, "kill every process at every point, damage what is kept, compare")
    for sub in (train, validate, drill, matrix):
        sub.add_argument("recipe", help="path of a YAML recipe")
        sub.add_argument("overrides", nargs="*", metavar="key=value", help=_OVERRIDES)
    drill.add_argument(
        "--kill",
        metavar="SPEC",
        help=f"rank=N,step=N,at={'|'.join(POINTS)}[,who=worker|keeper|both]",
    )
    drill.add_argument("--json", metavar="FILE", help="write the verdict here, too")
    _add_matrix_options(matrix)
    add_model_verbs(verb)
    add_simulate_verb(verb)
    add_serve_verbs(verb, _count, _fraction)
    add_plan_inference_verb(verb, _fraction, _count)
    _add_doctor_options(verb("doctor", _doctor, "compare a model with transformers, and look for what would not train"))

    _add_export_options(verb("export", _export, "write a run's model as a Hugging Face folder"))
    _add_preview_options(verb("preview", _preview, "print samples as the model will see them, with the loss mask"))

    add_verbs(verbs.add_parser("checkpoint", help="look at, check, compare or delete a run's checkpoints"))
    add_adapter_verbs(verbs.add_parser("adapter", help="write adapters for other tools, or read theirs"))
    add_lookahead_verbs(verbs.add_parser("lookahead", help="train heads that foresee experts, or record routing"))

    keeper = verb("keeper", _keeper, "stop, or look at, the process that holds a run's state in memory")
    keeper.add_argument("action", choices=("stop", "status"), help="stop writes the newest step to disk first")
    keeper.add_argument("run_dir", metavar="RUN", help="run folder, e.g. runs/quickstart")
    keeper.add_argument("--discard", action="store_true", help="stop without writing, and even if the disk hangs")

    add_generate_verb(verb, _count, _fraction)
    return parser


def _add_export_options(export: argparse.ArgumentParser) -> None:
    export.add_argument("run_dir", metavar="RUN", help="run folder, e.g. runs/quickstart")
    export.add_argument("out_dir", metavar="OUT", help="folder to make")
    export.add_argument(
        "--inexact", action="store_true", help="redo a log that another device or torch wrote; bits may differ"
    )
    export.add_argument(
        "--step",
        type=_step,
        metavar="best|last|N",
        help="best: the one with the lowest held-out loss; default: last, the newest that verifies",
    )


def _add_preview_options(preview: argparse.ArgumentParser) -> None:
    preview.add_argument("recipe", help="path of a YAML recipe")
    preview.add_argument("overrides", nargs="*", metavar="key=value", help=_OVERRIDES)
    preview.add_argument("--samples", type=_count, default=3, metavar="N", help="how many sequences to print")


def _add_doctor_options(doctor: argparse.ArgumentParser) -> None:
    doctor.add_argument("model", metavar="MODEL", help="a Hugging Face folder, or a YAML recipe")
    doctor.add_argument("overrides", nargs="*", metavar="key=value", help=_OVERRIDES)
    doctor.add_argument("--files-only", action="store_true", help="check the files, without loading the model")
    doctor.add_argument("--json", metavar="FILE", help="write the findings here, too")


def _add_matrix_options(matrix: argparse.ArgumentParser) -> None:
    matrix.add_argument("--ranks", type=_counts, default=(), metavar="N,N", help="counts of workers, e.g. 2,4")
    matrix.add_argument("--only", default="", metavar="PATTERN", help="cases whose names match, e.g. '*optimizer*'")
    matrix.add_argument("--reduced", action="store_true", help="a few cases, about a minute")
    matrix.add_argument("--json", metavar="DIR", help="where the verdicts go, a file for each case")
    matrix.add_argument("--resume", action="store_true", help="leave out what passed in an earlier call")


def _count(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _step(text: str) -> int | str | None:
    if text in ("best", "last"):
        return "best" if text == "best" else None
    if not (text.isascii() and text.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is neither best, last nor a step's number")
    return int(text)


def _counts(text: str) -> tuple[int, ...]:
    return tuple(_count(part) for part in text.split(","))


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")
    return value


def under_launcher() -> bool:
    """Whether torchrun or deepspeed started this process as one of its workers."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def _launcher() -> ModuleType:
    """NumPy's BLAS would start a thread for each core when it is imported, and who has threads cannot fork workers."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from trainer import launch

    return launch


def _train(arguments: argparse.Namespace) -> int:
    with lasting_output():
        return _train_on(arguments)


def _train_on(arguments: argparse.Namespace) -> int:
    if under_launcher():
        if refused():
            return USER_MISTAKE  # restarted after a mistake that a restart cannot mend
        from trainer.endings import check_restarts
        from trainer.recipe import load_recipe
        from trainer.runfolder import run_folder

        check_restarts(run_folder(load_recipe(arguments.recipe, arguments.overrides)))
        from trainer import worker

        return worker.main(arguments.recipe, arguments.overrides)
    status: int = _launcher().train(arguments.recipe, arguments.overrides)
    return status


def _validate(arguments: argparse.Namespace) -> int:
    from checkpointing.keeper.memory import available_bytes
    from trainer.documents import matching_files
    from trainer.events import read_events
    from trainer.plan_card import card
    from trainer.recipe import check_world, load_recipe, recipe_warnings
    from trainer.runfolder import run_folder
    from trainer.tenant_recipe import data_sections

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    if under_launcher():
        world = os.environ["WORLD_SIZE"]
        check_world(recipe, int(world) if world.isdecimal() else 0)
    files = {path for data in data_sections(recipe) for _, path in matching_files(data)}
    size = sum(path.stat().st_size for path in files)
    events = read_events(run_folder(recipe))
    print(card(recipe, num_files=len(files), num_bytes=size, available=available_bytes(), events=events))
    for warning in recipe_warnings(recipe):
        print(f"warning: {warning}", file=sys.stderr)
    return 0


def _drill(arguments: argparse.Namespace) -> int:
    from trainer import drill
    from trainer.faults import KillSpec

    kill = KillSpec.parse(arguments.kill) if arguments.kill is not None else None
    return drill.main(arguments.recipe, kill, arguments.json, arguments.overrides)


def _drill_matrix(arguments: argparse.Namespace) -> int:
    from trainer import matrix_run

    options = (arguments.ranks, arguments.only, arguments.reduced, arguments.json, arguments.resume)
    return matrix_run.main(arguments.recipe, arguments.overrides, *options)


def _export(arguments: argparse.Namespace) -> int:
    from trainer import export

    return export.main(arguments.run_dir, arguments.out_dir, arguments.inexact, arguments.step)


def _preview(arguments: argparse.Namespace) -> int:
    from trainer import preview

    return preview.main(arguments.recipe, arguments.overrides, arguments.samples)


def _keeper(arguments: argparse.Namespace) -> int:
    from checkpointing.keeper.protocol import KeeperError

    act = _stop_keeper if arguments.action == "stop" else _show_keeper
    try:
        found = act(arguments.run_dir, arguments.discard)
    except (KeeperError, OSError) as error:
        print(f"{arguments.run_dir}: {error}", file=sys.stderr)
        return FAILED
    if not found:
        print(f"{arguments.run_dir}: no keeper runs", file=sys.stderr)
    return 0 if found else FAILED


def _stop_keeper(run_dir: str, discard: bool) -> bool:
    from checkpointing.keeper.control import stop_keeper

    found = stop_keeper(run_dir, persist=not discard, timeout_s=10.0 if discard else 600.0)
    if found:
        print(f"{run_dir}: its keeper is stopped")
    return found


def _show_keeper(run_dir: str, _: bool) -> bool:
    from checkpointing.keeper.control import keeper_status

    found = keeper_status(run_dir)
    if found is None:
        return False
    pid, status = found
    writing = "" if status["writing"] is None else f", writing step {status['writing']}"
    print(f"keeper {pid}{writing}")
    if status["disk"]["problem"]:
        print(f"the last write to {status['disk']['place']} failed: {status['disk']['problem']}")
    for coordinate, keep in sorted(status["keeps"].items()):
        worker = f"worker {keep['pid']}" if keep["attached"] else "no worker"
        print(f"{coordinate}  {worker}, sealed steps {', '.join(map(str, keep['steps'])) or 'none'}")
    return True


def _doctor(arguments: argparse.Namespace) -> int:
    from trainer import doctor

    return doctor.main(arguments.model, arguments.overrides, arguments.json, arguments.files_only)
