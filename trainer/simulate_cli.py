"""`planaria simulate`: recorded routing through expert caches, on a machine's clock if wanted; or a shape's answer."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.plan_inference_cli import add_way_options

if TYPE_CHECKING:
    from inference.simulate import Replay, Routing
    from inference.timeline import TimedReplay


_BUDGETS, _TOKENS = "0.1,0.25,0.5", 2000
_LEAST_COUNTED = 6  # passes: of 8 tokens that were decoded alone these count


class SimulateError(ValueError):
    """An option that does not fit: what, and what to give."""


def add_simulate_verb(verb: Callable[[str, Any, str], argparse.ArgumentParser]) -> None:
    """``verb(name, run, text)`` makes a sub-command's parser."""
    simulate = verb("simulate", _simulate, "replay recorded routing through expert caches, or reckon without a trace")
    simulate.add_argument(
        "trace",
        nargs="?",
        metavar="TRACE",
        help="a run that had log.routing_trace=true, or a trace of `generate --trace` or `lookahead record`",
    )
    simulate.add_argument(
        "--budgets", metavar="F,...", help=f"shares of the experts that are resident; default: {_BUDGETS}"
    )
    simulate.add_argument("--policies", default="", metavar="NAME,...", help="default: all of them")
    simulate.add_argument("--sequence", type=int, metavar="N", help="of a run's trace: tokens in a sequence, if known")
    simulate.add_argument("--tokens", type=int, metavar="N", help=f"at most so many; 0: all; default: {_TOKENS}")
    simulate.add_argument("--plot", metavar="FILE.svg", help="draw hit rates, and tokens/s, against the budget")
    timed = simulate.add_argument_group("on a machine's clock")
    timed.add_argument(
        "--profile", metavar="NAME", help="of a machine: h200, or a JSON file; without a trace the default is h200"
    )
    timed.add_argument(
        "--shape",
        metavar="K=V,...",
        help="hidden and intermediate of an expert; without a trace also layers, experts, top_k; optional: dtype, "
        "dense (size of everything but experts), kv (size of a token's keys and values)",
    )
    timed.add_argument("--predictors", default="", metavar="NAME,...", help="of prefetches; default: none and the best")
    add_way_options(timed)
    without = simulate.add_argument_group("without a trace: --shape, and")
    without.add_argument("--capacity", type=float, metavar="F", help="share of the experts that is resident")
    without.add_argument("--prefetch-accuracy", type=float, metavar="F", help="share of right guesses")
    without.add_argument("--hit-rate", type=float, metavar="F", help="default: the capacity, as with even routing")


def _simulate(arguments: argparse.Namespace) -> int:
    from inference.simulate import read_routing
    from moe.tracefile import TraceError

    _check_groups(arguments)
    if arguments.trace is None:
        return _without_trace(arguments)
    budgets = _budgets(_BUDGETS if arguments.budgets is None else arguments.budgets)
    sequence, most = arguments.sequence or 0, _TOKENS if arguments.tokens is None else arguments.tokens
    if sequence < 0 or most < 0:
        raise SimulateError("--sequence and --tokens count tokens; give 0 or more")
    try:
        routing = read_routing(arguments.trace, sequence, most)
    except TraceError as error:
        raise SimulateError(str(error)) from None
    _check_counted(arguments.trace, routing)
    names = _policies(arguments.policies, routing)
    tokens, layers, top_k = routing.index_TLK.shape
    heads = "; with what lookahead heads say" if routing.heads is not None else ""
    print(
        f"{tokens} tokens, {layers} layers of {routing.experts} experts, {top_k} for a token; a quarter warms up{heads}"
    )
    if arguments.profile is None:
        _hits(arguments, routing, budgets, names)
    else:
        _timed(arguments, routing, budgets, names)
    return 0


def _check_groups(arguments: argparse.Namespace) -> None:
    if arguments.plot is not None and not arguments.plot.endswith(".svg"):
        raise SimulateError(f"--plot {arguments.plot}: charts are SVG; give a name that ends in .svg")
    if arguments.trace is None:
        if arguments.shape is None or arguments.capacity is None:
            raise SimulateError("give a TRACE to replay, or --shape and --capacity to reckon without one")
        if arguments.plot is not None or arguments.predictors or arguments.policies:
            raise SimulateError("--plot, --policies and --predictors need a TRACE to replay")
        given = [name for name in ("budgets", "sequence", "tokens") if getattr(arguments, name) is not None]
        if given:
            raise SimulateError(f"--{given[0]} needs a TRACE to replay; leave it out, or give one")
        return
    if any(one is not None for one in (arguments.capacity, arguments.hit_rate, arguments.prefetch_accuracy)):
        raise SimulateError("--capacity, --hit-rate and --prefetch-accuracy are for a shape without a TRACE; --budgets")
    if (arguments.profile is None) != (arguments.shape is None):
        raise SimulateError("times need both: --profile, as h200, and --shape hidden=..,intermediate=..")
    if arguments.profile is None and (
        arguments.predictors or arguments.cpu_experts or arguments.graphs or arguments.no_pack
    ):
        raise SimulateError(
            "--predictors, --cpu-experts, --no-pack and --graphs matter on a clock only: give --profile, as h200"
        )


def _check_counted(trace: str, routing: Routing) -> None:
    """A rate of nothing would look like one."""
    from inference.simulate import WARM_UP

    starts = [tokens.start for tokens in routing.spans()]
    counted = sum(start >= int(len(routing.index_TLK) * WARM_UP) for start in starts)
    if counted < _LEAST_COUNTED:
        raise SimulateError(
            f"{trace} is too short: passes that begin after the quarter of tokens that warms up are counted, and of "
            f"its {len(starts)} there are {counted}; record at least {_LEAST_COUNTED}, or read more with --tokens"
        )


