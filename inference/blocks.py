"""Which blocks of the key-value cache belong to which sequence, and which a new prompt can share. No torch here.

A block holds the keys and values of ``block_size`` tokens in every layer. Full blocks stay after their sequence is gone
until their room is needed, so that a prompt which begins the same way need not compute them again. They form a tree: a
block is found by the block before it and by its own tokens, compared in full, so a reuse across different tokens is
impossible, not merely improbable. Every adapter has a tree of its own. Paging is vLLM's (Kwon et al. 2023).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

Tokens = tuple[int, ...]


@dataclass
class Table:
    """The blocks of one sequence, in the order of its tokens.

    Attributes:
        blocks: their numbers.
        reused: tokens that were there already when the sequence began.
        node: where the last of the sequence's known blocks stands in the tree.
        known: how many of its blocks, from the first, are in the tree.
    """

    blocks: list[int] = field(default_factory=list)
    reused: int = 0
    node: int = 0
    known: int = 0


@dataclass(frozen=True)
class _Place:
    """A block's place in the tree: ``key`` finds it, ``node`` is what its successors' keys name."""

    key: tuple[int, Tokens]
    node: int


class BlockPool:
    """All blocks of a cache: in use by one or more sequences, or free.

    Args:
        num_blocks: how many there are.
        block_size: tokens of each.
        reuse: whether prompts may share full blocks.
    """

    def __init__(self, num_blocks: int, block_size: int, *, reuse: bool = True) -> None:
        assert min(num_blocks, block_size) > 0, (num_blocks, block_size)
        self.num_blocks, self.block_size, self.reuse = num_blocks, block_size, reuse
        self._users = [0] * num_blocks
        # Free blocks, the next one to be taken first: those without contents, then those unused for longest.
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._places: dict[int, _Place] = {}
        self._found: dict[tuple[int, Tokens], int] = {}
        self._roots: dict[str | None, int] = {}
        self._nodes = 0

    @property
    def free(self) -> int:
        """Blocks in use by no sequence, whether or not they still hold what a prompt could share."""
        return len(self._free)

    @property
    def tokens(self) -> int:
        """What one sequence could have at most."""
        return self.num_blocks * self.block_size

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    def begin(self, adapter: str | None, tokens: Sequence[int], *, spare: int = 0, share: bool = True) -> Table | None:
        """A table with room for all ``tokens``, sharing as many full blocks as are known, if it may.

        None if fewer than ``spare`` blocks would be left. The last token is never shared: it has to be computed, for
        what comes after it.
        """
        table = Table(node=self._root(adapter))
        shareable = (len(tokens) - 1) // self.block_size if self.reuse and share else 0
        for index in range(shareable):
            block = self._found.get((table.node, self._slice(tokens, index)))
            if block is None:
                break
            table.blocks.append(block)
            table.node = self._places[block].node
        idle = sum(self._users[block] == 0 for block in table.blocks)
        if self.blocks_for(len(tokens)) - len(table.blocks) > self.free - idle - spare:
            return None
        for block in table.blocks:
            self._use(block)
        table.known = len(table.blocks)
        table.reused = table.known * self.block_size
        assert self.grow(table, len(tokens))
        return table

    def grow(self, table: Table, tokens: int) -> bool:
        """Makes room for ``tokens`` in all, or changes nothing and returns False."""
        wanted = self.blocks_for(tokens) - len(table.blocks)
        if wanted > self.free:
            return False
        for _ in range(wanted):
            block = next(iter(self._free))
            self._forget(block)
            self._use(block)
            table.blocks.append(block)
        return True

    def learn(self, table: Table, tokens: Sequence[int], computed: int) -> None:
        """The first ``computed`` of ``tokens`` are in the table's blocks now; full ones may be shared from here on."""
        if not self.reuse:
            return
        while table.known < computed // self.block_size:
            block, key = table.blocks[table.known], (table.node, self._slice(tokens, table.known))
            if (
                key not in self._found
            ):  # else another sequence computed the same meanwhile, and its block is the known one
                self._nodes += 1
                self._found[key] = block
                self._places[block] = _Place(key, self._nodes)
            table.node = self._places[self._found[key]].node
            table.known += 1

    def end(self, table: Table, *, forget: bool = False) -> list[int]:
        """Gives a table's blocks back; those that are free now are returned. The table is empty afterwards.

        ``forget``: what they hold is damaged, so none of the free ones may be shared any more.
        """
        freed = []
        # The last goes first, so that a block is never forgotten before those that can only be found through it.
        for block in reversed(table.blocks):
            self._users[block] -= 1
            assert self._users[block] >= 0, f"block {block} was given back twice"
            if self._users[block] == 0:
                freed.append(block)
                self._free[block] = None
                if forget:
                    self._forget(block)
                if block not in self._places:
                    self._free.move_to_end(block, last=False)
        table.blocks.clear()
        table.known = table.node = 0
        return freed

    def _root(self, adapter: str | None) -> int:
        if adapter not in self._roots:
            self._nodes += 1
            self._roots[adapter] = self._nodes
        return self._roots[adapter]

    def _slice(self, tokens: Sequence[int], index: int) -> Tokens:
        return tuple(tokens[index * self.block_size : (index + 1) * self.block_size])

    def _use(self, block: int) -> None:
        self._users[block] += 1
        self._free.pop(block, None)

    def _forget(self, block: int) -> None:
        """Its contents are about to be overwritten."""
        if (place := self._places.pop(block, None)) is not None:
            del self._found[place.key]
