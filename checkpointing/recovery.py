"""What can be recovered, what should be, and which bytes have to move for it. Pure: values in, values out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from checkpointing.records import DTYPE_BYTES, Entry, Kind, RecordInfo
from checkpointing.units import Key, Range, overlaps, uncovered

TIERS = ("memory", "disk")


class RecoveryError(ValueError):
    """State cannot be restored: says which layer, expert and tensor, and what to do."""


@dataclass(frozen=True)
class Need:
    """A range that a live buffer must get: ``offset`` in bytes into the buffer of that name."""

    range: Range
    dtype: str
    buffer: str
    offset: int


@dataclass(frozen=True)
class Transfer:
    """Bytes to copy: offsets are into the source's payload and into the buffer. ``slot`` is -1 for a file."""

    source: str
    slot: int
    source_offset: int
    buffer: str
    buffer_offset: int
    nbytes: int


@dataclass(frozen=True)
class RecoveryPlan:
    """Which step every rank restores, and from where.

    Attributes:
        step: the step, or -1 for a fresh start.
        tier: ``memory`` if all ranks read memory, ``disk`` if any reads disk, ``fresh`` for no step at all.
        reason: one sentence: what each tier had, and why this was chosen.
        alternatives: the other (step, tier) that were possible, best first.
        tiers: the tier of each rank.
    """

    step: int
    tier: str
    reason: str
    alternatives: tuple[tuple[int, str], ...] = ()
    tiers: tuple[str, ...] = ()


def available_steps(needs: Iterable[Need], records: Iterable[RecordInfo], coordinate: str) -> list[int]:
    """Steps, oldest first, at which every needed range is held exactly once and this coordinate's extras are there."""
    wanted = [need.range for need in needs]
    by_step: dict[int, list[RecordInfo]] = {}
    for record in records:
        by_step.setdefault(record.step, []).append(record)
    return [step for step, held in sorted(by_step.items()) if not missing(wanted, held, coordinate)]


def missing(wanted: Sequence[Range], records: Iterable[RecordInfo], coordinate: str) -> str:
    """Why ``records`` (of one step) cannot restore ``wanted``; empty if they can."""
    records = list(records)
    if not any(r.kind is Kind.EXTRAS and r.source == coordinate for r in records):
        return f"the extras of {coordinate} are absent"
    keys = {r.key for r in wanted}
    held = [e.range for r in records if r.kind is Kind.BASE for e in r.entries if e.range.key in keys]
    absent = uncovered(wanted, held)
    if absent:
        return f"{absent[0]} is absent ({len(absent)} ranges in all)"
    twice = overlaps(held)
    return f"{twice[0]} is held twice" if twice else ""


def plan_recovery(reports: Sequence[Mapping[str, Sequence[int]]]) -> RecoveryPlan:
    """The newest step that every rank can restore; at that step memory before disk, and one tier for all if possible.

    Args:
        reports: for each rank, the complete steps of each tier, e.g. ``{"memory": [7, 8], "disk": [5]}``.
    """
    choices: list[tuple[int, str]] = []
    held = [{tier: set(report.get(tier, ())) for tier in TIERS} for report in reports]
    common = set.intersection(*[tiers["memory"] | tiers["disk"] for tiers in held]) if held else set()
    for step in sorted(common, reverse=True):
        on_all = [tier for tier in TIERS if all(step in tiers[tier] for tiers in held)]
        choices += [(step, tier) for tier in on_all or ["disk"]]
    summary = _summary(reports)
    if not choices:
        return RecoveryPlan(-1, "fresh", f"{summary}; no step is complete on all ranks, so training starts afresh",
                            tiers=("fresh",) * len(held))  # fmt: skip
    step, tier = choices[0]
    tiers = tuple(tier if step in has[tier] else "memory" for has in held)
    mixed = len(set(tiers)) > 1
    why = f"step {step} is the newest that is complete on all ranks"
    where = "memory on some ranks and disk on the others" if mixed else tier
    return RecoveryPlan(step, tier, f"{summary}; {why}, restored from {where}", tuple(choices[1:]), tiers)


