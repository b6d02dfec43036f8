"""The sub-verbs of ``planaria checkpoint``. A new one is a function here that adds its parser."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING

_RUN = "run folder, or the folder or URL that holds checkpoints"
_PICK = "as above, with the step; the newest without"


def add_verbs(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="checkpoint_verb", required=True, metavar="VERB")
    for add in (_add_ls, _add_verify, _add_diff, _add_rm, _add_export, _add_import):
        add(verbs)


if TYPE_CHECKING:
    Verbs = argparse._SubParsersAction[argparse.ArgumentParser]


def sub_verb(verbs: Verbs, name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
    sub = verbs.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False)
    sub.set_defaults(run=run)
    return sub


def _add_ls(verbs: Verbs) -> None:
    sub = sub_verb(verbs, "ls", _ls, "list what is on disk, and what the live keeper holds in memory")
    sub.add_argument("run_dir", metavar="RUN", help=_RUN)


def _add_verify(verbs: Verbs) -> None:
    sub = sub_verb(verbs, "verify", _verify, "read back every byte; status 1 if one is not what was written")
    sub.add_argument("run_dir", metavar="RUN", help=_RUN)
    sub.add_argument("step", metavar="STEP", type=_step, nargs="?", help="only this one; all without")
    sub.add_argument("--quarantine", action="store_true", help="set damaged ones aside, so that nothing reads them")


def _add_diff(verbs: Verbs) -> None:
    sub = sub_verb(verbs, "diff", _diff, "compare two states, whatever layouts wrote them; status 1 if they differ")
    sub.add_argument("ours", metavar="RUN[:STEP]", help=_RUN)
    sub.add_argument("theirs", metavar="RUN[:STEP]", help=_PICK)
    sub.add_argument("--all", action="store_true", help="also name what is equal")


def _add_rm(verbs: Verbs) -> None:
    sub = sub_verb(verbs, "rm", _rm, "delete checkpoints, or folders that were set aside")
    sub.add_argument("run_dir", metavar="RUN", help=_RUN)
    sub.add_argument("names", metavar="STEP", nargs="+", help="a step, or a folder's name, e.g. step-40.corrupt")
    sub.add_argument("--force", action="store_true", help="even the newest that verifies, or a permanent one")


def _add_export(verbs: Verbs) -> None:
    sub = sub_verb(verbs, "export", _export, "write a checkpoint as another tool's folder")
    sub.add_argument("run_dir", metavar="RUN[:STEP]", help="run folder; the newest step without")
    sub.add_argument("out_dir", metavar="OUT", help="folder to make")
    form = sub.add_mutually_exclusive_group(required=True)
    form.add_argument("--hf", dest="form", action="store_const", const="hf", help="weights, for transformers")
    form.add_argument(
        "--deepspeed", dest="form", action="store_const", const="deepspeed", help="weights and optimizer, same layout"
    )
    sub.add_argument("--inexact", action="store_true", help="redo a log that another device or torch wrote")


def _add_import(verbs: Verbs) -> None:
    sub = sub_verb(verbs, "import", _import, "make a checkpoint of what DeepSpeed's save_checkpoint wrote")
    sub.add_argument("folder", metavar="DS_FOLDER", help="folder with the file 'latest', or one tag's folder in it")
    sub.add_argument("run_dir", metavar="RUN", help="new folder to make it in, for checkpoint.load_from")
    sub.add_argument("--tag", help="instead of the one that 'latest' names")


def _step(text: str) -> int:
    if not (text.isascii() and text.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a step")
    return int(text)


def _ls(arguments: argparse.Namespace) -> int:
    from trainer import checkpoints

    return checkpoints.ls(arguments.run_dir)


def _verify(arguments: argparse.Namespace) -> int:
    from trainer import checkpoints

    return checkpoints.verify_all(arguments.run_dir, arguments.step, arguments.quarantine)


def _diff(arguments: argparse.Namespace) -> int:
    from trainer import checkpoints

    return checkpoints.diff(arguments.ours, arguments.theirs, arguments.all)


def _rm(arguments: argparse.Namespace) -> int:
    from trainer import checkpoints

    return checkpoints.rm(arguments.run_dir, arguments.names, arguments.force)


def _export(arguments: argparse.Namespace) -> int:
    from trainer import interop

    return interop.export(arguments.run_dir, arguments.out_dir, arguments.form, arguments.inexact)


def _import(arguments: argparse.Namespace) -> int:
    from trainer import interop

    return interop.import_deepspeed(arguments.folder, arguments.run_dir, arguments.tag)
