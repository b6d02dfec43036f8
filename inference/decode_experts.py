"""The experts seam of a decode step on a GPU: kernels that can be captured, and what the host does between them.

With all experts resident nothing asks the host: a table on the device says in which slot an expert is. Otherwise a call
is cut twice. At the first cut the host reads which experts were chosen, has the missing ones brought over the link or
computed by the CPU, and lets the GPU begin with those that are resident. At the second it keeps the books of the cache
while all three lanes work, waits for the CPU, and has the GPU go on with what the link brought. Partial results stay
apart until they are added in ascending order of expert, so with the link alone the bits are those of all resident.

When the host has read a call's experts, everything the GPU was given before is done. So a slot that was given up in an
earlier call is read by nobody, and the link may write to it without waiting.

Shapes: T rows, K choices of each, P = T*K pairs, L MoE layers counted from 0 by row, E experts, H hidden, I
intermediate.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from inference.cache import ExpertCache
from inference.cpu_lane import CpuLane
from inference.errors import InferenceError
from inference.experts import OffloadedExperts
from inference.graphs import StepGraph, Uncaptured
from inference.slot_kernels import combine, compute, publish
from inference.transfer import Transfer, TransferEngine
from moe.refs import ExpertRef

Split = Callable[[int], int]  # misses of a call -> how many of them to fetch


@dataclass
class DecodeCounts:
    """Experts of calls by what became of them, and the host's seconds: waiting for the GPU to say which experts it
    wants, giving out work, keeping books, waiting for the CPU lane."""

    calls: int = 0
    resident: int = 0
    fetched: int = 0
    computed: int = 0
    asked_s: float = 0.0
    given_s: float = 0.0
    books_s: float = 0.0
    lane_s: float = 0.0


class DecodeExperts:
    """``experts(x [T,H], index [T,K], weights [T,K]) -> [T,H]`` of all layers, for steps of one shape.

    Args:
        cache: holds the slots.
        graph: the step that the calls are part of.
        host: address of an expert's block in host memory, for the CPU lane.
        rows, choices: T and K of every call.
        split: how many of a call's misses the link brings; the lane computes the others. All, without a lane.

    Raises InferenceError if the cache has too few slots for a call.
    """

    def __init__(
        self,
        cache: ExpertCache,
        transfer: TransferEngine,
        rows: int,
        choices: int,
        *,
        graph: StepGraph | None = None,
        lane: CpuLane | None = None,
        host: Callable[[ExpertRef], int] | None = None,
        split: Split | None = None,
    ) -> None:
        assert lane is None or host is not None
        self.cache, self.transfer, self.graph, self.lane = cache, transfer, graph or Uncaptured(), lane
        self.counts = DecodeCounts()
        self._host, self._split = host, split
        self._layers = cache.store.layers
        layers, experts = len(self._layers), cache.store.shape.num_experts
        hidden, inner = cache.store.shape.hidden, cache.store.shape.intermediate
        self._shape, pairs = (rows, choices), rows * choices
        # What a call may bring at once; as many slots again hold what is being replaced.
        self._spare = min(pairs, experts)
        self.all_resident = cache.slots == cache.store.total
        if not self.all_resident and cache.slots < 2 * self._spare:
            raise InferenceError(
                f"{cache.slots} slots are too few to decode {rows} rows of {choices} experts in graphs: give at least "
                f"{2 * self._spare} (expert budget {2 * self._spare / cache.store.total:.3g})"
            )
        device = cache.gate_up_C2IH.device
        self._a_PI = torch.zeros(pairs, inner, device=device)
        self._y_PH = torch.zeros(pairs, hidden, device=device)
        self._table_L3E = torch.full((layers, 3, experts), -1, dtype=torch.int32, device=device)
        pin = device.type == "cuda"
        self._x_TH = torch.zeros(rows, hidden, pin_memory=pin)
        self._score_TK = torch.zeros(rows, choices, pin_memory=pin)
        self._expert_TK = torch.zeros(rows, choices, dtype=torch.int32, pin_memory=pin)
        self._cpu_y_PH = torch.zeros(pairs, hidden, pin_memory=pin)
        self._new_L3E = torch.full((layers, 3, experts), -1, dtype=torch.int32, pin_memory=pin)
        self._published = torch.cuda.Event() if pin else None
        self._np = tuple(t.numpy() for t in (self._x_TH, self._score_TK, self._expert_TK, self._cpu_y_PH))
        self._new = self._new_L3E.numpy()
        self._used_LE = np.zeros((layers, experts), dtype=np.int64)  # the call in which each was used last
        self._experts: list[int] = []  # of the call that is under way
        self._coming: list[Transfer] = []

    def fill(self) -> None:
        """Brings every expert, where all are to be resident, and tells the device where they are."""
        assert self.all_resident
        for row, layer in enumerate(self._layers):
            missing = [e for e in range(self._table_L3E.shape[2]) if self.cache.slot_LE[row, e] < 0]
            refs = [ExpertRef(layer, expert) for expert in self.cache.reserve(layer, missing)]
            self.transfer.wait([self.transfer.demand(ref, self.cache.block(ref)) for ref in refs])
            for ref in refs:
                self.cache.commit(ref)
        self._table_L3E[:, 0] = torch.from_numpy(self.cache.slot_LE).to(self._table_L3E.device)

    def run(self, module: OffloadedExperts, x_TH: Tensor, expert_TK: Tensor, score_TK: Tensor) -> Tensor:
        """A call of ``module``, as its executor."""
        assert expert_TK.shape == self._shape, (expert_TK.shape, self._shape)
        layer = module.layer
        row, weights = self.cache.row(layer), (self.cache.gate_up_C2IH, self.cache.down_CHI)
        out_TH = torch.empty_like(x_TH)
        table_3E = self._table_L3E[row]
        call = (x_TH, expert_TK, score_TK)
        if self.all_resident:
            compute(*call, table_3E[0], *weights, self._a_PI, self._y_PH)
            combine(self._y_PH, expert_TK, out_TH)
            return out_TH
        publish(*call, self._x_TH, self._expert_TK, self._score_TK)
        self.graph.cut(partial(self._give_out, row))
        table_3E.copy_(self._new_L3E[row], non_blocking=True)
        compute(*call, table_3E[0], *weights, self._a_PI, self._y_PH)
        self.graph.cut(partial(self._take_in, row))
        compute(*call, table_3E[1], *weights, self._a_PI, self._y_PH)
        combine(self._y_PH, expert_TK, out_TH, table_3E[2], self._cpu_y_PH)
        return out_TH

    def _give_out(self, row: int) -> None:
        """Which experts are wanted; who computes them where; the table for the kernels."""
        began = time.perf_counter()
        if self._published is not None:
            self._published.record()
            self._published.synchronize()
        asked = time.perf_counter()
        chosen_TK = self._np[2]
        experts = chosen_TK[0].tolist() if len(chosen_TK) == 1 else np.unique(chosen_TK).tolist()
        slots_E, table_3E = self.cache.slot_LE[row], self._new[row]
        missing = [expert for expert in experts if slots_E[expert] < 0]
        table_3E[0], table_3E[1], table_3E[2] = slots_E, -1, 0
        fetch, away = self._divided(row, missing)
        if away:
            table_3E[2, away] = 1
            self._submit(row, away)
        layer = self._layers[row]
        for expert in self.cache.reserve(layer, fetch):
            ref = ExpertRef(layer, expert)
            table_3E[1, expert] = slots_E[expert]
            self._coming.append(self.transfer.demand(ref, self.cache.block(ref)))
        self._experts = experts
        counts = self.counts
        counts.calls += 1
        counts.resident += len(experts) - len(missing)
        self.cache.counts.hits += len(experts) - len(missing)
        self.cache.counts.misses += len(missing)
        self.cache.counts.bytes_fetched += len(fetch) * self.cache.store.bytes_per_expert
        counts.fetched += len(fetch)
        counts.computed += len(away)
        counts.asked_s += asked - began
        counts.given_s += time.perf_counter() - asked

    def _divided(self, row: int, missing: list[int]) -> tuple[list[int], list[int]]:
        """(to fetch, for the CPU): the link takes those used last, which are likeliest to be wanted again."""
        count = len(missing)
        if self.lane is not None and self._split is not None:
            count = min(self._split(count), self.cache.free)
        assert count <= self.cache.free, (count, self.cache.free)
        if count == len(missing):
            return missing, []
        used_E = self._used_LE[row]
        missing.sort(key=lambda expert: (-int(used_E[expert]), expert))
        return missing[:count], missing[count:]

    def _submit(self, row: int, experts: Sequence[int]) -> None:
        assert self.lane is not None
        assert self._host is not None
        x_TH, score_TK, chosen_TK, y_PH = self._np
        pairs = [np.flatnonzero(chosen_TK.reshape(-1) == expert) for expert in experts]
        first = np.cumsum([0, *map(len, pairs)], dtype=np.int32)
        pair_P = np.concatenate(pairs).astype(np.int32)
        layer = self._layers[row]
        blocks = [self._host(ExpertRef(layer, expert)) for expert in experts]
        row_P = pair_P // np.int32(self._shape[1])
        self.lane.submit(blocks, first, row_P, pair_P, x_TH, score_TK.reshape(-1)[pair_P], y_PH)

    def _take_in(self, row: int) -> None:
        """Books while the lanes work, then the ends of the lanes."""
        began = time.perf_counter()
        for transfer in self._coming:
            self.cache.commit(transfer.ref)
        self.cache.note(self._layers[row], self._experts)
        self._used_LE[row, self._experts] = self.counts.calls
        self.cache.make_room(self._spare)
        booked = time.perf_counter()
        if self.lane is not None:
            self.lane.wait()
        self.transfer.wait(self._coming)
        self._coming.clear()
        self.counts.books_s += booked - began
        self.counts.lane_s += time.perf_counter() - booked
