"""A mode applied to one worker's live state: its parts, its log, and the memory that takes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from checkpointing.capture import arena_shape
from checkpointing.cost import SLACK
from checkpointing.partial import Experts, most_selected
from checkpointing.schedule import Rules, wal_part
from checkpointing.slots import ArenaShape
from checkpointing.state.buffers import StateBuffer
from checkpointing.state.expert_parts import ExpertParts, expert_parts
from checkpointing.state.fragments import Fragment, LogLayout, log_layout, rotation
from checkpointing.units import Range, uncovered


@dataclass(frozen=True)
class Protection:
    """What is captured of a worker after a step, and in which memory.

    Attributes:
        log: the layout of log records; None if steps are not logged.
        experts: which fragment is which expert's, in mode ``pec``.
    """

    rules: Rules
    fragments: tuple[Fragment, ...]
    log: LogLayout | None
    shape: ArenaShape
    experts: ExpertParts | None = None

    def due(self, step: int) -> list[Fragment]:
        """All fragments, the one whose turn it is after ``step`` first."""
        turn = wal_part(step, len(self.fragments))
        return [self.fragments[turn], *self.fragments[:turn], *self.fragments[turn + 1 :]]

    def outgrown(self, step: int, restored: Iterable[tuple[int, Range]]) -> list[Fragment]:
        """The fragments to capture at once after a recovery of ``step``, given each piece and the step of its base.

        A damaged record leaves its part with a base that is older than one rotation. Until its turn came again, the log
        would have to reach back further than there is memory for, and no slot would ever be free.
        """
        oldest = step - self.rules.parts + 1
        young = [piece for base, piece in restored if base >= oldest]
        return [f for f in self.fragments if uncovered([entry.range for entry in f.entries], young)]


def dense(buffers: Sequence[StateBuffer], generations: int) -> Protection:
    """The whole state each time.

    ``generations`` base slots: 3 for a memory tier (the committed step, one being sealed, one being copied), 4 with
    writes to disk during the run, so that a running one blocks no capture. 2 are enough if only steps for the disk are
    captured: one holds the newest sealed step, the other is free as soon as its own write ends. 1 never would be. On a
    GPU a request may name a committed step that is two behind; a keeper that sees all workers knows the newer one.
    """
    fragments = rotation(buffers, 1)
    shape = arena_shape(fragments, None, bases=generations, logs=0, extras=generations)
    return Protection(Rules(), tuple(fragments), None, shape)


def wal(buffers: Sequence[StateBuffer], parts: int, dtype: str, disk: bool) -> Protection:
    """``parts`` fragments in rotation and a log of gradients in ``dtype``.

    A restore of the committed step needs each part once and the log of parts - 1 steps. ``disk``: room for one more
    whole state, which is captured at once and written while the rotation goes on.
    """
    fragments = rotation(buffers, parts)
    log = log_layout(buffers, dtype)
    bases = parts + SLACK + (parts if disk else 0)
    shape = arena_shape(fragments, log, bases=bases, logs=parts - 1 + SLACK, extras=SLACK + 2)
    return Protection(Rules(parts), tuple(fragments), log, shape)


def pec(buffers: Sequence[StateBuffer], experts: Experts, k: int, sequential: bool, disk: bool) -> Protection:
    """What is no expert's in chunks, and a part for each expert, of which some are captured at a time.

    Memory for the newest copy of each part, and for captures under way, each with the most experts that can be
    selected on this rank at once. ``disk``: room for one more whole state, which the first write to disk holds while
    captures go on; later ones hold less.

    Args:
        k: experts of each layer per capture.
        sequential: whether they are selected in turn, which spreads them over the ranks.
    """
    parts = expert_parts(buffers)
    here = set(parts.experts)
    selected = most_selected(experts, here, k) if sequential else min(len(here), k * len(experts.layers))
    count = len(parts.fragments)
    bases = count * (2 if disk else 1) + (parts.fresh + selected) * SLACK
    shape = arena_shape(parts.fragments, None, bases=bases, logs=0, extras=SLACK + 2)
    return Protection(Rules(count, parts.fresh), parts.fragments, None, shape, parts)
