"""`planaria simulate`: what each cache policy would have hit on recorded routing."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any


def add_simulate_verb(verb: Callable[[str, Any, str], argparse.ArgumentParser]) -> None:
    """``verb(name, run, text)`` makes a sub-command's parser."""
    simulate = verb("simulate", _simulate, "replay recorded routing through expert caches")
    simulate.add_argument("trace", metavar="TRACE", help="a run that had log.routing_trace=true, or a trace file")
    simulate.add_argument(
        "--budgets", default="0.1,0.25,0.5", metavar="F,...", help="shares of the experts that are resident"
    )
    simulate.add_argument("--policies", default="", metavar="NAME,...", help="default: all of them")
    simulate.add_argument("--sequence", type=int, default=0, metavar="N", help="tokens in a sequence, if known")
    simulate.add_argument("--tokens", type=int, default=2000, metavar="N", help="at most so many; 0: all")


def _simulate(arguments: argparse.Namespace) -> int:
    from inference.simulate import POLICIES, compare, read_routing, table
    from moe.tracefile import TraceError

    names = tuple(arguments.policies.split(",")) if arguments.policies else POLICIES
    if wrong := [name for name in names if name not in POLICIES]:
        print(f"--policies: no policy {wrong[0]!r}; choose from {', '.join(POLICIES)}", file=sys.stderr)
        return 2
    try:
        budgets = [float(part) for part in arguments.budgets.split(",")]
    except ValueError:
        budgets = []
    if not budgets or not all(0 < budget <= 1 for budget in budgets):
        print(f"--budgets: {arguments.budgets!r} is no list of shares above 0, up to 1, as 0.1,0.25", file=sys.stderr)
        return 2
    if arguments.sequence < 0 or arguments.tokens < 0:
        print("--sequence and --tokens count tokens; give 0 or more", file=sys.stderr)
        return 2
    try:
        routing = read_routing(arguments.trace, arguments.sequence, arguments.tokens)
    except TraceError as error:
        print(error, file=sys.stderr)
        return 2
    tokens, layers, top_k = routing.index_TLK.shape
    print(f"{tokens} tokens, {layers} layers of {routing.experts} experts, {top_k} for a token; a quarter warms up")
    print(table(compare(routing, budgets, names)))
    print("hits in %; in brackets the part of the gap between LRU and Belady with bypass that is closed")
    return 0
