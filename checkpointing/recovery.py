"""What can be recovered, what should be, and which bytes have to move for it. Pure: values in, values out."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from checkpointing.records import DTYPE_BYTES, Entry, Kind, RecordInfo
from checkpointing.schedule import WHOLE, Rules
from checkpointing.units import Key, Range, expert_of, overlaps, uncovered
from moe.refs import ExpertRef

TIERS = ("memory", "disk")
GRADIENT = "grad"  # the kind under which a log keeps what an optimizer step consumed


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


@dataclass(frozen=True)
class Restoration:
    """How one rank's state comes back: bases in the order of their steps, and the log from the oldest to ``step``.

    Before the log of a step is applied, the bases of earlier steps must be in place; a base of that very step is put in
    after it. Elements whose base is still to come hold anything: updates are elementwise.

    Attributes:
        bases: for each base step, oldest first, the pieces of it that are needed: what, and which record holds it.
        logs: the records of steps oldest + 1 .. step, in order; none if every base is of ``step``.
    """

    step: int
    bases: tuple[tuple[int, tuple[tuple[Range, RecordInfo], ...]], ...]
    logs: tuple[RecordInfo, ...]

    @property
    def oldest(self) -> int:
        return self.bases[0][0] if self.bases else self.step

    def places(self) -> list[tuple[str, int]]:
        """(source, slot) of every record that is read, in the order of reading."""
        logs = {record.step: record for record in self.logs}
        bases = dict(self.bases)
        places: dict[tuple[str, int], None] = {}
        for step in range(self.oldest, self.step + 1):
            read = [logs[step]] if step in logs else []
            for record in [*read, *(record for _, record in bases.get(step, ()))]:
                places[record.source, record.slot] = None
        return list(places)

    def ages(self) -> dict[int, int]:
        """How many elements are restored from each base step."""
        return {step: sum(piece.size for piece, _ in pieces) for step, pieces in self.bases}

    def expert_steps(self) -> dict[ExpertRef, int]:
        """The step as of which each expert is restored: of its oldest element, or the plan's if a log is redone."""
        steps: dict[ExpertRef, int] = {}
        for at, pieces in reversed(self.bases):
            refs = {ref for piece, _ in pieces if (ref := expert_of(piece.unit)) is not None}
            steps |= dict.fromkeys(refs, self.step if self.logs else at)
        return steps


def available_steps(
    needs: Iterable[Need], records: Iterable[RecordInfo], coordinate: str, rules: Rules = WHOLE, newest: int = 0
) -> list[int]:
    """Steps, oldest first, at which every needed range can be had exactly once and this coordinate's extras are there.

    With ``newest``, at most that many of the newest ones.
    """
    wanted = tuple(need.range for need in needs)
    records = list(records)
    steps = sorted({r.step for r in records if r.kind is Kind.EXTRAS and r.source == coordinate}, reverse=True)
    found: list[int] = []
    for step in steps:
        if newest and len(found) == newest:
            break
        if not isinstance(restoration_of(wanted, records, coordinate, step, rules), str):
            found.append(step)
    return sorted(found)


def restoration_of(
    wanted: Sequence[Range], records: Iterable[RecordInfo], coordinate: str, step: int, rules: Rules = WHOLE
) -> Restoration | str:
    """How ``records`` restore ``wanted`` at ``step``, or in words why they do not: the proof of completeness.

    Each element comes from its newest base at or before the step. The coordinate's log must hold the gradient of every
    element for every step since the oldest of these bases. If ``rules.lossy`` there is no log: experts may be older,
    and what is no expert's must be of the step itself.
    """
    records = [record for record in records if record.step <= step]
    if not any(r.kind is Kind.EXTRAS and r.source == coordinate and r.step == step for r in records):
        return f"the extras of {coordinate} are absent"
    remaining: dict[Key, list[Range]] = {}
    for need in wanted:
        if need.size:
            remaining.setdefault(need.key, []).append(need)
    bases = []
    for at in sorted({r.step for r in records if r.kind is Kind.BASE}, reverse=True):
        held = [(e.range, r) for r in records if r.kind is Kind.BASE and r.step == at
                for e in r.entries if e.range.key in remaining]  # fmt: skip
        twice = overlaps([piece for piece, _ in held])
        if twice:
            return f"{twice[0]} is held twice in step {at}"
        pieces = _meeting(remaining, held)
        if pieces:
            bases.append((at, tuple(pieces)))
            _take_out(remaining, [piece for piece, _ in pieces])
        if not remaining:
            break
    if remaining:
        absent = uncovered(itertools.chain(*remaining.values()), [])
        return f"{absent[0]} is absent ({len(absent)} ranges in all)"
    bases.reverse()
    oldest = bases[0][0] if bases else step
    if rules.lossy:
        stale = [piece for at, pieces in bases if at < step for piece, _ in pieces if expert_of(piece.unit) is None]
        return f"{stale[0]} is of an older step" if stale else Restoration(step, tuple(bases), ())
    logs = _logs(wanted, records, coordinate, range(oldest + 1, step + 1))
    return logs if isinstance(logs, str) else Restoration(step, tuple(bases), logs)


