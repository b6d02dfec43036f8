"""What the keeper knows about each worker's arena, and which slot may be overwritten when."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from checkpointing.carry import Selection
from checkpointing.keeper.loop import Connection
from checkpointing.keeper.protocol import Message
from checkpointing.records import Kind, RecordError, State, begin, parts_of, read_header, set_state, state_of
from checkpointing.schedule import WHOLE, Held, Rules, is_superseded, needed_for, newest_bases, restorable_steps
from checkpointing.slots import Arena, ArenaShape

_REMEMBERED = 8  # steps whose selection for the disk is kept


@dataclass
class Slot:
    """A slot's record as last known. ``users`` counts those who read it just now: persists and checks."""

    index: int
    kind: Kind
    view: memoryview
    state: State = State.FREE
    step: int = -1
    parts: tuple[int, ...] = ()
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
        self.state, self.step, self.parts, self.doomed = state, -1, (), False
        set_state(self.view, state)

    def release(self) -> None:
        self.users -= 1
        if self.doomed and not self.users:
            self.free()

    @property
    def sealed(self) -> bool:
        return self.state is State.SEALED and not self.doomed

    @property
    def held(self) -> Held:
        return Held(self.kind, self.step, self.parts)


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
    rules: Rules = WHOLE
    waiting: Waiting | None = None
    slots: list[Slot] = field(default_factory=list)
    tensors: Message = field(default_factory=dict)
    metadata: Message = field(default_factory=dict)
    partitions: str = ""
    former: Keep | None = None  # memory that this one replaces as soon as it holds a step
    for_disk: dict[int, list[int] | None] = field(default_factory=dict)  # step -> parts to write anew; None: all

    def __post_init__(self) -> None:
        places = self.arena.shape.slots()
        self.slots = [Slot(p.index, p.kind, view) for p, view in zip(places, self.arena.slots, strict=True)]

    @property
    def shape(self) -> ArenaShape:
        return self.arena.shape

    def note_for_disk(self, step: int, parts: list[int] | None) -> None:
        """The parts that a checkpoint of ``step`` is to hold anew, None for all."""
        self.for_disk = {**dict(list(self.for_disk.items())[-_REMEMBERED:]), step: parts}

    def unwritten(self) -> list[int]:
        """Steps that may be written if they are due, newest first."""
        return [step for step in sorted(self.for_disk, reverse=True) if self.for_disk[step] != []]

    def asked(self, step: int) -> None:
        """A write of ``step`` was asked for: no older one will be."""
        self.for_disk = {other: parts for other, parts in self.for_disk.items() if other > step}

    def selection(self, step: int, due: bool) -> Selection:
        """What a write of ``step`` holds anew in mode ``pec``: all that memory has, unless it is an ordinary one."""
        return Selection(self.rules.fresh, self.for_disk.get(step) if due else None)

    def scan(self, held: Mapping[int, int]) -> list[Slot]:
        """Read the slots of an arena that another keeper left; returns the sealed ones, which are still to be verified.

        ``held`` (slot to step) are those that the worker is writing, or has written without an answer.
        """
        for slot in self.slots:
            state = state_of(slot.view)
            if state is State.SEALED:
                try:
                    header = read_header(slot.view)
                    parts = parts_of(slot.view, header)
                except RecordError:
                    slot.quarantine()
                    continue
                slot.state, slot.step, slot.parts, slot.sequence = state, header.step, parts, header.sequence
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
        self.for_disk = {}
        self.abandon()

    def sealed_records(self) -> list[Held]:
        return [slot.held for slot in self.slots if slot.sealed]

    def steps(self) -> set[int]:
        """Steps that what is sealed here can restore."""
        return restorable_steps(self.sealed_records(), self.rules)

    def newest(self) -> int:
        return max(self.steps(), default=-1)

    def of_step(self, step: int) -> list[Slot]:
        """The slots that restoring a step reads."""
        needed = needed_for(self.sealed_records(), step, self.rules)
        return [slot for slot in self.slots if slot.sealed and slot.held in needed]

    def is_whole(self, step: int) -> bool:
        """Whether a step can be restored without a log: all its bases are of that very step, or need not be."""
        return step in self.steps() and (self.rules.lossy or all(slot.step == step for slot in self.of_step(step)))

    def choose(self, kinds: Sequence[Kind], committed: int, giving_way: Collection[int] = ()) -> list[Slot] | None:
        """Slots of these kinds, in their order, that may be overwritten; None if not all can be had.

        Free ones first, then quarantined ones, then the oldest that are superseded at the committed step. What a
        restore of that step or a later one could need is not touched, so that at every instant one complete step
        exists everywhere. A reader whose slots' ``id()`` are in ``giving_way`` does not count.
        """
        bases = newest_bases(self.sealed_records(), committed)

        def usable(slot: Slot) -> bool:
            if slot.users != (id(slot) in giving_way):
                return False
            if slot.state in (State.FREE, State.QUARANTINED):
                return True
            return slot.sealed and is_superseded(slot.held, committed, bases, self.rules)

        rest = sorted(filter(usable, self.slots), key=_preference)
        chosen = []
        for kind in kinds:
            slot = next((s for s in rest if s.kind is kind), None)
            if slot is None:
                return None
            rest.remove(slot)
            chosen.append(slot)
        return chosen

    def grant(self, slots: Sequence[Slot], step: int, sequence: int) -> None:
        for slot in slots:
            begin(slot.view)
            slot.state, slot.step, slot.parts, slot.sequence = State.WRITING, step, (), sequence

    def sealed(self, slot: Slot) -> None:
        """Note that a slot was sealed; it replaces an earlier record of the same."""
        slot.parts = parts_of(slot.view, read_header(slot.view))
        for other in self.slots:
            same = other.step == slot.step and other.kind is slot.kind and other.parts == slot.parts
            if same and other is not slot and other.sealed:
                other.free()
        slot.state = State.SEALED


def _preference(slot: Slot) -> tuple[int, int]:
    order = {State.FREE: 0, State.QUARANTINED: 1}
    return order.get(slot.state, 2), slot.step
