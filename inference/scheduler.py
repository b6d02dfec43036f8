"""Which tokens of which sequences the next step computes. No torch here.

Continuous batching: sequences join and leave between any two steps (Orca, Yu et al. 2022). A step has a fixed number of
rows at most; sequences that are generating take one each, and what is left goes to chunks of prompts (Sarathi-Serve,
Agrawal et al. 2024), so a long prompt delays nobody by more than a step. First come, first served; when the cache is
full, the youngest sequence gives up its blocks and later computes its tokens again. The oldest always goes on, so
every sequence that fits the cache alone ends.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from inference.blocks import BlockPool, Table


@dataclass(eq=False)
class Sequence:
    """A prompt and what was generated so far.

    Attributes:
        tokens: both, one after the other.
        table: blocks of the cache; None while it waits.
        computed: tokens whose keys and values are in the cache.
        reused: tokens of the prompt that were in the cache when the sequence was admitted first.
    """

    id: str
    tokens: list[int]
    adapter: str | None = None
    table: Table | None = None
    computed: int = 0
    reused: int = 0
    prompt: int = field(init=False)

    def __post_init__(self) -> None:
        self.prompt = len(self.tokens)

    @property
    def new_tokens(self) -> list[int]:
        return self.tokens[self.prompt :]


@dataclass(frozen=True)
class Chunk:
    """``rows`` tokens of a sequence, from ``start`` on. ``last``: what comes next is decided by the last of them."""

    sequence: Sequence
    start: int
    rows: int
    last: bool


class Scheduler:
    """Sequences that wait, and those that have blocks and are computed.

    Args:
        pool: the blocks.
        max_rows: tokens of one step, at least ``max_sequences``.
        max_sequences: sequences that are computed at once.
    """

    def __init__(self, pool: BlockPool, *, max_rows: int, max_sequences: int) -> None:
        assert max_rows >= max_sequences > 0, (max_rows, max_sequences)
        self.pool, self.max_rows, self.max_sequences = pool, max_rows, max_sequences
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # oldest first, and all of them older than all that wait
        self.preemptions = 0

    def add(self, sequence: Sequence) -> None:
        """The caller has made sure that its tokens, with all that may be generated, fit the pool."""
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence, *, forget: bool = False) -> list[int]:
        """It ended or is not wanted any more, whether it waits or runs; see :meth:`BlockPool.end`."""
        if sequence.table is None:
            self.waiting.remove(sequence)
            return []
        self.running.remove(sequence)
        return self._release(sequence, forget=forget)

    def schedule(self) -> list[Chunk]:
        """The next step. Every sequence has blocks for what is computed; those that generate come first."""
        chunks = [self._chunk(sequence, 1) for sequence in self._generating()]
        left = self.max_rows - len(chunks)
        for sequence in self.running:
            if left and (missing := len(sequence.tokens) - sequence.computed) > 1:
                chunks.append(self._chunk(sequence, min(missing, left)))
                left -= chunks[-1].rows
        while left and self.waiting and len(self.running) < self.max_sequences:
            if (joined := self._admit()) is None:
                break
            chunks.append(self._chunk(joined, min(len(joined.tokens) - joined.computed, left)))
            left -= chunks[-1].rows
        return chunks

    def computed(self, chunk: Chunk) -> None:
        """The step computed this chunk."""
        sequence = chunk.sequence
        assert sequence.table is not None
        assert sequence.computed == chunk.start
        sequence.computed += chunk.rows
        self.pool.learn(sequence.table, sequence.tokens, sequence.computed)

    def _generating(self) -> list[Sequence]:
        """Those that lack one token's keys and values only, with room for it; the youngest may have to give up."""
        chosen: list[Sequence] = []
        for sequence in list(self.running):
            if sequence.table is None or len(sequence.tokens) - sequence.computed != 1:
                continue
            while not self.pool.grow(sequence.table, len(sequence.tokens)):
                youngest = self.running[-1]
                self._preempt(youngest)
                if youngest is sequence:
                    break
            else:
                chosen.append(sequence)
        return chosen

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._release(sequence)
        self.waiting.appendleft(sequence)
        self.preemptions += 1

    def _admit(self) -> Sequence | None:
        sequence = self.waiting[0]
        if self.pool.reuse and any(self._worth_waiting_for(other, sequence) for other in self.running):
            return None
        # Each that runs may need a block soon; without these to spare, one that joins would be the first to give up.
        table = self.pool.begin(sequence.adapter, sequence.tokens, spare=len(self.running))
        if table is None:
            return None
        self.waiting.popleft()
        self.running.append(sequence)
        sequence.table, sequence.computed = table, table.reused
        if len(sequence.tokens) == sequence.prompt:
            sequence.reused = table.reused
        return sequence

    def _worth_waiting_for(self, other: Sequence, sequence: Sequence) -> bool:
        """Whether ``other`` is about to compute blocks of its prompt that ``sequence`` could share afterwards."""
        size = self.pool.block_size
        end = min(other.prompt, len(sequence.tokens) - 1) // size * size
        begin = other.computed // size * size
        if other.adapter != sequence.adapter or begin >= end:
            return False
        first = begin + size
        return other.tokens[:first] == sequence.tokens[:first]

    def _release(self, sequence: Sequence, *, forget: bool = False) -> list[int]:
        assert sequence.table is not None
        freed = self.pool.end(sequence.table, forget=forget)
        sequence.table, sequence.computed = None, 0
        return freed

    @staticmethod
    def _chunk(sequence: Sequence, rows: int) -> Chunk:
        return Chunk(sequence, sequence.computed, rows, sequence.computed + rows == len(sequence.tokens))
