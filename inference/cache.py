"""The resident experts: a fixed number of slots, filled from the store on demand.

Shapes: C slots, I intermediate, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from inference.policies import LRU, Policy
from inference.store import ExpertStore
from moe.refs import ExpertRef

# MKL may round differently for operands of another alignment, so every slot starts on a 64-byte boundary.
_ALIGNMENT = 64


@dataclass
class CacheCounts:
    """What the cache did so far. One hit or miss per distinct expert of a layer call; bytes as stored in the file."""

    hits: int = 0
    misses: int = 0
    bytes_fetched: int = 0


@dataclass(frozen=True)
class Loan:
    """An expert in its slot, valid until the next group is asked for."""

    expert: int
    gate_up_2IH: Tensor
    down_HI: Tensor


class ExpertCache:
    """Keeps up to ``slots`` experts of the whole model resident, whatever their layer.

    Args:
        store: where the weights come from.
        slots: resident experts. With 0, every expert passes through one staging slot and none stays.
        policy: who is evicted; made for this store's layers and experts. LRU by default.
        poison: fill slots with NaN when they are given up, so that a stale read cannot go unnoticed.
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
        self._row = {layer: row for row, layer in enumerate(store.layers)}
        self.policy: Policy = LRU(len(self._row), shape.num_experts) if policy is None else policy
        assert (self.policy.layers, self.policy.experts) == (len(self._row), shape.num_experts)
        self._resident_LE = np.zeros((len(self._row), shape.num_experts), dtype=bool)
        allocated = max(slots, 1)
        self.gate_up_C2IH = _allocate(allocated, 2 * shape.intermediate, shape.hidden, device, dtype)
        self.down_CHI = _allocate(allocated, shape.hidden, shape.intermediate, device, dtype)
        self._slot: dict[ExpertRef, int] = {}
        self._free = list(reversed(range(allocated)))
        if poison:
            self.gate_up_C2IH.fill_(float("nan"))
            self.down_CHI.fill_(float("nan"))

    @property
    def resident(self) -> tuple[ExpertRef, ...]:
        return tuple(sorted(self._slot))

    @property
    def resident_bytes(self) -> int:
        """Bytes allocated for experts, the staging slot included."""
        return sum(t.untyped_storage().nbytes() for t in (self.gate_up_C2IH, self.down_CHI))

    def lend(self, layer: int, experts: Sequence[int]) -> Iterator[list[Loan]]:
        """Yields the distinct ``experts`` of one layer call in groups that fit the slots.

        Resident experts come first, so that fetching the others cannot push them out before they are used. While a
        group is lent none of it is evicted. The order of groups depends on residency: callers must not let it
        reach the result.
        """
        assert len(set(experts)) == len(experts), "experts must be distinct"
        self.policy.use(self._row[layer], experts)
        wanted = [ExpertRef(layer, expert) for expert in experts]
        ordered = [r for r in wanted if r in self._slot] + [r for r in wanted if r not in self._slot]
        size = max(self.slots, 1)
        for start in range(0, len(ordered), size):
            group = ordered[start : start + size]
            self._admit(group)
            yield [self._loan(ref) for ref in group]
            if self.slots == 0:
                self._evict(group[0])

    def _admit(self, group: Sequence[ExpertRef]) -> None:
        missing = [ref for ref in group if ref not in self._slot]
        self.counts.hits += len(group) - len(missing)
        if (needed := len(missing) - len(self._free)) > 0:
            evictable_LE = self._resident_LE.copy()
            evictable_LE[self._row[group[0].layer], [ref.expert for ref in group]] = False
            for flat in self.policy.victims(evictable_LE, needed):
                row, expert = divmod(int(flat), self.policy.experts)
                self._evict(ExpertRef(self.store.layers[row], expert))
        for ref in missing:
            self._fetch(ref)

    def _fetch(self, ref: ExpertRef) -> None:
        slot = self._free[-1]
        read = self.store.copy_into(ref.layer, ref.expert, self.gate_up_C2IH[slot], self.down_CHI[slot])
        # Only a complete copy is mapped: a failed read leaves the slot free.
        self._slot[ref] = self._free.pop()
        self._resident_LE[self._row[ref.layer], ref.expert] = True
        self.counts.misses += 1
        self.counts.bytes_fetched += read

    def _evict(self, ref: ExpertRef) -> None:
        slot = self._slot.pop(ref)
        self._resident_LE[self._row[ref.layer], ref.expert] = False
        if self.poison:
            self.gate_up_C2IH[slot].fill_(float("nan"))
            self.down_CHI[slot].fill_(float("nan"))
        self._free.append(slot)

    def _loan(self, ref: ExpertRef) -> Loan:
        slot = self._slot[ref]
        return Loan(ref.expert, self.gate_up_C2IH[slot], self.down_CHI[slot])


def _allocate(slots: int, rows: int, columns: int, device: torch.device | str, dtype: torch.dtype) -> Tensor:
    """[slots, rows, columns], one allocation, each slot contiguous and aligned."""
    per_line = _ALIGNMENT // dtype.itemsize
    stride = -(-rows * columns // per_line) * per_line
    return torch.empty(slots, stride, device=device, dtype=dtype)[:, : rows * columns].view(slots, rows, columns)
