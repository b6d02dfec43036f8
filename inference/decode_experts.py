"""The experts seam of a decode step on a GPU: kernels that can be captured, and what the host does between them.

With all experts resident nothing asks the host: a table on the device says in which slot an expert is. Otherwise a call
is cut twice. At the first cut the host reads which experts were chosen, has the missing ones computed by the CPU
or brought over the link, in this order and before it does anything else, and lets the GPU begin with those that are
resident. At the second it has the GPU go on with what the link brings, as soon as that is there, and with everything up
to the next call, which the GPU begins once the CPU's threads have counted this call as done: nothing is left to launch
then. Meanwhile the host keeps the books of the cache, then computes with those threads. Partial results stay apart
until they are added in ascending order of expert, so with the link alone the bits are those of all resident.

When the host has read a call's experts, everything the GPU was given before is done. So a slot that was given up in an
earlier call is read by nobody, and the link may write to it without waiting.

Shapes: T rows, K choices of each, P = T*K pairs, L MoE layers counted from 0 by row, E experts, H hidden, I
intermediate.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from inference.cache import ExpertCache
from inference.cpu_lane import CpuLane, LaneCall, LaneHung
from inference.errors import InferenceError
from inference.experts import OffloadedExperts
from inference.graphs import StepGraph, Uncaptured
from inference.slot_kernels import adopt, await_host, combine, compute, publish
from inference.transfer import Transfer, TransferEngine
from moe.refs import ExpertRef


class Split(Protocol):
    """Divides a call's misses between the lanes. ``most``: that the link brings for one call, whatever it misses."""

    most: int

    def __call__(self, misses: int) -> tuple[int, int]:
        """How many the link brings, and how many of the others it brings behind those, for later."""


class HostBlocks(Protocol):
    """Experts in host memory, as :class:`inference.banks.ExpertBanks` keeps them when all are ready."""

    def address(self, ref: ExpertRef) -> int:
        """Where its block begins."""

    def packed(self, layer: int) -> bool:
        """Whether the blocks of a layer are packed ones."""


@dataclass
class DecodeCounts:
    """Experts of calls by what became of them, and where the host's seconds went.

    Attributes:
        behind: of those that the CPU ``computed``, the ones that the link brought as well.
        asked_s: waiting for the GPU to say which experts it wants.
        given_s, books_s: giving out work, keeping the cache's books.
        lane_s: waiting for the CPU lane.
    """

    calls: int = 0
    resident: int = 0
    fetched: int = 0
    computed: int = 0
    behind: int = 0
    asked_s: float = 0.0
    given_s: float = 0.0
    books_s: float = 0.0
    lane_s: float = 0.0


class _Divided(NamedTuple):
    """The distinct experts of a call; of those that are missing the ones to fetch and those for the CPU; and how many
    of the latter the link brings as well."""

    experts: Sequence[int]
    fetch: list[int]
    away: list[int]
    also: int

    @property
    def behind(self) -> list[int]:
        return self.away[: self.also]