def _summary(reports: Sequence[Mapping[str, Sequence[int]]]) -> str:
    parts = []
    for tier in TIERS:
        per_rank = [sorted(report.get(tier, ())) for report in reports]
        if not any(per_rank):
            parts.append(f"{tier} had no step")
        elif all(steps == per_rank[0] for steps in per_rank):
            parts.append(f"{tier} had {_steps(per_rank[0])} on all ranks")
        else:
            parts.append(f"{tier} had " + ", ".join(f"{_steps(s)} on rank {r}" for r, s in enumerate(per_rank)))
    return "; ".join(parts)


def _steps(steps: Sequence[int]) -> str:
    return f"step{'s' if len(steps) > 1 else ''} {', '.join(map(str, steps))}" if steps else "none"


def transfers(needs: Iterable[Need], records: Iterable[RecordInfo]) -> list[Transfer]:
    """The copies that fill every need from base records of one step, whatever layout wrote them.

    Raises RecoveryError, naming layer, expert and tensor, where a range is absent, held twice or of another dtype.
    """
    held: dict[Key, list[tuple[Entry, RecordInfo]]] = {}
    for record in records:
        if record.kind is Kind.BASE:
            for entry in record.entries:
                held.setdefault(entry.range.key, []).append((entry, record))
    moves: list[Transfer] = []
    for need in needs:
        moves += _fill(need, held.get(need.range.key, []))
    return _coalesced(moves)


def _fill(need: Need, held: list[tuple[Entry, RecordInfo]]) -> list[Transfer]:
    moves, at = [], need.range.lo
    for entry, record in sorted(held, key=lambda pair: pair[0].range):
        lo, hi = max(need.range.lo, entry.range.lo), min(need.range.hi, entry.range.hi)
        if lo >= hi:
            continue
        if entry.dtype != need.dtype:
            raise RecoveryError(
                f"{entry.range} was kept as {entry.dtype}, this run needs {need.dtype}; use the same dtype"
            )
        if lo != at:
            break
        size = DTYPE_BYTES[need.dtype]
        moves.append(
            Transfer(
                record.source,
                record.slot,
                entry.offset + (lo - entry.range.lo) * size,
                need.buffer,
                need.offset + (lo - need.range.lo) * size,
                (hi - lo) * size,
            )
        )
        at = hi
    else:
        if at == need.range.hi:
            return moves
    parts = [entry.range for entry, _ in held]
    absent, twice = uncovered([need.range], parts), overlaps(parts)
    problem = f"{absent[0]} is absent" if absent else f"{twice[0]} is held twice"
    raise RecoveryError(f"{need.range} cannot be restored: {problem}; use another step")


def _coalesced(moves: list[Transfer]) -> list[Transfer]:
    """Neighbours in both source and buffer, joined: a whole partition usually becomes a few copies."""
    if not moves:
        return []
    moves = sorted(moves, key=lambda m: (m.source, m.slot, m.buffer, m.source_offset))
    starts = [0] + [i for i, (a, b) in enumerate(pairwise(moves), 1) if not _adjoin(a, b)] + [len(moves)]
    joined = []
    for start, stop in pairwise(starts):
        first = moves[start]
        total = sum(m.nbytes for m in moves[start:stop])
        joined.append(Transfer(first.source, first.slot, first.source_offset, first.buffer, first.buffer_offset, total))
    return joined


def _adjoin(a: Transfer, b: Transfer) -> bool:
    return (
        (a.source, a.slot, a.buffer) == (b.source, b.slot, b.buffer)
        and a.source_offset + a.nbytes == b.source_offset
        and a.buffer_offset + a.nbytes == b.buffer_offset
    )
