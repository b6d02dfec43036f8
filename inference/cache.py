"""The resident experts: a fixed number of slots, each filled in two steps.

A slot is *reserved* for an expert, something fills it, then it is *committed*: from there on it is lent. Until then it
belongs to nobody: it is neither lent nor evicted, and *abandoned* if filling it fails. So nothing half-copied is lent.

Shapes: C slots, B elements of a block, L MoE layers, counted from 0 by *row*; E experts of each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from inference.expert_block import BlockViews, ExpertBlock
from inference.policies import LRU, Policy
from inference.store import ExpertStore
from moe.refs import ExpertRef


@dataclass
class CacheCounts:
    """What the cache did so far.

    One hit or miss per distinct expert of a layer call; what the CPU ``computed`` is neither. An expert that a prefetch
    was already bringing is a hit, and ``late``. Bytes of misses as stored in the files. Of the experts that were
    prefetched some were ``useful``, used before they were evicted, others ``wasted``; ``displaced`` experts were
    evicted for a prefetch, and ``regretted`` of them wanted again within a round.
    """

    hits: int = 0
    misses: int = 0
    bytes_fetched: int = 0
    computed: int = 0
    late: int = 0
    useful: int = 0
    wasted: int = 0
    displaced: int = 0
    regretted: int = 0


@dataclass(frozen=True)
class Loan:
    """An expert in its slot. Valid until the next group is asked for."""

    expert: int
    slot: int
    views: BlockViews

    @property
    def gate_up_2IH(self) -> Tensor:
        return self.views.parts[0]

    @property
    def down_HI(self) -> Tensor:
        return self.views.parts[1]


@dataclass(frozen=True)
class Wanted:
    """How the experts of one layer call are: in slots, on their way into one, or neither; each in the call's order."""

    resident: list[int]
    coming: list[int]
    missing: list[int]