class HostCount:
    """Work of the host's that a stream waits for without the host giving it anything more: it counts what is done.

    Attributes:
        done_1: the count, in memory that the device reads; what was done is in pinned memory before it goes up.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._counted_1 = torch.zeros(1, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._awaited_1 = torch.ones(1, dtype=torch.int64, device=device)
        self.done_1 = self._counted_1.numpy()

    def wait(self) -> None:
        """What the stream is given from here on begins when one more is done. Fit for capture."""
        await_host(self._counted_1, self._awaited_1)

    def give_up(self) -> None:
        """Nothing more will be done: what waits goes on, and counting begins anew."""
        self.done_1[0] = 1 << 62
        with suppress(RuntimeError), torch.inference_mode():  # CUDA's, of which whoever comes next hears again
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            self._awaited_1.fill_(1)
            self.done_1[0] = 0  # last: a number that is too high lets everybody pass, one that is too low nobody


class DecodeExperts:
    """``experts(x [T,H], index [T,K], weights [T,K]) -> [T,H]`` of all layers, for steps of one shape.

    Args:
        cache: holds the slots.
        graph: the step that the calls are part of.
        host: where experts lie in host memory, for the CPU lane.
        rows, choices: T and K of every call.
        split: how many of a call's misses the link brings, the lane computes the others; and how many of these the
            link brings behind them, so that they are resident the next time. Without a lane all are fetched.

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
        host: HostBlocks | None = None,
        split: Split | None = None,
    ) -> None:
        assert lane is None or host is not None
        assert split is None or lane is not None, "who would compute what is not fetched?"
        self.cache, self.transfer, self.graph, self.lane = cache, transfer, graph or Uncaptured(), lane
        self.counts, self._split = DecodeCounts(), split
        self._layers = cache.store.layers
        shape = cache.store.shape
        layers, experts, hidden, inner = len(self._layers), shape.num_experts, shape.hidden, shape.intermediate
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
        self._number = device.index if device.index is not None or not pin else torch.cuda.current_device()
        self._chosen_P = self._expert_TK.view(-1).numpy()
        # Of each layer: where experts are, where those that come will be, which ones the CPU has.
        self._tables = [tuple(table_3E) for table_3E in self._new_L3E.numpy()]
        self._ended = HostCount(device)  # calls of the lane
        # The host's part of a call is on the way of everything else, so it works on lists, which are made once.
        self._refs = [[ExpertRef(layer, expert) for expert in range(experts)] for layer in self._layers]
        self._used = [[0] * experts for _ in self._layers]  # the call in which each was used last
        if lane is not None and host is not None:
            self._addresses = [[host.address(ref) for ref in refs] for refs in self._refs]
            self._packed = [host.packed(layer) for layer in self._layers]
            arrays = (t.numpy() for t in (self._x_TH, self._score_TK, self._cpu_y_PH))
            count = self._ended.done_1
            self._call = LaneCall(*arrays, experts=self._spare, reads=partial(_blocks, transfer), count=count)
        self._blocks = cache.blocks_CB.unbind(0)
        self._room = self._spare
        if split is not None:
            self._room = min(self._spare, split.most)
        self._calls, self._under_way = 0, _Divided([], [], [], 0)
        self._coming: list[Transfer] = []
        self._behind: list[Transfer] = []  # brought for later, not yet waited for

    def fill(self) -> None:
        """Brings every expert, where all are to be resident, and tells the device where they are.

        Raises InferenceError if one cannot be read or copied, and from then on in every call, as an executor does.
        """
        assert self.all_resident
        self.transfer.check()
        self.transfer.link.fence()  # slots may still be poisoned by what the device was asked to do
        try:
            for row, layer in enumerate(self._layers):
                missing = [e for e in range(self._table_L3E.shape[2]) if self.cache.slot_LE[row, e] < 0]
                refs = [ExpertRef(layer, expert) for expert in self.cache.reserve(layer, missing)]
                self.transfer.wait([self.transfer.demand(ref, self.cache.block(ref)) for ref in refs])
                for ref in refs:
                    self.cache.commit(ref)
        except BaseException as error:
            self.break_off(error)
            raise
        self._table_L3E[:, 0] = torch.from_numpy(self.cache.slot_LE).to(self._table_L3E.device)

    def break_off(self, error: BaseException) -> None:
        """A step was broken off: what was on its way is nobody's, and behind a failed transfer there is no other step.

        A copy that is under way may still reach a slot that is free now; the next one into that slot is behind it.
        """
        if isinstance(error, InferenceError):
            self.transfer.failure = self.transfer.failure or error
        self._tidy_up()

    def _tidy_up(self) -> None:
        """May itself be interrupted: the next step, of any shape, does it again then."""
        if self.lane is not None:
            with suppress(LaneHung):
                self.lane.wait()
            self._ended.give_up()
        self._coming.clear()
        self._behind.clear()
        self.cache.abandon_all()
        self.cache.unfinished = None

    def begin(self) -> None:
        """A step begins: what another lent from the slots is done with, and there must be room for the first call.

        Raises InferenceError if a transfer failed before.
        """
        self.transfer.check()
        if self.cache.unfinished is not None:
            self.cache.unfinished()
        self.cache.unfinished = self._tidy_up
        if not self.all_resident:
            self.cache.release(self._layers[0])
            self.cache.make_room(self._room)

    def finish(self) -> None:
        """A step ends: what was brought for later is waited for on the device, so that another may use the slots."""
        self._settle(self._behind)
        self.cache.unfinished = None

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
        adopt(self._new_L3E[row], table_3E)
        compute(*call, table_3E[0], *weights, self._a_PI, self._y_PH)
        self.graph.cut(self._await_link)
        compute(*call, table_3E[1], *weights, self._a_PI, self._y_PH)
        self.graph.meanwhile(partial(self._take_in, row))
        if self.lane is not None:
            self._ended.wait()
        combine(self._y_PH, expert_TK, out_TH, table_3E[2], self._cpu_y_PH)
        return out_TH

    def _give_out(self, row: int) -> None:
        """Which experts are wanted; who computes them where; the table for the kernels."""
        began = time.perf_counter()
        if self._published is not None:
            self._published.record(torch.cuda.current_stream(self._number))
            self._published.synchronize()
        asked = time.perf_counter()
        chosen: list[int] = self._chosen_P.tolist()
        work = self._under_way = self._divided(row, chosen)
        if work.away:  # first, since the lane is what ends last
            self._submit(row, work.away, chosen)
        elif self.lane is not None:
            self._ended.done_1[0] += 1
        resident_E, coming_E, away_E = self._tables[row]
        resident_E[:] = self.cache.slot_LE[row]
        self._settle(self._behind)
        if work.fetch:
            self._coming += self._bring(row, work.fetch)
        if work.also:
            self._behind += self._bring(row, work.behind)
        coming_E.fill(-1)
        away_E.fill(0)
        slots = self.cache.slots_of[row]
        for expert in work.fetch:
            coming_E[expert] = slots[expert]
        for expert in work.away:
            away_E[expert] = 1
        self.counts.asked_s += asked - began
        self.counts.given_s += time.perf_counter() - asked

    def _divided(self, row: int, chosen: Sequence[int]) -> _Divided:
        """First what was used last: likeliest to be wanted again."""
        slots, experts = self.cache.slots_of[row], chosen
        if self._shape[0] > 1:
            experts = list(dict.fromkeys(chosen))
        missing = [expert for expert in experts if slots[expert] < 0]
        fetch, behind = len(missing), 0
        if self._split is not None:
            fetch, behind = self._split(fetch)
            fetch = min(fetch, self.cache.free)
            behind = min(behind, self.cache.free - fetch)
        assert fetch <= self.cache.free, (fetch, self.cache.free)
        missing.sort(key=self._used[row].__getitem__, reverse=True)
        return _Divided(experts, missing[:fetch], missing[fetch:], behind)

    def _submit(self, row: int, experts: Sequence[int], chosen: Sequence[int]) -> None:
        assert self.lane is not None
        addresses = self._addresses[row]
        if self._shape[0] == 1:
            first, pairs = range(len(experts) + 1), [chosen.index(expert) for expert in experts]
        else:
            first, pairs = [0], []
            for expert in experts:
                pairs += [pair for pair, other in enumerate(chosen) if other == expert]
                first.append(len(pairs))
        what = (self._layers[row], experts)
        blocks = [addresses[expert] for expert in experts]
        self.lane.submit(self._call, blocks, first, pairs, what, packed=self._packed[row])

    def _bring(self, row: int, wanted: list[int]) -> list[Transfer]:
        got = self.cache.reserve(self._layers[row], wanted)
        assert got == wanted, (got, wanted)
        refs, slots = self._refs[row], self.cache.slots_of[row]
        return self.transfer.demand_all([(refs[expert], self._blocks[slots[expert]]) for expert in wanted])

    def _settle(self, transfers: list[Transfer]) -> None:
        """What the GPU is given from here on finds these experts in their slots."""
        if transfers:
            self.transfer.wait(transfers)
            for transfer in transfers:
                self.cache.commit(transfer.ref)
            transfers.clear()

    def _await_link(self) -> None:
        self._settle(self._coming)

    def _take_in(self, row: int) -> None:
        """Books while the lanes work, then the end of the CPU's."""
        began = time.perf_counter()
        self._book(row, self._under_way)
        booked = time.perf_counter()
        if self.lane is not None:
            self.lane.wait()
        self.counts.books_s += booked - began
        self.counts.lane_s += time.perf_counter() - booked

    def _book(self, row: int, work: _Divided) -> None:
        self.cache.note(self._layers[row], sorted(work.experts))
        self._calls += 1
        used = self._used[row]
        for expert in work.experts:
            used[expert] = self._calls
        self.cache.make_room(self._room)
        fetched, computed = len(work.fetch), len(work.away)
        resident = len(work.experts) - fetched - computed
        cache, counts = self.cache.counts, self.counts
        cache.hits += resident
        cache.misses += fetched
        cache.bytes_fetched += fetched * self.cache.store.bytes_per_expert
        cache.computed += computed
        counts.calls += 1
        counts.resident += resident
        counts.fetched += fetched
        counts.computed += computed
        counts.behind += work.also


def _blocks(transfer: TransferEngine, layer: int, experts: Sequence[int]) -> list[Tensor | None]:
    return [transfer.source.block(ExpertRef(layer, expert)) for expert in experts]
