"""Which way all layers of a pass go: one plan for a phase, prefill or decode. No torch here.

What :mod:`inference.planner` decides for a call, compared over a whole pass, behind everything that is not experts.
(FlexInfer, MLSys 2025, chooses for each phase between the CPU alone, offloading and both.) A pass of many rows, such as
a chunk of a prompt, asks :class:`PassPlanner` at its first layer, and all layers do what it says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from inference.costmodel import ExpertCosts, MachineProfile, cpu_flops, total
from inference.placement import ModelSizes
from inference.planner import CPU, FETCH, HIT, SPLIT, Lanes, Missing, PlanError, duration, plan_call

DECODE, PREFILL, STREAM = "decode", "prefill", "stream"
# Operations of a layer that are issued one by one; of a captured decode step those between its graphs.
CPU_OPERATIONS, GPU_LAUNCHES, CAPTURED_LAUNCHES = 80, 45, 8


@dataclass(frozen=True)
class PhasePlan:
    """One way for all layers of a phase, prefill or decode.

    Attributes:
        mode: ``fetch`` (decode: when needed), ``stream`` (prefill: the next layer's experts behind this layer's work),
            ``cpu``, ``split``, or ``resident``.
        seconds: of the whole.
        bound: what that time is made of, mostly.
        alternatives: seconds of each way that the machine could go.
    """

    phase: str
    mode: str
    seconds: float
    bound: str
    alternatives: Mapping[str, float]

    def repeated(self, passes: int) -> PhasePlan:
        """The same pass so many times."""
        every = {mode: passes * s for mode, s in self.alternatives.items()}
        return replace(self, seconds=passes * self.seconds, alternatives=every)

    def reason(self) -> str:
        others = {mode: s for mode, s in self.alternatives.items() if mode != self.mode}
        compared = ", ".join(f"{mode} {duration(s)}" for mode, s in sorted(others.items(), key=lambda item: item[1]))
        why = f"against {compared}" if compared else "the only way here"
        return f"{self.mode} takes {duration(self.seconds)}, {why}; bound by {self.bound}"


def plan_phase(
    phase: str,
    costs: ExpertCosts,
    *,
    layers: int,
    missing_rows: Sequence[int],
    resident_rows: Sequence[int],
    dense_s: float,
) -> PhasePlan:
    """Compare the ways for ``layers`` like calls, each behind ``dense_s`` of attention and the like on the GPU.

    Prefill knows that it will use almost every expert, so it may fetch the next layer while this one is computed:
    the link and the GPU then work side by side over the whole pass, behind the first layer's fetch. Decode cannot, its
    experts are known when the layer is reached; nor can a pass that the CPU has a part in, since what the link brings
    depends on the layer's own rows. The fastest way is gone, of equally fast ones the simplest: cpu, then fetch or
    stream, then split. Raises PlanError if the machine has none.
    """
    lanes = Lanes(costs, sorted(missing_rows, reverse=True), resident_rows, 0.0)
    every, dense = len(missing_rows), layers * dense_s
    ways: dict[str, tuple[float, str]] = {}
    if not every:
        ways[HIT] = (dense + layers * float(lanes.gpu_n[0]), "gpu")
    elif costs.threads:
        ways[CPU] = (dense + layers * float(lanes.all_n[0]), "cpu")
    if every and costs.has_link:
        if phase == PREFILL:
            link, gpu = every * costs.link_s, dense_s + total(map(costs.gpu_s, [*missing_rows, *resident_rows]))
            ways[STREAM] = (link + (layers - 1) * max(link, gpu) + gpu, "link" if link >= gpu else "gpu")
        else:
            ways[FETCH] = (dense + layers * float(lanes.all_n[-1]), "link")
        if costs.threads and every > 1:
            apart = 1 + int(lanes.all_n[1:-1].argmin())
            ways[SPLIT] = (dense + layers * float(lanes.all_n[apart]), lanes.bound(apart))
    if not ways:
        raise PlanError(f"{phase}: {every} experts of a layer are missing, without a link and without CPU threads")
    mode = min(ways, key=lambda way: ways[way][0])
    seconds, bound = ways[mode]
    if dense > seconds / 2:
        bound = "the dense part"
    return PhasePlan(phase, mode, seconds, bound, {way: s for way, (s, _) in ways.items()})


def plan_on_cores(
    phase: str, costs: ExpertCosts, *, layers: int, rows: Sequence[int], missing: float, dense_s: float
) -> PhasePlan:
    """Without a GPU there is one way: the cores compute each of the experts from its slot in host memory, and of a
    layer's ``missing`` ones wait until it is read into one.
    """
    reads, products = layers * missing * costs.fill_s, layers * total(map(costs.cpu_s, rows))
    parts = {"the dense part": layers * dense_s, "cpu": products, "reads": reads}
    seconds = total(parts.values())
    return PhasePlan(phase, CPU, seconds, max(parts, key=parts.__getitem__), {CPU: seconds})


def dense_seconds(
    profile: MachineProfile, sizes: ModelSizes, rows: int, context: int, *, captured: bool = False
) -> float:
    """Of everything but the routed experts in one pass: bytes read, products made, operations issued.

    Args:
        context: positions whose keys and values are read, of all sequences together.
        captured: the step is replayed from graphs.
    """
    nbytes = sizes.dense_bytes - sizes.table_bytes + context * sizes.kv_bytes
    products = 2 * sizes.dense_elements * rows
    if profile.link is not None:
        issued = (CAPTURED_LAUNCHES if captured else GPU_LAUNCHES) * profile.launch_s + profile.sync_s
        return max(nbytes / profile.gpu_memory, products / profile.gpu_flops) + sizes.layers * issued
    issued = CPU_OPERATIONS * profile.launch_s
    return max(nbytes / profile.dram.alone, products / cpu_flops(profile)) + sizes.layers * issued


@dataclass(frozen=True)
class Division:
    """What becomes of the missing experts of one layer call: ``fetch`` in the order of the link, ``cpu`` computed."""

    mode: str
    fetch: tuple[int, ...]
    cpu: tuple[int, ...] = ()


class PassPlanner:
    """Chooses one way for each pass of many rows, and counts what it chose.

    Args:
        layers: calls of a pass.
        dense_s: of one layer with so many rows, beside its routed experts.

    Attributes:
        modes: how many passes went which way; those that missed nothing went none.
        newest: the last choice.
    """

    def __init__(self, costs: ExpertCosts, layers: int, dense_s: Callable[[int], float]) -> None:
        self.costs, self.layers = costs, layers
        self.modes: dict[str, int] = {}
        self.newest: PhasePlan | None = None
        self._dense_s = dense_s
        self._row, self._mode = -1, ""

    def __call__(
        self,
        row: int,
        tokens: int,
        missing: Sequence[Missing],
        resident_rows: Sequence[int],
        worth: Mapping[int, float] | None = None,
    ) -> Division:
        """The call of layer ``row``; one that is not below the last begins a pass.

        The first call of a pass that misses anything stands for all of its layers. In a split, each of them is cut
        where :func:`inference.planner.plan_call` finds it best for its own rows.
        """
        if row <= self._row:
            self._mode = ""
        self._row = row
        if missing and not self._mode:
            self._mode = self._choose(tokens, [rows for _, rows in missing], resident_rows)
        experts = tuple(expert for expert, _ in missing)
        if self._mode == CPU:
            return Division(CPU, (), experts)
        if self._mode == SPLIT:
            split = plan_call(self.costs, missing, resident_rows=resident_rows, worth=worth)
            return Division(SPLIT, split.fetch, split.cpu)
        return Division(STREAM, experts)

    def _choose(self, tokens: int, missing_rows: Sequence[int], resident_rows: Sequence[int]) -> str:
        plan = plan_phase(
            PREFILL,
            self.costs,
            layers=self.layers,
            missing_rows=missing_rows,
            resident_rows=resident_rows,
            dense_s=self._dense_s(tokens),
        )
        self.modes[plan.mode] = self.modes.get(plan.mode, 0) + 1
        self.newest = plan
        return plan.mode