class ExpertCache:
    """Keeps up to ``slots`` experts of the whole model resident, whatever their layer.

    Args:
        store: where the weights come from.
        slots: resident experts. With 0, every expert passes through one staging slot and none stays.
        policy: who is evicted; made for this store's layers and experts. LRU by default.
        poison: fill slots with NaN when they are given up, so that a stale read cannot go unnoticed.

    Attributes:
        blocks_CB: the slots; ``gate_up_C2IH`` and ``down_CHI`` are views of them at the blocks' stride.
        unfinished: what a step that is under way, or was interrupted, has to tidy up before the next one.
    """

    def __init__(
        self,
        store: ExpertStore,
        slots: int,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        policy: Policy | None = None,
        poison: bool = False,
    ) -> None:
        assert 0 <= slots <= store.total, (slots, store.total)
        shape = store.shape
        self.store = store
        self.slots = slots
        self.poison = poison
        self.counts = CacheCounts()
        self.layout = ExpertBlock(shape, dtype)
        self._row = {layer: row for row, layer in enumerate(store.layers)}
        self.policy: Policy = LRU(len(self._row), shape.num_experts) if policy is None else policy
        assert (self.policy.layers, self.policy.experts) == (len(self._row), shape.num_experts)
        allocated = max(slots, 1)
        self.blocks_CB = _allocate(allocated, self.layout, device)
        self.gate_up_C2IH, self.down_CHI, *_ = self.layout.stacked(self.blocks_CB)
        self._views = [self.layout.views(block_B) for block_B in self.blocks_CB]
        # The slot of each expert, -1 for none; the same as lists, of which one number is had sooner; whether committed.
        self.slot_LE = np.full((len(self._row), shape.num_experts), -1, dtype=np.int32)
        self.slots_of: list[list[int]] = self.slot_LE.tolist()
        # Made when first asked for; a call of the CPU takes hardly longer than making them.
        self._loans: list[list[Loan | None]] = [[None] * shape.num_experts for _ in self._row]
        self._resident_LE = np.zeros((len(self._row), shape.num_experts), dtype=bool)
        self._lent: tuple[int, np.ndarray] = (0, np.zeros(0, dtype=np.intp))  # of the current call: not evicted
        self.unfinished: Callable[[], None] | None = None
        self._untried: set[tuple[int, int]] = set()  # prefetched and not yet used
        self._ghosts: dict[tuple[int, int], int] = {}  # evicted for a prefetch, and when
        self._free = list(reversed(range(allocated)))
        if poison:
            self.blocks_CB.fill_(float("nan"))

    @property
    def resident(self) -> tuple[ExpertRef, ...]:
        layers = self.store.layers
        return tuple(ExpertRef(layers[row], int(e)) for row, e in zip(*np.nonzero(self._resident_LE), strict=True))

    def row(self, layer: int) -> int:
        return self._row[layer]

    def block(self, ref: ExpertRef) -> Tensor:
        """The slot that is reserved for an expert, or holds it."""
        slot = self.slots_of[self._row[ref.layer]][ref.expert]
        assert slot >= 0, ref
        return self.blocks_CB[slot]

    def use(self, layer: int, experts: Sequence[int]) -> Wanted:
        """:meth:`note` and :meth:`look`."""
        self.note(layer, experts)
        return self.look(layer, experts)

    def look(self, layer: int, experts: Sequence[int]) -> Wanted:
        """One layer call wants these distinct experts: none of them is evicted until the next call. Nothing is counted
        as hit or miss yet.
        """
        assert len(set(experts)) == len(experts), "experts must be distinct"
        row = self._row[layer]
        self._lend(row, experts)
        loans = self._loans[row]
        if all(loans[expert] is not None for expert in experts):
            return Wanted(list(experts), [], [])
        slots, resident_E, wanted = self.slots_of[row], self._resident_LE[row], Wanted([], [], [])
        for expert in experts:
            held = wanted.resident if resident_E[expert] else wanted.coming
            (held if slots[expert] >= 0 else wanted.missing).append(expert)
        return wanted

    def _lend(self, row: int, experts: Sequence[int]) -> np.ndarray:
        experts_N = np.array(experts, dtype=np.intp)
        self._lent = (row, experts_N)
        return experts_N

    def note(self, layer: int, experts: Sequence[int]) -> None:
        """The policy sees what a layer call wants. Once in each call; the call may be under way by then."""
        row = self._row[layer]
        self.policy.use(row, self._lend(row, experts))
        if self._untried or self._ghosts:
            self._judge(row, experts)

    def _judge(self, row: int, experts: Sequence[int]) -> None:
        """Count what prefetches turned out to be."""
        for expert in experts:
            if (row, expert) in self._untried:
                self._untried.discard((row, expert))
                self.counts.useful += 1
            gone = self._ghosts.pop((row, expert), None)
            if gone is not None and self.policy.round - gone <= 1:
                self.counts.regretted += 1

    def make_room(self, count: int) -> None:
        """Has the policy give up slots ahead of need until ``count`` are free, so that no demand waits for it."""
        for row, expert in self.victims(count - len(self._free)):
            self._evict(row, expert)

    def evictable(self) -> np.ndarray:
        """Which experts [L,E] may be evicted now."""
        evictable_LE = self._resident_LE.copy()
        row, experts_N = self._lent
        evictable_LE[row][experts_N] = False
        return evictable_LE

    def reserve(self, layer: int, experts: Sequence[int]) -> list[int]:
        """Slots for experts that have none, as many of them as there can be, in order: free ones, then those that the
        policy takes from others. Returns the experts that got one.
        """
        self.make_room(len(experts))
        got = list(experts[: len(self._free)])
        row = self._row[layer]
        slots, slot_E = self.slots_of[row], self.slot_LE[row]
        for expert in got:
            assert slots[expert] < 0, (layer, expert)
            slots[expert] = slot_E[expert] = self._free.pop()
        return got

    def victims(self, count: int) -> list[tuple[int, int]]:
        """(row, expert) of what would be evicted next, at most ``count`` of them, in that order."""
        if count <= 0:
            return []
        evictable_LE = self.evictable()
        if (count := min(count, np.count_nonzero(evictable_LE))) == 0:
            return []
        return [divmod(flat, self.policy.experts) for flat in self.policy.victims(evictable_LE, count).tolist()]

    @property
    def free(self) -> int:
        """Slots that hold nothing and are reserved for nothing."""
        return len(self._free)

    def worth_a_slot(self, layer: int, experts: Sequence[int], taken: int = 0) -> list[int]:
        """Of experts that have no slot, those that the policy would rather keep than what would make way, the
        worthiest first. Free slots go to anyone.

        Args:
            taken: slots that others get before them.
        """
        if not self.slots or not experts:
            return []
        free, gone = max(len(self._free) - taken, 0), max(taken - len(self._free), 0)
        scores_LE, row = self.policy.scores(), self._row[layer]
        ranked = sorted(experts, key=lambda expert: -scores_LE[row, expert])
        kept = ranked[:free]
        for expert, victim in zip(ranked[free:], self.victims(gone + len(ranked) - free)[gone:], strict=False):
            if scores_LE[row, expert] <= scores_LE[victim]:
                break
            kept.append(expert)
        return kept

    def reserve_ahead(self, ref: ExpertRef, victim: tuple[int, int] | None) -> None:
        """A slot for an expert that may be wanted: a free one, or that of ``victim``."""
        if victim is not None:
            self._ghosts[victim] = self.policy.round
            self.counts.displaced += 1
            self._evict(*victim)
        (_,) = self.reserve(ref.layer, [ref.expert])
        self._untried.add((self._row[ref.layer], ref.expert))

    def commit(self, ref: ExpertRef) -> None:
        """The expert is whole in its slot."""
        row = self._row[ref.layer]
        assert self.slots_of[row][ref.expert] >= 0, ref
        self._resident_LE[row, ref.expert] = True

    def abandon(self, ref: ExpertRef) -> None:
        """The slot was not filled: nobody has it."""
        row = self._row[ref.layer]
        assert not self._resident_LE[row, ref.expert], ref
        self._untried.discard((row, ref.expert))
        self._give_up(row, ref.expert)

    def abandon_all(self) -> None:
        """:meth:`abandon` every expert whose slot is reserved and not filled."""
        for row, expert in zip(*np.nonzero((self.slot_LE >= 0) & ~self._resident_LE), strict=True):
            self.abandon(ExpertRef(self.store.layers[int(row)], int(expert)))

    def loan(self, layer: int, expert: int) -> Loan:
        """A committed expert."""
        row = self._row[layer]
        loan = self._loans[row][expert]
        if loan is None:
            assert self.holds(layer, expert), (layer, expert)
            slot = self.slots_of[row][expert]
            loan = self._loans[row][expert] = Loan(expert, slot, self._views[slot])
        return loan

    def lend(self, layer: int, experts: Sequence[int]) -> Iterator[list[Loan]]:
        """Yields the distinct ``experts`` of one layer call in groups that fit the slots, each read when it is missing.

        Resident experts come first, so that fetching the others cannot push them out before they are used. While a
        group is lent none of it is evicted. The order of groups depends on residency: callers must not let it
        reach the result.
        """
        wanted = self.use(layer, experts)
        ordered = wanted.resident + wanted.missing
        size = max(self.slots, 1)
        for start in range(0, len(ordered), size):
            group = ordered[start : start + size]
            self.fill(layer, group)
            yield [self.loan(layer, expert) for expert in group]
            if self.slots == 0:
                self.release(layer)

    def fill(self, layer: int, group: list[int]) -> None:
        """Have all of a group that fits the slots resident, reading what is missing."""
        row = self._row[layer]
        self._lend(row, group)
        missing = [expert for expert in group if not self._resident_LE[row, expert]]
        self.counts.hits += len(group) - len(missing)
        if not missing:
            return
        got = self.reserve(layer, missing)
        assert got == missing, (layer, group, self.slots)
        for done, expert in enumerate(missing):
            ref = ExpertRef(layer, expert)
            try:
                self._read(ref)
            except BaseException:
                for left in missing[done:]:
                    self.abandon(ExpertRef(layer, left))
                raise
            self.commit(ref)

    def _read(self, ref: ExpertRef) -> None:
        block_B = self.block(ref)
        if block_B.device.type == "cpu":
            self.store.read(ref.layer, ref.expert, self.layout, block_B)
        else:
            host_B = torch.empty(block_B.shape, dtype=block_B.dtype)
            self.store.read(ref.layer, ref.expert, self.layout, host_B)
            block_B.copy_(host_B)
        self.count_miss()

    def count_miss(self) -> None:
        self.counts.misses += 1
        self.counts.bytes_fetched += self.store.bytes_per_expert

    def release(self, layer: int) -> None:
        """What was lent of this call has been used: it may be evicted, and is where nothing is kept."""
        self._lend(self._row[layer], [])
        if self.slots == 0:
            for row, expert in zip(*np.nonzero(self._resident_LE), strict=True):
                self._evict(int(row), int(expert))

    def holds(self, layer: int, expert: int) -> bool:
        """Whether an expert is resident."""
        return bool(self._resident_LE[self._row[layer], expert])

    def held(self, layer: int) -> int:
        """How many experts of a layer are resident."""
        return int(self._resident_LE[self._row[layer]].sum())

    def _evict(self, row: int, expert: int) -> None:
        assert self._resident_LE[row, expert], (row, expert)
        self._resident_LE[row, expert] = False
        self._loans[row][expert] = None
        if (row, expert) in self._untried:
            self._untried.discard((row, expert))
            self.counts.wasted += 1
        self._give_up(row, expert)

    def _give_up(self, row: int, expert: int) -> None:
        slot = self.slots_of[row][expert]
        self.slots_of[row][expert] = self.slot_LE[row, expert] = -1
        if self.poison:
            self.blocks_CB[slot].fill_(float("nan"))
        self._free.append(slot)


def _allocate(slots: int, layout: ExpertBlock, device: torch.device | str) -> Tensor:
    """Uninitialised slots [C,B], each beginning on a boundary of 64 bytes."""
    return torch.empty(slots, layout.elements, device=device, dtype=layout.dtype)
