"""What a runtime did with the machine: hits, bytes, waits, its share of what is physically possible, what to change.

The floor is that of :func:`inference.costmodel.physical_floor` for the very hits that were made: what perfect overlap
would have left of the same work. No torch here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from inference.costmodel import Floor, MachineProfile, distinct_experts, physical_floor
from inference.placement import ModelSizes, show_size
from inference.stats import hit_rate


@dataclass(frozen=True)
class Measured:
    """What was counted since the model was opened.

    Attributes:
        seconds: wall time of all steps.
        new_tokens: that were generated.
        rows: tokens that went through the model, prompts included.
        passes: calls of the whole model.
        slots: for resident experts.
        hits, misses: one for each distinct expert of a layer call; an expert that the CPU computed is neither.
        cpu_experts: experts that the CPU computed beside a GPU, one for each call.
        fetched_bytes: over the link, on demand or ahead. Without a GPU, copied into slots.
        prefetched: experts fetched ahead; ``wasted`` of them were evicted unused.
        stall_s: for how long computing waited for the link.
        ways: how many layer calls went which way, see :class:`inference.planner.CallPlanner`.
        newest_plan: the last split, in words.
        pass_ways: how many passes of many rows went which way, see :class:`inference.phases.PassPlanner`.
        newest_pass: the last choice of these, in words.
    """

    seconds: float
    new_tokens: int
    rows: int
    passes: int
    slots: int
    hits: int
    misses: int
    fetched_bytes: int
    cpu_experts: int = 0
    prefetched: int = 0
    wasted: int = 0
    stall_s: float = 0.0
    ways: Mapping[str, int] = field(default_factory=dict)
    newest_plan: str = ""
    pass_ways: Mapping[str, int] = field(default_factory=dict)
    newest_pass: str = ""

    @property
    def hit_rate(self) -> float:
        return hit_rate(self.hits, self.misses, self.cpu_experts)


@dataclass(frozen=True)
class Report:
    """Printed, a few lines; each figure is an attribute or a property."""

    measured: Measured
    sizes: ModelSizes
    profile: MachineProfile
    floor: Floor

    @classmethod
    def of(cls, measured: Measured, sizes: ModelSizes, profile: MachineProfile) -> Report:
        used = measured.hits + measured.misses
        dense = measured.passes * (sizes.dense_bytes - sizes.table_bytes)
        weights = sizes.dense_elements + sizes.moe_layers * sizes.top_k * sizes.expert_bytes / sizes.itemsize
        with_link = profile.link is not None
        floor = physical_floor(
            profile,
            missed_bytes=(measured.misses + measured.cpu_experts) * sizes.host_expert_bytes if with_link else 0.0,
            fetched_bytes=measured.fetched_bytes,
            device_bytes=dense + used * sizes.expert_bytes,
            flops=2 * measured.rows * weights,
        )
        return cls(measured, sizes, profile, floor)

    @property
    def share(self) -> float:
        """Of the floor: 1 if nothing could be faster with these hits."""
        return self.floor.seconds / self.measured.seconds if self.measured.seconds else 0.0

    @property
    def stalled(self) -> float:
        """The part of the time for which computing waited for the link."""
        return self.measured.stall_s / self.measured.seconds if self.measured.seconds else 0.0

    def advice(self) -> list[str]:
        """What would change most, most important first."""
        return list(_advice(self)) or ["nothing stands out"]

    def __str__(self) -> str:
        m = self.measured
        if not m.rows:
            return "nothing has been computed yet"
        per_second = m.new_tokens / m.seconds if m.seconds else 0.0
        lines = [
            f"{m.new_tokens} new tokens in {m.seconds:.2f} s, {per_second:.1f} tokens/s; {m.rows / m.passes:.1f} rows "
            f"in each of {m.passes} passes",
            f"experts: {m.hits} hits, {m.misses} misses, {m.cpu_experts} computed by the CPU ({m.hit_rate:.1%} hits)",
            f"bytes: {show_size(m.fetched_bytes)} fetched, {show_size(m.fetched_bytes / m.rows)} for each row",
        ]
        if m.prefetched:
            lines.append(f"prefetch: {m.prefetched} experts, {m.wasted} of them in vain")
        if self.profile.link is not None:
            lines.append(f"waits: {m.stall_s:.2f} s for the link, {self.stalled:.0%} of the time")
        lines += _ways("layer calls", m.ways, m.newest_plan) + _ways("passes of many rows", m.pass_ways, m.newest_pass)
        lines.append(
            f"floor: {self.floor.seconds:.3f} s by {self.floor.bound}; {self.share:.0%} of the time was needed "
            f"({self.profile.hardware})"
        )
        return "\n".join([*lines, *(f"change: {sentence}" for sentence in self.advice())])


def _ways(what: str, ways: Mapping[str, int], newest: str) -> list[str]:
    """Which way calls went, and why the last one did."""
    if not ways:
        return []
    total = sum(ways.values())
    shares = ", ".join(f"{way} {n / total:.0%}" for way, n in sorted(ways.items(), key=lambda item: -item[1]))
    return [f"{what}: {shares}" + (f"; the last: {newest}" if newest else "")]


def _advice(report: Report) -> Iterator[str]:
    m, sizes, with_link = report.measured, report.sizes, report.profile.link is not None
    if not m.rows:
        return
    token = sizes.moe_layers * sizes.top_k
    if m.misses and m.slots < min(token, sizes.total_experts):
        yield (
            f"a token uses {token} experts and {m.slots} have slots, so few are found again: an expert budget of "
            f"{token / sizes.total_experts:.2f} holds one token's"
        )
    elif m.misses + m.cpu_experts > m.hits:
        yield "most experts are missing: give more memory, and see with `planaria simulate` what it would hit"
    if report.stalled > 0.2 and not m.cpu_experts:
        yield f"computing waited for the link for {report.stalled:.0%} of the time: let the CPU compute misses, too"
    elif report.stalled > 0.2:
        yield f"computing waited for the link for {report.stalled:.0%} of the time: only fewer misses or prefetch help"
    if m.wasted > m.prefetched / 2:
        yield f"{m.wasted} of {m.prefetched} prefetched experts were never used: prefetch less, or use lookahead heads"
    if m.rows / m.passes < 4:
        many = distinct_experts(sizes.experts, sizes.top_k, 16) / (16 * sizes.top_k)
        yield (
            f"{m.rows / m.passes:.1f} rows share a pass: 16 sequences at once would read {many:.0%} of the experts, "
            "and a sixteenth of the rest, for each token"
        )
    if report.share >= 0.6:
        yield f"the machine is the limit ({report.floor.bound}): only fewer bytes or fewer products make it faster"
    elif report.share < 0.3 and report.stalled <= 0.2:
        idle = "neither link nor memory nor processors were" if with_link else "neither memory nor processors were"
        yield f"{idle} busy for most of the time: it went into issuing operations; larger batches spread that"