def _budgets(text: str) -> list[float]:
    try:
        budgets = [float(part) for part in text.split(",")]
    except ValueError:
        budgets = []
    if not budgets or not all(0 <= budget <= 1 for budget in budgets):
        raise SimulateError(f"--budgets: {text!r} is no list of shares from 0 to 1, as 0.1,0.25")
    return budgets


def _policies(text: str, routing: Routing) -> tuple[str, ...]:
    from inference.simulate import FORESEEN, POLICIES

    known = (*POLICIES, FORESEEN) if routing.heads is not None else POLICIES
    names = tuple(text.split(",")) if text else POLICIES
    if wrong := [name for name in names if name not in known]:
        raise SimulateError(f"--policies: no policy {wrong[0]!r} here; choose from {', '.join(known)}")
    return names


def _hits(arguments: argparse.Namespace, routing: Routing, budgets: list[float], names: tuple[str, ...]) -> None:
    from inference.simulate import compare, table

    found = compare(routing, budgets, names)
    print(table(found))
    print("hits in %; in brackets the part of the gap between LRU and Belady with bypass that is closed")
    if arguments.plot is not None:
        _draw(arguments.plot, [_hit_panel(found)])


def _hit_panel(found: dict[float, list[Replay]]) -> Any:
    from inference.chart import Panel

    lines: dict[str, list[tuple[float, float]]] = {}
    for budget, replays in found.items():
        for one in replays:
            lines.setdefault(one.policy, []).append((100 * budget, 100 * one.hit_rate))
    return Panel("hits, %", "resident experts, %", lines)


def _draw(path: str, panels: list[Any]) -> None:
    from inference.chart import svg

    Path(path).write_text(svg(panels))
    print(f"drawn: {path}")


def _timed(arguments: argparse.Namespace, routing: Routing, budgets: list[float], names: tuple[str, ...]) -> None:
    from inference.analytic import ShapeError, parse_shape
    from inference.costmodel import named_profile
    from inference.forecast import dense_seconds, lane_costs
    from inference.phases import DECODE
    from inference.placement import place
    from inference.predictors import PREDICTORS
    from inference.simulate import BYPASS, FORESEEN, HEDGE, POLICIES
    from inference.timeline import Timeline, timed_table

    layers, top_k = routing.index_TLK.shape[1:]
    known = {"layers": layers, "experts": routing.experts, "top_k": top_k}
    sizes = parse_shape(arguments.shape, known).kept(pack=not arguments.no_pack)
    profile = named_profile(arguments.profile)
    if profile.link is None:
        raise ShapeError(f"profile {profile.name!r} has no GPU behind a link: nothing is ever fetched there")
    costs = lane_costs(profile, sizes, arguments.cpu_experts)
    if names == POLICIES:
        names = ("lru", "expected_reuse", *([FORESEEN] if routing.heads is not None else []), HEDGE)
    able = [name for name in PREDICTORS if name not in ("heads", "next_gate") or routing.heads is not None]
    predictors = tuple(arguments.predictors.split(",")) if arguments.predictors else ("none", able[-1])
    if wrong := [name for name in predictors if name not in able]:
        raise SimulateError(f"--predictors: no predictor {wrong[0]!r} here; choose from {', '.join(able)}")
    found: dict[float, list[TimedReplay]] = {}
    for budget in budgets:
        placement = place(sizes, gpu=True, expert_budget=budget)
        dense_s = dense_seconds(costs, placement, DECODE, 1, bool(arguments.graphs)) / sizes.moe_layers
        pairs = [(policy, predictor) for policy in names for predictor in predictors] + [(BYPASS, "none")]
        found[budget] = [
            Timeline(routing, policy, predictor, placement.slots, costs, dense_s).run() for policy, predictor in pairs
        ]
        print(*timed_table(budget, found[budget]), sep="\n")
    if arguments.plot is not None:
        _draw(arguments.plot, _timed_panels(found))


def _timed_panels(found: dict[float, list[TimedReplay]]) -> list[Any]:
    from inference.chart import Panel

    saved: dict[str, list[tuple[float, float]]] = {}
    speed: dict[str, list[tuple[float, float]]] = {}
    for budget, replays in found.items():
        for one in replays:
            saved.setdefault(one.name, []).append((100 * budget, 100 * one.saved_share))
            speed.setdefault(one.name, []).append((100 * budget, one.tokens_per_second))
    label = "resident experts, %"
    return [Panel("neither fetched nor computed on the CPU, %", label, saved), Panel("tokens/s", label, speed)]


def _without_trace(arguments: argparse.Namespace) -> int:
    from inference.analytic import answer, answer_lines, parse_shape
    from inference.costmodel import describe, named_profile

    for name in ("capacity", "prefetch_accuracy", "hit_rate"):
        value = getattr(arguments, name)
        if value is not None and not 0 <= value <= 1:
            raise SimulateError(f"--{name.replace('_', '-')} {value} is out of range; give a share from 0 to 1")
    sizes = parse_shape(arguments.shape).kept(pack=not arguments.no_pack)
    profile = named_profile(arguments.profile or "h200")
    found = answer(
        profile,
        sizes,
        arguments.capacity,
        arguments.prefetch_accuracy or 0.0,
        hit_rate=arguments.hit_rate,
        cpu_experts=arguments.cpu_experts,
        graphs=bool(arguments.graphs),
    )
    print(*describe(profile), *answer_lines(found), sep="\n")
    return 0
