"""The options of ``planaria generate``. No torch here."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from trainer.runtime_cli import add_runtime_options, runtime

_SAMPLING: tuple[tuple[str, Callable[[str], object], str, str], ...] = (
    ("temperature", float, "T", "0: always the most probable token (the default)"),
    ("top_k", int, "K", "draw from the K most probable tokens only; 0: from all"),
    ("top_p", float, "P", "draw from the fewest tokens that together have probability P"),
    ("min_p", float, "P", "drop tokens less probable than P times the most probable one"),
    ("seed", int, "N", "of the draws; the same seed gives the same text; default 0"),
)


def add_generate_verb(
    verb: Callable[[str, Any, str], argparse.ArgumentParser],
    count: Callable[[str], int],
    fraction: Callable[[str], float],
) -> None:
    """``verb(name, run, text)`` makes a sub-command's parser; the others read a number above 0, and one up to 1."""
    generate = verb("generate", _generate, "generate text with experts kept outside of the compute memory")
    add_runtime_options(generate, count, fraction)
    generate.add_argument("--adapter", metavar="DIR", help="adapter folder")
    generate.add_argument("--prompt", required=True, metavar="TEXT")
    generate.add_argument("--max-new-tokens", type=count, default=64, metavar="N")
    for name, kind, metavar, text in _SAMPLING:
        generate.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar=metavar, help=text)
    generate.add_argument("--stop", action="append", metavar="TEXT", help="end before this text; may be repeated")
    generate.add_argument("--report", action="store_true", help="say what bound it, and what to change")


def _generate(arguments: argparse.Namespace) -> int:
    from trainer import generate

    settings: dict[str, object] = {
        name: value for name, *_ in _SAMPLING if (value := getattr(arguments, name)) is not None
    }
    if arguments.stop:
        settings["stop"] = tuple(arguments.stop)
    return generate.main(
        arguments.model_dir,
        arguments.prompt,
        arguments.adapter,
        arguments.max_new_tokens,
        runtime(arguments),
        report=arguments.report,
        **settings,
    )
