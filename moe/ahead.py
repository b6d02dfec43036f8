"""How many rows leave before anybody has counted them: as many as the call before had, and some more.

Rows that wait for this call's counts stand still while the host waits for these, and leave late. Two ranks both know
from the call before what went each way, and so agree on a number without a message: that many rows leave at once, be
they all of this call's, with undefined ones behind them. If there are more, the rest follows when counts are known. So
the number decides when rows arrive, and nothing else.

With more ranks fewer of the tokens go to each, what went to each differs more, and rows for nothing would cost more.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist

_RANKS = 2
_SPARE = 64  # one row for nothing for so many; routing hardly changes from layer to layer and from step to step


@dataclass
class Expected:
    """Of one group, as one of its ranks knows it. All ranks must note the same calls in the same order.

    Attributes:
        rows: that leave at once, from either rank; zero if none may.
    """

    rank: int
    ranks: int
    rows: int = 0

    def note(self, sent: Sequence[int], received: Sequence[int]) -> None:
        """What this call sends to and receives from every rank."""
        if self.ranks == _RANKS:
            most = max(sum(sent), sum(received))
            self.rows = most + -(-most // _SPARE)

    def splits(self) -> list[int]:
        """:attr:`rows` to, or from, the other rank."""
        return [0 if other == self.rank else self.rows for other in range(self.ranks)]


@functools.cache
def expected(group: dist.ProcessGroup) -> Expected:
    return Expected(dist.get_rank(group), dist.get_world_size(group))
