"""`planaria lookahead`: heads that foresee which experts a model will use. No torch before a verb needs it."""

from __future__ import annotations

import argparse
from typing import Any


def add_lookahead_verbs(lookahead: argparse.ArgumentParser) -> None:
    """Fills the parser of ``planaria lookahead``."""
    verbs = lookahead.add_subparsers(dest="action", required=True, metavar="ACTION")
    train = _verb(verbs, "train", _train, "distil heads from an exported model's routing, into its folder")
    train.add_argument("--tokens", type=_count, default=65536, metavar="N", help="of the training part, to learn from")
    train.add_argument("--rank", type=_count, default=64, metavar="R", help="between the two maps of each layer")
    train.add_argument("--epochs", type=_count, default=3, metavar="N")
    train.add_argument("--seed", type=int, default=0, metavar="N")
    record = _verb(verbs, "record", _record, "record how an exported model routes held-out text")
    record.add_argument("trace", metavar="TRACE", help="file to make, for `planaria simulate`")
    record.add_argument("--tokens", type=_count, default=4096, metavar="N", help="of the held-out part")


def _verb(verbs: Any, name: str, run: Any, text: str) -> argparse.ArgumentParser:
    sub: argparse.ArgumentParser = verbs.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    sub.set_defaults(run=run)
    sub.add_argument("run_dir", metavar="RUN", help="folder of the run, whose text is read")
    sub.add_argument("out_dir", metavar="OUT", help="folder that `planaria export RUN OUT` wrote")
    return sub


def _count(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _train(arguments: argparse.Namespace) -> int:
    from trainer import lookahead

    names = ("tokens", "rank", "epochs", "seed")
    settings = lookahead.Settings(**{name: getattr(arguments, name) for name in names})
    return lookahead.train(arguments.run_dir, arguments.out_dir, settings)


def _record(arguments: argparse.Namespace) -> int:
    from trainer import lookahead

    return lookahead.record(arguments.run_dir, arguments.out_dir, arguments.trace, arguments.tokens)