def _meeting(
    remaining: Mapping[Key, Sequence[Range]], held: Iterable[tuple[Range, RecordInfo]]
) -> list[tuple[Range, RecordInfo]]:
    """The parts of what is held that are still wanted."""
    pieces = []
    for piece, record in held:
        for need in remaining[piece.key]:
            first, last = max(need.lo, piece.lo), min(need.hi, piece.hi)
            if first < last:
                pieces.append((Range(piece.unit, piece.kind, first, last), record))
    return pieces


def _take_out(remaining: dict[Key, list[Range]], pieces: Iterable[Range]) -> None:
    """Only what the pieces are of is looked at: a state has thousands of tensors, and a base a few of them."""
    of: dict[Key, list[Range]] = {}
    for piece in pieces:
        of.setdefault(piece.key, []).append(piece)
    for key, found in of.items():
        wanted = remaining.pop(key)
        if wanted != found and (left := uncovered(wanted, found)):
            remaining[key] = left


def _logs(
    wanted: Sequence[Range], records: Iterable[RecordInfo], coordinate: str, steps: range
) -> tuple[RecordInfo, ...] | str:
    held: dict[int, list[RecordInfo]] = {}
    for record in records:
        if record.kind is Kind.LOG and record.source == coordinate:
            held.setdefault(record.step, []).append(record)
    gradients = {Range(r.unit, GRADIENT, r.lo, r.hi) for r in wanted}
    proved: set[frozenset[Range]] = set()  # most logs have the same table
    logs = []
    for step in steps:
        found = held.get(step, [])
        if len(found) != 1:
            return f"the log of step {step} is {'absent' if not found else 'held twice'}"
        ranges = frozenset(e.range for e in found[0].entries)
        skipped = not any(r.kind == GRADIENT for r in ranges)
        if not skipped and ranges not in proved:
            absent = uncovered(gradients, ranges)
            if absent:
                return f"the log of step {step} lacks {absent[0]}"
            proved.add(ranges)
        logs.append(found[0])
    return tuple(logs)


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


def memory_suffices(reports: Sequence[tuple[Sequence[int], int]]) -> bool:
    """Whether a step that every rank has in memory is at least as new as any on disk, so that nobody need read there.

    Args:
        reports: for each rank its complete steps in memory, and the newest step known to be on disk.
    """
    common = set.intersection(*[set(steps) for steps, _ in reports])
    return bool(common) and max(common) >= max(disk for _, disk in reports)


def check_readable(plan: RecoveryPlan, unreadable: Sequence[str]) -> None:
    """Raises RecoveryError if some rank could not read the disk tier and memory does not make up for it.

    Going on from what the others see, be it an older step or afresh, would set newer checkpoints aside.

    Args:
        unreadable: for each rank, why; empty where all could be read.
    """
    blind = [problem for problem in unreadable if problem]
    if blind and plan.tier != "memory":
        raise RecoveryError(
            f"{blind[0]}; going on without it could cost what it holds: mend it, or change checkpoint.disk.url"
        )


def _summary(reports: Sequence[Mapping[str, Sequence[int]]]) -> str:
    parts = []
    for tier in TIERS:
        per_rank = [sorted(report.get(tier, ())) for report in reports]
        if all(tier not in report for report in reports):
            parts.append(f"{tier} was not asked")
        elif not any(per_rank):
            parts.append(f"{tier} had no step")
        elif all(steps == per_rank[0] for steps in per_rank):
            parts.append(f"{tier} had {_steps(per_rank[0])} on all ranks")
        else:
            parts.append(f"{tier} had " + ", ".join(f"{_steps(s)} on rank {r}" for r, s in enumerate(per_rank)))
    return "; ".join(parts)


def _steps(steps: Sequence[int]) -> str:
    return f"step{'s' if len(steps) > 1 else ''} {', '.join(map(str, steps))}" if steps else "none"


def restoring_moves(needs: Sequence[Need], restoration: Restoration) -> list[tuple[int, list[Transfer]]]:
    """For each base step, oldest first, the copies that put its pieces where they are needed. Raises RecoveryError."""
    where: dict[Key, list[Need]] = {}
    for need in needs:
        where.setdefault(need.range.key, []).append(need)
    moves = []
    for step, pieces in restoration.bases:
        narrowed, holders = [], {}
        for piece, record in pieces:
            holders[record.source, record.slot] = record
            for need in where[piece.key]:
                lo, hi = max(need.range.lo, piece.lo), min(need.range.hi, piece.hi)
                if lo < hi:
                    offset = need.offset + (lo - need.range.lo) * DTYPE_BYTES[need.dtype]
                    narrowed.append(Need(Range(piece.unit, piece.kind, lo, hi), need.dtype, need.buffer, offset))
        moves.append((step, transfers(narrowed, holders.values())))
    return moves


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
