"""The options of ``planaria generate``. No torch here."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from trainer.plan_inference_cli import add_budget_options
from trainer.runtime_cli import GRAPHS

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
    generate.add_argument("model_dir", metavar="DIR", help="Hugging Face folder of a MoE model or a dense base")
    generate.add_argument("--adapter", metavar="DIR", help="adapter folder")
    generate.add_argument("--prompt", required=True, metavar="TEXT")
    generate.add_argument("--max-new-tokens", type=count, default=64, metavar="N")
    add_budget_options(generate, fraction)
    generate.add_argument("--kv-tokens", type=count, metavar="N", help="room for the keys and values of N tokens")
    generate.add_argument(
        "--prefetch",
        default="none",
        metavar="NAME",
        help="on a GPU: what predicts the experts that are fetched ahead: none (the default), same_as_last, next_gate, "
        "trace_match, map_match, or heads",
    )
    for name, kind, metavar, text in _SAMPLING:
        generate.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar=metavar, help=text)
    generate.add_argument("--stop", action="append", metavar="TEXT", help="end before this text; may be repeated")
    generate.add_argument("--trace", metavar="FILE", help="record the routing, for `planaria simulate`")
    generate.add_argument(
        "--cpu-experts",
        action="store_true",
        help="have the CPU compute missing experts beside a GPU where that is faster; results are close, not equal",
    )
    generate.add_argument(
        "--no-pin", action="store_true", help="on a GPU: keep no page-locked copy of all experts in memory, read files"
    )
    generate.add_argument("--graphs", action="store_true", help=GRAPHS)
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
        arguments.expert_budget,
        kv_tokens=arguments.kv_tokens,
        vram=arguments.vram,
        report=arguments.report,
        trace=arguments.trace,
        prefetch=arguments.prefetch,
        pin=not arguments.no_pin,
        cpu_experts=arguments.cpu_experts,
        graphs=arguments.graphs,
        **settings,
    )
