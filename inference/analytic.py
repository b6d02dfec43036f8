"""Decode and prefill time of a model from its shape alone: no trace, no files. No torch here.

Routing is taken to be even, so hits are the share that is resident, unless a hit rate is given. Of n experts that are
prefetched a layer ahead a share ``accuracy`` is wanted, and saves a miss each:

    demand = misses - accuracy * n              waits, split between link and CPU by the planner
    link   = (n + what of the demand it carries) * fetch
    layer  = max(dense + time of the demand, link)

The n that makes a layer fastest is taken, so prefetching never costs; where the link has no time to spare it is 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from inference.costmodel import BYTES, ExpertCosts, MachineProfile
from inference.errors import InferenceError
from inference.forecast import Forecast, assumed_forecast, dense_seconds, lane_costs
from inference.phases import DECODE, PREFILL
from inference.placement import ModelSizes, Placement, parse_size, place, show_size
from inference.planner import plan_call

COUNTS = ("layers", "experts", "top_k", "hidden", "intermediate")
OPTIONS = ("dtype", "dense", "kv")
STEPS = 32  # shares of the misses that are tried as prefetches


class ShapeError(InferenceError):
    """A ``--shape`` that is none: what, and how to write it."""


def parse_shape(text: str, known: dict[str, int] | None = None) -> ModelSizes:
    """Sizes from ``layers=24,experts=64,top_k=8,hidden=2048,intermediate=1024[,dtype=..][,dense=SIZE][,kv=SIZE]``.

    ``dense`` is the size of everything but routed experts; by default four square matrices a layer. ``kv`` is that of
    one token's keys and values in all layers; by default a quarter of hidden for each. Raises ShapeError.

    Args:
        known: counts that need not be given, and must be these if they are.
    """
    given: dict[str, Any] = {}
    for part in text.split(","):
        name, _, value = (piece.strip() for piece in part.partition("="))
        if name not in (*COUNTS, *OPTIONS) or not value:
            raise ShapeError(f"--shape: {part!r} is none of {', '.join(f'{n}=..' for n in (*COUNTS, *OPTIONS))}")
        if name in given:
            raise ShapeError(f"--shape: {name} is given twice; keep one")
        given[name] = _count(name, value) if name in COUNTS else value
    for name, count in (known or {}).items():
        if given.setdefault(name, count) != count:
            raise ShapeError(f"--shape: {name}={given[name]}, but the trace has {count}; leave it out")
    if missing := [name for name in COUNTS if name not in given]:
        raise ShapeError(f"--shape: {missing[0]} is missing; give {', '.join(f'{name}=..' for name in COUNTS)}")
    if given["top_k"] > given["experts"]:
        raise ShapeError(f"--shape: top_k={given['top_k']} of {given['experts']} experts; give at most as many")
    dtype = given.get("dtype", "bfloat16")
    if dtype not in BYTES:
        raise ShapeError(f"--shape: dtype={dtype} is none of {', '.join(BYTES)}")
    layers, hidden, itemsize = given["layers"], given["hidden"], BYTES[dtype]
    dense = parse_size(given["dense"]) if "dense" in given else layers * 4 * hidden**2 * itemsize
    kv = parse_size(given["kv"]) if "kv" in given else max(layers * hidden // 2 * itemsize, 1)
    return ModelSizes(
        family="a shape",
        dtype=dtype,
        layers=layers,
        moe_layers=layers,
        experts=given["experts"],
        top_k=given["top_k"],
        hidden=hidden,
        intermediate=given["intermediate"],
        expert_bytes=3 * hidden * given["intermediate"] * itemsize,
        dense_bytes=dense,
        table_bytes=0,
        kv_bytes=kv,
    )


def _count(name: str, value: str) -> int:
    if not (value.isascii() and value.isdecimal() and int(value) > 0):
        raise ShapeError(f"--shape: {name}={value} is not a whole number above 0")
    return int(value)


@dataclass(frozen=True)
class Prefetched:
    """One token: ``ahead`` experts are prefetched for each layer; the link works ``link_s`` in all layers together."""

    accuracy: float
    ahead: float
    seconds: float
    link_s: float

    @property
    def bound(self) -> str:
        return "link" if self.link_s >= self.seconds * (1 - 1e-9) else "demands and the dense part"


def decode_with_prefetch(
    costs: ExpertCosts, sizes: ModelSizes, dense_s: float, misses: float, hits: float, accuracy: float
) -> Prefetched:
    """One token of one sequence, with as many prefetches as are best; none at accuracy 0.

    Args:
        dense_s: of one layer.
        misses, hits: experts of one layer call, on average; fractions are interpolated between whole numbers.
        accuracy: share of the prefetched experts that the call then wants.
    """
    found = []
    for step in range(STEPS + 1 if accuracy else 1):
        ahead = misses * step / STEPS
        saved = accuracy * ahead
        wait_s, computed = _call(costs, misses - saved, hits + saved)
        link_s = (ahead + misses - saved - computed) * costs.link_s
        found.append((max(dense_s + wait_s, link_s), ahead, link_s))
    layer_s, ahead, link_s = min(found)
    return Prefetched(accuracy, ahead, sizes.moe_layers * layer_s, sizes.moe_layers * link_s)


def _call(costs: ExpertCosts, missing: float, resident: float) -> tuple[float, float]:
    """Seconds of one layer call, and experts that the CPU computes of it."""
    low = math.floor(missing)
    found = []
    for count in (low, low + 1):
        split = plan_call(costs, [(e, 1) for e in range(count)], resident_rows=[1] * round(resident))
        found.append((split.cut.seconds, len(split.cpu)))
    share = missing - low
    first, second = found
    return (1 - share) * first[0] + share * second[0], (1 - share) * first[1] + share * second[1]


@dataclass(frozen=True)
class Answer:
    """What a shape on a machine comes to: one token without and with prefetching, and prompts."""

    placement: Placement
    hit_rate: float
    plain: Prefetched
    ahead: Prefetched
    prompts: tuple[Forecast, ...]


def answer(
    profile: MachineProfile,
    sizes: ModelSizes,
    capacity: float,
    accuracy: float,
    *,
    hit_rate: float | None = None,
    cpu_experts: bool = False,
    graphs: bool = False,
    prompts: tuple[int, ...] = (1024, 4096),
) -> Answer:
    """Raises InferenceError where the machine has no link: without one there is nothing to prefetch."""
    if profile.link is None:
        raise ShapeError(f"profile {profile.name!r} has no GPU behind a link; give one that has, as --profile h200")
    placement = place(sizes, gpu=True, expert_budget=capacity)
    costs = lane_costs(profile, sizes, cpu_experts)
    rate = placement.share if hit_rate is None else hit_rate
    dense_s = dense_seconds(costs, placement, DECODE, 1, graphs) / sizes.moe_layers
    misses, hits = (1 - rate) * sizes.top_k, rate * sizes.top_k
    plain, ahead = (decode_with_prefetch(costs, sizes, dense_s, misses, hits, a) for a in (0.0, accuracy))
    read = tuple(assumed_forecast(costs, placement, PREFILL, tokens) for tokens in prompts)
    return Answer(placement, rate, plain, ahead, read)


def answer_lines(found: Answer) -> list[str]:
    """For the terminal."""
    sizes, placement, plain, ahead = found.placement.sizes, found.placement, found.plain, found.ahead
    lines = [
        f"{sizes.moe_layers} layers of {sizes.experts} experts of {show_size(sizes.expert_bytes)}, {sizes.top_k} for a "
        f"token; {placement.slots} resident ({placement.share:.0%}, {show_size(placement.slot_bytes)}), hits "
        f"{found.hit_rate:.0%}",
        _line("decode, no prefetch", plain.seconds, 1, f"bound by {plain.bound}"),
    ]
    if ahead.accuracy:
        told = f"{ahead.ahead:.1f} a layer, bound by {ahead.bound}" if ahead.ahead else "the link has no time for any"
        lines.append(_line(f"decode, prefetch {ahead.accuracy:.0%} right", ahead.seconds, 1, told))
    lines += [
        _line(
            f"prefill of {one.tokens} tokens",
            one.plan.seconds,
            one.tokens,
            f"{one.plan.mode}, bound by {one.plan.bound}",
        )
        for one in found.prompts
    ]
    return lines


def _line(what: str, seconds: float, tokens: int, told: str) -> str:
    return f"{what:<28}{1e3 * seconds:>9.2f} ms{tokens / seconds:>11.1f} tokens/s  {told}"
