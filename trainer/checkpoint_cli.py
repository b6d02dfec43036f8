"""The sub-verbs of ``planaria checkpoint``. A new one is a function here that adds its parser."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING

_RUN = "run folder, or the folder or URL that holds checkpoints"
_PICK = "as above, with the step; the newest without"


def add_verbs(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="checkpoint_verb", required=True, metavar="VERB")
    for add in (_add_ls, _add_verify, _add_diff, _add_rm):
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
