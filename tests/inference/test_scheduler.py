"""The scheduler against a cache that remembers what every token was computed from.

Each place of the simulated cache holds (adapter, all tokens up to and with its own). A row may be computed only if all
places before it hold exactly its sequence's own history, and the next token is made from what the cache holds. So any
block that is leaked, overwritten or shared wrongly changes a token or fails at once.
"""

from __future__ import annotations

import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inference.blocks import BlockPool
from inference.scheduler import Scheduler, Sequence

VOCABULARY = 5  # few, so that prompts often begin alike


def following(history) -> int:
    return zlib.crc32(repr(history).encode()) % VOCABULARY


def alone(prompt, adapter, new_tokens) -> list[int]:
    tokens = list(prompt)
    for _ in range(new_tokens):
        tokens.append(following((adapter, tuple(tokens))))
    return tokens[len(prompt) :]


class Machine:
    """A scheduler, and a model of the cache in place of one of language."""

    def __init__(self, num_blocks, block_size, max_rows, max_sequences, reuse=True):
        self.pool = BlockPool(num_blocks, block_size, reuse=reuse)
        self.scheduler = Scheduler(self.pool, max_rows=max_rows, max_sequences=max_sequences)
        self.held = [[None] * block_size for _ in range(num_blocks)]
        self.wanted: dict[str, int] = {}
        self.done: dict[str, list[int]] = {}
        self.rows = 0

    def add(self, name, prompt, adapter, new_tokens) -> Sequence:
        sequence = Sequence(name, list(prompt), adapter)
        assert self.pool.blocks_for(len(prompt) + new_tokens) <= self.pool.num_blocks
        self.wanted[name] = new_tokens
        self.scheduler.add(sequence)
        return sequence

    def step(self) -> None:
        scheduler = self.scheduler
        chunks = scheduler.schedule()
        assert chunks, "work, and nothing is computed"
        assert sum(c.rows for c in chunks) <= scheduler.max_rows
        assert len({c.sequence.id for c in chunks}) == len(chunks)
        assert len(scheduler.running) <= scheduler.max_sequences
        self.check_blocks()
        for chunk in chunks:
            self._compute(chunk)
        for chunk in chunks:
            scheduler.computed(chunk)
            if chunk.last:
                self._append(chunk.sequence)

    def _compute(self, chunk) -> None:
        sequence, size = chunk.sequence, self.pool.block_size
        table = sequence.table.blocks
        assert chunk.rows > 0
        for position in range(chunk.start, chunk.start + chunk.rows):
            block, offset = table[position // size], position % size
            assert self.pool._users[block] == 1, "a shared block must not be written"
            self.held[block][offset] = (sequence.adapter, tuple(sequence.tokens[: position + 1]))
        for position in range(chunk.start + chunk.rows):
            found = self.held[table[position // size]][position % size]
            assert found == (sequence.adapter, tuple(sequence.tokens[: position + 1]))
        self.rows += chunk.rows

    def _append(self, sequence) -> None:
        last, size = len(sequence.tokens) - 1, self.pool.block_size
        sequence.tokens.append(following(self.held[sequence.table.blocks[last // size]][last % size]))
        if len(sequence.new_tokens) == self.wanted[sequence.id]:
            self.scheduler.remove(sequence)
            self.done[sequence.id] = sequence.new_tokens

    def check_blocks(self) -> None:
        """Every block is either free or in exactly the tables that its count says."""
        users = [0] * self.pool.num_blocks
        for sequence in self.scheduler.running:
            assert len(set(sequence.table.blocks)) == len(sequence.table.blocks)
            for block in sequence.table.blocks:
                users[block] += 1
        assert users == self.pool._users
        assert set(self.pool._free) == {block for block, count in enumerate(users) if count == 0}
        assert all(sequence.table is None for sequence in self.scheduler.waiting)


@st.composite
def workloads(draw):
    block_size = draw(st.integers(1, 4))
    num_blocks = draw(st.integers(2, 12))
    max_sequences = draw(st.integers(1, 5))
    room = num_blocks * block_size
    requests = []
    for _ in range(draw(st.integers(1, 8))):
        prompt = draw(st.lists(st.integers(0, 1), min_size=1, max_size=room - 1))
        new_tokens = draw(st.integers(1, room - len(prompt)))
        adapter = draw(st.sampled_from([None, "a", "b"]))
        arrival = draw(st.integers(0, 12))
        cancelled = draw(st.one_of(st.none(), st.integers(0, 20)))
        requests.append((prompt, adapter, new_tokens, arrival, cancelled))
    max_rows = draw(st.integers(max_sequences, max_sequences + 8))
    return (num_blocks, block_size, max_rows, max_sequences, draw(st.booleans())), requests


@settings(max_examples=300)
@given(workloads())
def test_every_request_ends_with_the_tokens_it_would_have_alone(workload):
    machine, requests = Machine(*workload[0]), workload[1]
    sequences, gone, now = {}, set(), 0
    while len(machine.done) + len(gone) < len(requests):
        for i, (prompt, adapter, new_tokens, arrival, cancelled) in enumerate(requests):
            if arrival == now:
                sequences[str(i)] = machine.add(str(i), prompt, adapter, new_tokens)
            if cancelled is not None and arrival + cancelled == now and str(i) not in machine.done:
                machine.scheduler.remove(sequences[str(i)])
                gone.add(str(i))
        machine.check_blocks()
        if busy(machine.scheduler):
            machine.step()
        now += 1
        assert now < 5000, "it never ends"
    for i, (prompt, adapter, new_tokens, *_) in enumerate(requests):
        if str(i) not in gone:
            assert machine.done[str(i)] == alone(prompt, adapter, new_tokens)
    machine.check_blocks()
    assert machine.pool.free == machine.pool.num_blocks, "a block leaked"
    assert not busy(machine.scheduler)


def busy(scheduler) -> bool:
    return bool(scheduler.waiting or scheduler.running)


def run(machine) -> None:
    while busy(machine.scheduler):
        machine.step()


def test_a_prompt_that_begins_alike_is_computed_once():
    machine = Machine(num_blocks=16, block_size=4, max_rows=64, max_sequences=4)
    prompt = [0, 1, 2, 3] * 4
    machine.add("first", prompt, None, 1)
    run(machine)
    assert machine.rows == 16
    second = machine.add("second", prompt, None, 1)
    third = machine.add("third", [*prompt[:9], 4], None, 1)
    other = machine.add("other", prompt, "a", 1)
    run(machine)
    assert (second.reused, third.reused, other.reused) == (12, 8, 0), "the last token is always computed"
    assert machine.rows == 16 + 4 + 2 + 16


@pytest.mark.parametrize("max_rows", [64, 5])
def test_prompts_that_arrive_together_are_computed_once_too(max_rows):
    machine = Machine(num_blocks=64, block_size=4, max_rows=max_rows, max_sequences=5)
    for name in ("first", "second", "third"):
        machine.add(name, [*([0, 1, 2, 3] * 4), 4], None, 2)
    machine.add("other", [0, 1, 2, 3, 0], "a", 1)
    run(machine)
    assert machine.rows == 17 + 1 + 1 + 5 + 3, "one prompt, two last tokens, another adapter's, three that follow"


def test_what_was_generated_is_shared_too():
    machine = Machine(num_blocks=16, block_size=2, max_rows=64, max_sequences=4)
    first = machine.add("first", [0, 1, 2], None, 6)
    run(machine)
    turn = machine.add("turn", [*first.tokens, 3], None, 1)  # as the next turn of a chat does
    run(machine)
    assert turn.reused == 8, "the last token of an answer is never computed, all before it are"


def test_without_reuse_nothing_is_shared():
    machine = Machine(num_blocks=16, block_size=2, max_rows=64, max_sequences=4, reuse=False)
    for name in ("first", "second"):
        machine.add(name, [0] * 8, None, 1)
        run(machine)
    assert machine.rows == 16


def test_generating_goes_on_while_a_long_prompt_is_computed_in_chunks():
    machine = Machine(num_blocks=64, block_size=4, max_rows=8, max_sequences=4)
    short = machine.add("short", [0], None, 20)
    machine.step()
    machine.add("long", list(range(5)) * 10, None, 1)
    made = []
    while "long" not in machine.done:
        before = len(short.new_tokens)
        machine.step()
        made.append(len(short.new_tokens) - before)
    assert made == [1] * 8, "50 tokens at 7 a step, beside one token a step"


def test_the_youngest_gives_up_and_computes_again():
    machine = Machine(num_blocks=6, block_size=2, max_rows=32, max_sequences=2, reuse=False)
    old, young = machine.add("old", [0, 1], None, 9), machine.add("young", [1, 0], None, 9)
    run(machine)
    assert machine.scheduler.preemptions > 0
    assert list(machine.done) == ["old", "young"]
    assert machine.rows > 2 * (2 + 8), "the young one's tokens were computed twice"
    assert young.new_tokens == alone([1, 0], None, 9)
    assert old.new_tokens == alone([0, 1], None, 9)


def test_who_gave_up_goes_on_before_later_arrivals():
    machine = Machine(num_blocks=7, block_size=2, max_rows=32, max_sequences=2, reuse=False)
    machine.add("old", [0, 1], None, 11)
    young, late = machine.add("young", [1, 0] * 3, None, 6), machine.add("late", [1, 1], None, 1)
    while "young" not in machine.done:
        machine.step()
        assert late.id not in machine.done or young.table is not None or young.id in machine.done
    assert machine.scheduler.preemptions > 0


def test_nobody_is_admitted_who_would_give_up_at_once():
    machine = Machine(num_blocks=2, block_size=2, max_rows=8, max_sequences=2)
    machine.add("old", [0, 1], None, 2)
    machine.add("young", [1, 0], None, 2)
    run(machine)
    assert machine.scheduler.preemptions == 0


def test_a_prompt_is_forgotten_from_its_end():
    machine = Machine(num_blocks=4, block_size=2, max_rows=32, max_sequences=1)
    machine.add("long", [0, 1, 2, 3, 4, 0, 1], None, 1)
    run(machine)
    machine.add("other", [1, 1, 1], None, 1)
    run(machine)
    again = machine.add("again", [0, 1, 2, 3, 4, 0, 1], None, 1)
    run(machine)
    assert again.reused == 4, "one block without contents, and the last of the three others, were taken"


def test_room_is_taken_from_the_prompts_unused_for_longest():
    machine = Machine(num_blocks=4, block_size=2, max_rows=32, max_sequences=1)
    for name, prompt in (("a", [0, 0, 4]), ("b", [1, 1, 4]), ("c", [2, 2, 4]), ("d", [3, 3, 4, 4, 4])):
        machine.add(name, prompt, None, 1)
        run(machine)
    kept = {}
    for name, prompt in (("c2", [2, 2, 0]), ("a2", [0, 0, 0])):
        kept[name] = machine.add(name, prompt, None, 1)
        run(machine)
    assert kept["c2"].reused == 2
    assert kept["a2"].reused == 0


@pytest.mark.parametrize("tokens", [[0, 1], [0, 1, 0, 1]])
def test_a_full_pool_admits_nobody(tokens):
    pool = BlockPool(num_blocks=2, block_size=2)
    table = pool.begin(None, [0, 0, 0, 0])
    assert pool.begin(None, tokens) is None
    pool.end(table)
    assert pool.free == 2
