"""`planaria plan-inference`: what of a model would lie where, how fast it would run, and what binds it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from inference.costmodel import MachineProfile
    from inference.placement import ModelSizes


def add_plan_inference_verb(
    verb: Callable[[str, Any, str], argparse.ArgumentParser],
    fraction: Callable[[str], float],
    count: Callable[[str], int],
) -> None:
    """``verb(name, run, text)`` makes a sub-command's parser; the others parse a share and a count."""
    plan = verb("plan-inference", _plan, "say what of a model goes where, how fast it will run, and what binds it")
    plan.add_argument("model_dir", metavar="DIR", help="Hugging Face folder of a mixture of experts")
    add_budget_options(plan, fraction)
    plan.add_argument(
        "--kv-tokens",
        type=count,
        metavar="N",
        help="tokens whose keys and values have room, all sequences together; default 32768, or what a quarter of "
        "--vram holds",
    )
    plan.add_argument(
        "--profile", metavar="NAME", help="of a machine: h200, or a JSON file; default: this machine, measured once"
    )
    plan.add_argument("--recalibrate", action="store_true", help="measure this machine again")
    add_way_options(plan)
    plan.add_argument("--trace", metavar="RUN", help="run folder or trace whose routing gives the hit rates")


def add_budget_options(parser: argparse.ArgumentParser, fraction: Callable[[str], float]) -> None:
    """The one number, as a share or as a size."""
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument(
        "--expert-budget",
        type=fraction,
        metavar="F",
        help="part of the experts that may be resident, 0 to 1; default 1",
    )
    budget.add_argument(
        "--vram",
        type=_size,
        metavar="SIZE",
        help="memory for the model, as 8GiB: what the dense part and the keys and values leave holds experts",
    )


def add_way_options(parser: Any) -> None:
    """What the prediction is to reckon with."""
    parser.add_argument("--cpu-experts", action="store_true", help="as `generate --cpu-experts` computes them")
    parser.add_argument("--no-pack", action="store_true", help="as `generate --no-pack` keeps them")
    parser.add_argument(
        "--graphs",
        action=argparse.BooleanOptionalAction,
        help="with captured decode steps; by default plan-inference reckons with them, and simulate without",
    )


def _size(text: str) -> int:
    from inference.placement import PlacementError, parse_size

    try:
        return parse_size(text)
    except PlacementError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _plan(arguments: argparse.Namespace) -> int:
    from inference.costmodel import describe
    from inference.forecast import check_room, forecast, forecast_table, placement_table
    from inference.placement import model_sizes, place, show_size
    from inference.simulate import read_routing
    from moe.tracefile import TraceError

    if arguments.recalibrate and arguments.profile is not None:
        print("--recalibrate measures this machine, --profile names another: give one of them", file=sys.stderr)
        return 2
    sizes = model_sizes(arguments.model_dir).kept(pack=not arguments.no_pack)
    profile = _profile(arguments, sizes)
    if arguments.profile is None:
        sizes = sizes.kept(pack=profile.packed)  # as this machine can
    placement = place(
        sizes,
        gpu=profile.link is not None,
        kv_tokens=arguments.kv_tokens,
        vram=arguments.vram,
        expert_budget=arguments.expert_budget,
    )
    check_room(placement, profile)
    try:
        routing = None if arguments.trace is None else read_routing(arguments.trace, tokens=4000)
    except TraceError as error:
        print(error, file=sys.stderr)
        return 2
    ways = {"cpu_experts": arguments.cpu_experts, "graphs": arguments.graphs is not False}
    found = forecast(profile, placement, **ways, routing=routing)
    print(
        f"{arguments.model_dir}: {sizes.family} in {sizes.dtype}, {sizes.moe_layers} layers of {sizes.experts} experts "
        f"of {show_size(sizes.expert_bytes)}, {sizes.top_k} for a token"
    )
    print(*describe(profile), "", *placement_table(placement, profile), "", *forecast_table(found), "", sep="\n")
    for one in found:
        print(f"{one.label}: {one.plan.reason()}")
    for source in dict.fromkeys(f"experts and hits of {one.phase}: {one.use.source}" for one in found):
        print(source)
    return 0


def _profile(arguments: argparse.Namespace, sizes: ModelSizes) -> MachineProfile:
    if arguments.profile is not None:
        from inference.costmodel import named_profile

        return named_profile(arguments.profile)
    from inference.calibrate import this_machine  # torch: only measuring needs it

    return this_machine(
        sizes.hidden, sizes.intermediate, sizes.dtype, packed=sizes.packed, recalibrate=arguments.recalibrate
    )
