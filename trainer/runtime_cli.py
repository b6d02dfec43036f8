"""The options that `planaria generate`, `serve` and `chat` share. No torch here."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from inference.runtime import Runtime
from trainer.plan_inference_cli import add_budget_options


def add_runtime_options(
    parser: argparse.ArgumentParser, count: Callable[[str], int], fraction: Callable[[str], float]
) -> None:
    """The model's folder, its memory, and the way of its experts."""
    parser.add_argument("model_dir", metavar="DIR", help="Hugging Face folder of a MoE model or a dense base")
    add_budget_options(parser, fraction)
    parser.add_argument("--kv-tokens", type=count, metavar="N", help="room for the keys and values of N tokens")
    parser.add_argument(
        "--prefetch",
        default="none",
        metavar="NAME",
        help="on a GPU: what predicts the experts that are fetched ahead: none (the default), same_as_last, next_gate, "
        "trace_match, map_match, or heads",
    )
    parser.add_argument(
        "--cpu-experts",
        action="store_true",
        help="have the CPU compute missing experts beside a GPU where that is faster; results are close, not equal",
    )
    parser.add_argument(
        "--no-pin", action="store_true", help="on a GPU: keep no page-locked copy of all experts in memory, read files"
    )
    parser.add_argument(
        "--no-pack",
        action="store_true",
        help="on a GPU: keep bf16 experts in host memory in 16 bits a weight, not in 12",
    )
    parser.add_argument(
        "--graphs",
        action=argparse.BooleanOptionalAction,
        help="on a GPU: capture the decode steps of few sequences as CUDA graphs; by default where they can be, "
        "and it is said whether they are",
    )
    parser.add_argument("--trace", metavar="FILE", help="record the routing, for `planaria simulate`")


def runtime(arguments: argparse.Namespace) -> Runtime:
    """What :func:`add_runtime_options` read."""
    names = Runtime.__dataclass_fields__
    return Runtime(**{name: getattr(arguments, name) for name in names})
