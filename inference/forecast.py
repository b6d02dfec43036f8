"""How fast a model would run on a machine, and what binds it: the planner's answer for typical passes. No torch here.

Decoding one token of each of so many sequences, or reading a prompt, which takes a pass for each chunk of it. The
experts that a layer uses and how many of them are resident are counted (from a trace) or assumed (without one), and
:func:`plan_phase` says how long the way takes that the runtime goes. What is left out: attention's own arithmetic over
a long context, sampling, and the server.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from inference.costmodel import ExpertCosts, MachineProfile, distinct_experts
from inference.limits import CAPTURED_ROWS, MAX_ROWS
from inference.phases import DECODE, PREFILL, PhasePlan, plan_on_cores, plan_phase
from inference.phases import dense_seconds as dense_pass_seconds
from inference.placement import ModelSizes, Placement, PlacementError, place, show_size
from inference.simulate import HEDGE, WARM_UP, Routing, replay

PASSES = ((DECODE, 1), (DECODE, 16), (PREFILL, 1024), (PREFILL, 4096))
CONTEXT = 1024


@dataclass(frozen=True)
class Use:
    """What one layer call uses, on average: ``distinct`` experts, of which ``hits`` (a share) are resident."""

    distinct: float
    hits: float
    source: str


@dataclass(frozen=True)
class Forecast:
    """One pass: ``tokens`` are sequences that decode, or the length of a prompt."""

    phase: str
    tokens: int
    use: Use
    plan: PhasePlan

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.plan.seconds

    @property
    def label(self) -> str:
        return f"decode, batch {self.tokens}" if self.phase == DECODE else f"prefill of {self.tokens} tokens"


def assumed_use(sizes: ModelSizes, share: float, tokens: int) -> Use:
    """Routing without any habit, the worst case for a cache: even, and each token and layer by itself."""
    distinct = distinct_experts(sizes.experts, sizes.top_k, tokens)
    return Use(distinct, share, "assumed: even routing, so hits are the share that is resident")


def traced_use(sizes: ModelSizes, routing: Routing, slots: int, batch: int) -> Use:
    """Decoding ``batch`` parts of a recorded text side by side, through the default policy.

    Raises PlacementError if the trace is of another model, or too short for the batch.
    """
    recorded = (routing.layers, routing.experts)
    if recorded != (sizes.moe_layers, sizes.experts):
        raise PlacementError(
            f"the trace is of {recorded[0]} layers with {recorded[1]} experts, the model has {sizes.moe_layers} with "
            f"{sizes.experts}; give a trace of this model"
        )
    rounds = len(routing.index_TLK) // batch
    if rounds < 8:
        raise PlacementError(
            f"the trace has {len(routing.index_TLK)} of the {8 * batch} tokens that a batch of {batch} takes; record a "
            "longer one"
        )
    side_by_side = routing.index_TLK[: rounds * batch].reshape(batch, rounds, routing.layers, -1)
    merged_TLK = np.moveaxis(side_by_side, 0, 2).reshape(rounds, routing.layers, -1)
    found = replay(Routing(merged_TLK, routing.experts), HEDGE, slots)
    calls = (rounds - int(rounds * WARM_UP)) * routing.layers
    return Use((found.hits + found.misses) / calls, found.hit_rate, f"replayed: {rounds} rounds of the trace, {HEDGE}")


def forecast(
    profile: MachineProfile,
    placement: Placement,
    *,
    cpu_experts: bool = False,
    graphs: bool = False,
    routing: Routing | None = None,
) -> list[Forecast]:
    """All of :data:`PASSES`. Raises PlacementError as :func:`traced_use` does.

    Args:
        cpu_experts: the CPU may compute missing experts beside a GPU.
        graphs: decode steps are captured.
    """
    sizes = placement.sizes
    costs = lane_costs(profile, sizes, cpu_experts)
    found = []
    for phase, tokens in PASSES:
        if routing is not None and phase == DECODE:
            use = traced_use(sizes, routing, placement.slots, tokens)
            found.append(Forecast(phase, tokens, use, _plan(costs, placement, phase, tokens, use, graphs)))
        else:
            found.append(assumed_forecast(costs, placement, phase, tokens, graphs))
    return found


def lane_costs(profile: MachineProfile, sizes: ModelSizes, cpu_experts: bool) -> ExpertCosts:
    """Of a model's experts. Beside a GPU the CPU computes none unless asked, as in the runtime; without one it computes
    all, from slots in host memory, not packed.
    """
    if profile.link is None:
        return ExpertCosts.of(profile, sizes.hidden, sizes.intermediate, sizes.itemsize)
    threads = None if cpu_experts else 0
    return ExpertCosts.of(profile, sizes.hidden, sizes.intermediate, sizes.host_itemsize, threads)


def assumed_forecast(
    costs: ExpertCosts, placement: Placement, phase: str, tokens: int, graphs: bool = False
) -> Forecast:
    """With even routing. A prompt is read in chunks of :data:`MAX_ROWS`, and ``use`` is that of a chunk."""
    chunks = math.ceil(tokens / MAX_ROWS) if phase == PREFILL else 1
    rows = math.ceil(tokens / chunks)
    use = assumed_use(placement.sizes, placement.share, rows)
    return Forecast(phase, tokens, use, _plan(costs, placement, phase, rows, use, graphs).repeated(chunks))


def _plan(costs: ExpertCosts, placement: Placement, phase: str, tokens: int, use: Use, graphs: bool) -> PhasePlan:
    """Of one pass."""
    sizes = placement.sizes
    distinct = max(round(use.distinct), 1)
    rows = max(round(tokens * sizes.top_k / use.distinct), 1)
    dense_s = dense_seconds(costs, placement, phase, tokens, graphs) / sizes.moe_layers
    missing = use.distinct * (1 - use.hits)
    if not costs.has_link:
        return plan_on_cores(
            phase, costs, layers=sizes.moe_layers, rows=[rows] * distinct, missing=missing, dense_s=dense_s
        )
    missing = round(missing)
    return plan_phase(
        phase,
        costs,
        layers=sizes.moe_layers,
        missing_rows=[rows] * missing,
        resident_rows=[rows] * (distinct - missing),
        dense_s=dense_s,
    )


def dense_seconds(costs: ExpertCosts, placement: Placement, phase: str, tokens: int, graphs: bool = False) -> float:
    """Of everything but the routed experts in one pass, see :func:`inference.phases.dense_seconds`.

    Each sequence that decodes is taken to have :data:`CONTEXT` tokens behind it, if there is room for them.
    """
    context = min(tokens * CONTEXT, placement.kv_tokens) if phase == DECODE else tokens
    captured = graphs and phase == DECODE and tokens <= CAPTURED_ROWS
    return dense_pass_seconds(costs.profile, placement.sizes, tokens, context, captured=captured)


def placement_table(placement: Placement, profile: MachineProfile) -> list[str]:
    """What is where, a line each."""
    sizes = placement.sizes
    slots = f"{placement.slots} of {sizes.total_experts} experts ({placement.share:.0%})"
    everything, banked = (sizes.total_experts * each for each in (sizes.expert_bytes, sizes.bank_expert_bytes))
    gpu = profile.link is not None
    home = "GPU" if gpu else "host memory"
    rows = [
        ("dense part", home, sizes.dense_bytes),
        (f"keys and values, {placement.kv_tokens} tokens", home, placement.kv_bytes),
        (slots, home, placement.slot_bytes),
        ("two layers, for prompts to stream", home, placement.streamed_bytes),
        ("workspace", home, placement.workspace),
        ("ring for packed experts", home, placement.ring),
        ("in all", home, placement.nbytes),
    ]
    if not gpu:
        rows.append((f"all {sizes.total_experts} experts", "files", everything))
    elif placement.banked:
        rows.append((f"all {sizes.total_experts} experts{', packed' * sizes.packed}", "host memory", banked))
    return [_line(row) for row in rows if row[2]]


def check_room(placement: Placement, profile: MachineProfile) -> None:
    """Raises PlacementError with the largest budget that fits if the machine has less memory than is placed."""
    sizes, gpu = placement.sizes, profile.link is not None
    room, home = (profile.gpu_room, "of the GPU's memory") if gpu else (profile.host_room, "of host memory")
    banked, fits = sizes.total_experts * sizes.bank_expert_bytes, placement
    said = []
    if room and placement.nbytes > room:
        fits = place(sizes, gpu=gpu, kv_tokens=placement.kv_tokens, vram=room)
        said.append(
            f"it takes {show_size(placement.nbytes)} {home}, and {profile.name} has {show_size(room)}: the largest "
            f"budget that fits is --expert-budget {math.floor(1e4 * fits.share) / 1e4:g}"
        )
    if gpu and fits.banked and profile.host_room and banked > profile.host_room:
        said.append(
            f"below a budget of 1 all experts are kept in host memory, too, {show_size(banked)}, and {profile.name} "
            f"has {show_size(profile.host_room)}: serve with --no-pin, which reads each from its file and of which "
            "this plan says nothing, or take a machine with more"
        )
    if said:
        raise PlacementError("; ".join(said))


def _line(row: tuple[str, str, int]) -> str:
    what, where, nbytes = row
    return f"{what:<36}{where:<14}{show_size(nbytes):>10}"


def forecast_table(found: Sequence[Forecast]) -> list[str]:
    """Predicted rates, the way that was chosen, and what every way would take."""
    ways = list(dict.fromkeys(way for one in found for way in one.plan.alternatives))
    head = f"{'pass':<24}{'tokens/s':>10}{'ms':>10}{'experts':>9}{'hits':>7}  {'way':<10}{'bound by':<16}"
    lines = [head + "".join(f"{way + ' ms':>12}" for way in ways)]
    for one in found:
        line = f"{one.label:<24}{one.tokens_per_second:>10.1f}{1e3 * one.plan.seconds:>10.2f}{one.use.distinct:>9.1f}"
        line += f"{one.use.hits:>7.0%}  {one.plan.mode:<10}{one.plan.bound:<16}"
        times = (one.plan.alternatives.get(way) for way in ways)
        lines.append(line + "".join(f"{'-' if s is None else f'{1e3 * s:.2f}':>12}" for s in times))
    return lines
