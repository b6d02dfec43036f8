"""What the last call of a layer sent and computed: so the next one need not wait until this call's counts are known.

The host must wait for counts before it can make memory for what they count, and all that it queues later comes late. So
memory is made for as many as the last call had and some more, and the work is queued at once. When counts are known,
undefined rows at the end are cut off; if there are more, the work is done again, or what is left follows. Numbers here
decide when something happens and how large memory is, never a result.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist

_SPARE = 16  # one place for nothing for so many: batches differ
# For rows that are sent, which cost more, and differ less: with eight choices nearly every token has some elsewhere.
_SPARE_SENT = 64
_AHEAD_RANKS = 2


@dataclass
class Traffic:
    """Of one layer, as one of the group's ranks knows it.

    Attributes:
        pairs: places for own tokens' pairs with local experts; zero before the first call, as all below.
        leaving: places for rows that leave.
        ahead: rows that leave before anybody has counted them, from either of two ranks. Both know what went each way
            in the last call, and so agree on the number without a message, as long as they make the same calls. With
            more ranks what goes to each differs more, and rows for nothing would cost more.
    """

    group: dist.ProcessGroup
    rank: int
    ranks: int
    pairs: int = 0
    leaving: int = 0
    ahead: int = 0

    def note(self, pairs: int, sent: Sequence[int], received: Sequence[int]) -> None:
        """What this call had: own pairs, and rows to and from every rank."""
        self.pairs, self.leaving = _more(pairs, _SPARE), _more(sum(sent), _SPARE)
        if self.ranks == _AHEAD_RANKS:
            self.ahead = _more(max(sum(sent), sum(received)), _SPARE_SENT)

    def splits(self) -> list[int]:
        """:attr:`ahead` to, or from, the other rank."""
        return [0 if other == self.rank else self.ahead for other in range(self.ranks)]


def _more(number: int, spare: int) -> int:
    return number + -(-number // spare)


@functools.cache
def traffic_of(group: dist.ProcessGroup, layer: int) -> Traffic:
    return Traffic(group, dist.get_rank(group), dist.get_world_size(group))
