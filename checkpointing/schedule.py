"""What is captured after a step, what a worker's sealed records can restore, and which of them are superseded.

A worker's state is cut into *parts*. A mode says which parts become BASE records after which step:

* ``dense``: one part, all of it, every m steps (GEMINI's local tier).
* ``wal``: n parts in rotation, and after every step a LOG record of the gradients that the optimizer consumed, as a
  database keeps fuzzy snapshots and a write-ahead log. Restoring step t takes each part's newest base and re-applies
  the optimizer steps since.
* ``pec``: the first m parts are all that is not an expert, captured every time; each expert is a part of its own, some
  of them captured each time (MoC-System, ASPLOS'25). What is restored has experts of different ages.

Pure: the keeper, the worker and the tests ask the same functions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from checkpointing.records import Kind


@dataclass(frozen=True)
class Held:
    """A sealed record of one worker: its kind, the step it is of, and for a BASE the parts it holds."""

    kind: Kind
    step: int
    parts: tuple[int, ...] = ()


@dataclass(frozen=True)
class Rules:
    """How one worker's records belong together.

    Attributes:
        parts: how many parts its state has.
        fresh: 0: a state is exact, by its log if its parts are of different steps. Else (``pec``) the first ``fresh``
            parts must be of the restored step itself, and the others may be older: there is no log.
    """

    parts: int = 1
    fresh: int = 0

    @property
    def lossy(self) -> bool:
        return self.fresh > 0


WHOLE = Rules()


def newest_bases(held: Iterable[Held], step: int) -> dict[int, int]:
    """For each part the step of its newest base at or before ``step``."""
    newest: dict[int, int] = {}
    for record in held:
        if record.kind is Kind.BASE and record.step <= step:
            for part in record.parts:
                newest[part] = max(newest.get(part, -1), record.step)
    return newest


def restorable_steps(held: Iterable[Held], rules: Rules) -> set[int]:
    """Steps whose state these records give: extras of that step, a base of every part, and the log in between."""
    held = list(held)
    logs = {record.step for record in held if record.kind is Kind.LOG}
    steps = {record.step for record in held if record.kind is Kind.EXTRAS}
    return {step for step in steps if _restorable(step, newest_bases(held, step), logs, rules)}


def _restorable(step: int, bases: Mapping[int, int], logs: set[int], rules: Rules) -> bool:
    if len(bases) < rules.parts:
        return False
    if rules.lossy:
        return all(bases.get(part) == step for part in range(rules.fresh))
    return logs.issuperset(range(min(bases.values()) + 1, step + 1))


def is_superseded(record: Held, committed: int, bases: Mapping[int, int], rules: Rules) -> bool:
    """Whether no restore of the committed step or a later one can need the record.

    Args:
        committed: the newest step that all workers of the job can restore; -1 for none.
        bases: :func:`newest_bases` at the committed step.
    """
    if record.step >= committed:
        return False
    if record.kind is Kind.BASE:
        return all(bases.get(part, -1) > record.step for part in record.parts)
    if record.kind is Kind.LOG:
        return len(bases) >= rules.parts and record.step <= min(bases.values())
    return True


def needed_for(held: Iterable[Held], step: int, rules: Rules) -> set[Held]:
    """The records that restoring ``step`` reads. Meaningful only if the step is restorable."""
    held = list(held)
    bases = newest_bases(held, step)
    oldest = min(bases.values(), default=step)
    needed = {r for r in held if r.kind is Kind.BASE and any(bases.get(part) == r.step for part in r.parts)}
    if not rules.lossy:
        needed |= {r for r in held if r.kind is Kind.LOG and oldest < r.step <= step}
    return needed | {r for r in held if r.kind is Kind.EXTRAS and r.step == step}


def wal_part(step: int, rotation: int) -> int:
    """The part whose turn it is after ``step``."""
    return step % rotation


def cuts(elements: int, parts: int, align: int = 64) -> list[int]:
    """Bounds that cut a flat partition into ``parts`` pieces of nearly equal size: parts + 1 numbers, aligned."""
    size = -(-elements // parts)
    size = -(-size // align) * align
    return [min(i * size, elements) for i in range(parts)] + [elements]
