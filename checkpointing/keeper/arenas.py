"""What the keeper knows about each worker's arena, and which slot may be overwritten when."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from checkpointing.keeper.loop import Connection
from checkpointing.keeper.protocol import Message
from checkpointing.records import Kind, RecordError, State, begin, read_header, set_state, state_of
from checkpointing.slots import Arena, ArenaShape

CAPTURED = (Kind.BASE, Kind.EXTRAS)


@dataclass
class Slot:
    """A slot's record as last known. ``users`` counts those who read it just now: persists and checks."""

    index: int
    kind: Kind
    view: memoryview
    state: State = State.FREE
    step: int = -1
    sequence: int = -1
    users: int = 0
    doomed: bool = False

    def free(self) -> None:
        """Free it, or have it freed when its last reader is done."""
        if self.users:
            self.doomed = True
        else:
            self._become(State.FREE)

    def quarantine(self) -> None:
        self._become(State.QUARANTINED)

    def _become(self, state: State) -> None:
        self.state, self.step, self.doomed = state, -1, False
        set_state(self.view, state)

    def release(self) -> None:
        self.users -= 1
        if self.doomed and not self.users:
            self.free()

    @property
    def sealed(self) -> bool:
        return self.state is State.SEALED and not self.doomed


@dataclass
class Waiting:
    """A worker's request for slots that cannot be met yet."""

    connection: Connection
    request: Message
    since: float


@dataclass
class Keep:
    """One coordinate: its arena, who is attached to it, and what that worker told us."""

    coordinate: str
    arena: Arena
    connection: Connection | None = None
    pid: int = -1
    attempt: int = 0
    finished: bool = False
    waiting: Waiting | None = None
    slots: list[Slot] = field(default_factory=list)
    tensors: Message = field(default_factory=dict)
    metadata: Message = field(default_factory=dict)

    def __post_init__(self) -> None:
        places = self.arena.shape.slots()
        self.slots = [Slot(p.index, p.kind, view) for p, view in zip(places, self.arena.slots, strict=True)]

    @property
    def shape(self) -> ArenaShape:
        return self.arena.shape

    def scan(self, held: Mapping[int, int]) -> list[Slot]:
        """Read the slots of an arena that another keeper left; returns the sealed ones, which are still to be verified.

        ``held`` (slot to step) are those that the worker is writing, or has written without an answer.
        """
        for slot in self.slots:
            state = state_of(slot.view)
            if state is State.SEALED:
                try:
                    header = read_header(slot.view)
                except RecordError:
                    slot.quarantine()
                    continue
                slot.state, slot.step, slot.sequence = state, header.step, header.sequence
            elif slot.index in held:
                slot.state, slot.step = State.WRITING, held[slot.index]
            elif state is not State.FREE:
                slot.free()
        return [slot for slot in self.slots if slot.sealed]

    def abandon(self) -> None:
        """The worker is gone: what it had not finished is void."""
        self.waiting = None
        for slot in self.slots:
            if slot.state is State.WRITING:
                slot.free()

    def discard(self, after_step: int) -> None:
        for slot in self.slots:
            if slot.sealed and slot.step > after_step:
                slot.free()
        self.abandon()

    def steps(self) -> set[int]:
        """Steps of which every kind of record is sealed here."""
        return set.intersection(
            *[{slot.step for slot in self.slots if slot.sealed and slot.kind is kind} for kind in CAPTURED]
        )

    def newest(self) -> int:
        return max(self.steps(), default=-1)

    def of_step(self, step: int) -> list[Slot]:
        return [slot for slot in self.slots if slot.sealed and slot.step == step]

    def choose(self, kinds: Iterable[Kind], committed: int, giving_way: Collection[int] = ()) -> list[Slot] | None:
        """A slot of each kind that may be overwritten, or None if not all can be had.

        Free ones first, then quarantined ones, then the oldest sealed below the committed step. At or above it nothing
        is touched, so that at every instant one complete step exists everywhere. A reader whose slots' ``id()`` are in
        ``giving_way`` does not count.
        """
        chosen = []
        for kind in kinds:
            usable = [s for s in self.slots
                      if s.kind is kind and s.users == (id(s) in giving_way) and _usable(s, committed)]  # fmt: skip
            if not usable:
                return None
            chosen.append(min(usable, key=_preference))
        return chosen

    def grant(self, slots: Sequence[Slot], step: int, sequence: int) -> None:
        for slot in slots:
            begin(slot.view)
            slot.state, slot.step, slot.sequence = State.WRITING, step, sequence

    def sealed(self, slot: Slot, step: int) -> None:
        """Note that a slot was sealed; it replaces an earlier record of the same step."""
        for other in self.slots:
            if other is not slot and other.kind is slot.kind and other.sealed and other.step == step:
                other.free()
        slot.state = State.SEALED


def _usable(slot: Slot, committed: int) -> bool:
    return slot.state in (State.FREE, State.QUARANTINED) or (slot.sealed and slot.step < committed)


def _preference(slot: Slot) -> tuple[int, int]:
    order = {State.FREE: 0, State.QUARANTINED: 1}
    return order.get(slot.state, 2), slot.step
