"""A layer call where experts must cross a link: what is launched in which order.

1. The gate's choice is read back, the one wait of the host in a layer; what was computed to predict comes along.
2. Missing experts are split into those that are fetched and those that the CPU computes, which begins at once.
3. Fetches are handed to the link, then prefetches for the layers ahead.
4. Resident experts are computed meanwhile, then what has arrived.
5. Results are added in ascending order of expert, so that nothing of all this reaches the bits. (Of the CPU's own
   products that cannot be said: with them results are close, not equal.)

Missing experts of many rows, of prompts or of many sequences that decode, pass through buffers of whole layers instead
of slots (:mod:`inference.layer_stream`). There one way is chosen for a whole pass (:mod:`inference.phases`): all
streamed, all left to the CPU, or each layer's divided.

Shapes: T tokens, K choices, N = T*K rows sorted by expert, L layers by row, E experts, D layer calls ahead, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from inference.cache import ExpertCache, Loan, Wanted
from inference.errors import InferenceError
from inference.experts import Call, CpuRows, OffloadedExperts
from inference.layer_stream import LayerStream, NextUp
from inference.phases import STREAM, Division
from inference.prefetch import Prefetcher
from inference.rows import Ends, under_way
from inference.transfer import Transfer, TransferEngine
from moe.refs import ExpertRef

# (token, choice) pairs above which rows are many. Of so many, kernels that read an expert's weights once for each pair
# are slower than products of all its rows; and a call wants so many experts that slots for all of them would leave
# nothing to be found again.
MANY_PAIRS = 256
_SPARE = 16  # one slot in so many is free before a call, so that the link need not wait for the policy


class HostExperts(Protocol):
    """Computes experts where they lie in host memory; see :class:`inference.cpu_experts.CpuExperts`."""

    def submit(self, layer: int, work: Sequence[tuple[int, int]], x_NH: Tensor) -> Any: ...

    def close(self) -> None: ...


class SlotLane(Protocol):
    """Computes a call of few rows; see :class:`inference.slot_calls.SlotCalls`."""

    def run(
        self,
        call: Call,
        x_TH: Tensor,
        index_TK: Tensor,
        weights_TK: Tensor,
        groups: Iterable[Sequence[Loan]],
        elsewhere: CpuRows | None,
    ) -> Tensor: ...


Worth = dict[int, float]
Plan = Callable[[list[tuple[int, int]], list[int], Worth], tuple[Sequence[int], Sequence[int]]]
PassPlan = Callable[[int, int, list[tuple[int, int]], list[int], Worth], Division]


@dataclass(frozen=True)
class ReadBack:
    """What the host learns of a call.

    Attributes:
        next_up: the experts of the rows after which sequences go on.
        x_TH: the call's input in host memory, where the CPU may have to compute.
        ahead_DE: what was computed to predict.
        foreseen_2LE: what lookahead heads say to the policy.
    """

    call: Call
    next_up: NextUp
    x_TH: Tensor | None = None
    ahead_DE: np.ndarray | None = None
    foreseen_2LE: np.ndarray | None = None


class Executor:
    """Carries out the calls of all layers of a model.

    Args:
        cache: slots on the device.
        transfers: into them.
        prefetcher: for the layers ahead; None fetches on demand only.
        cpu: computes missing experts beside the device; None fetches them all.
        plan: from (expert, rows) of the missing, the rows of the resident, and how much each missing one is worth
            keeping, to (fetched, computed on the CPU).
        passes: the same for each call of a pass of many rows, given its layer's row and its tokens first. None streams.
        stream: buffers for calls of many rows; None serves them through the slots, in groups.
        slot_calls: kernels for calls of few rows (:class:`inference.slot_calls.SlotCalls`), where there are any.
        many_pairs: (token, choice) pairs above which rows are many.

    Attributes:
        foresee: computes on the device, from a layer's row and input, what the policy is told before the call; None for
            policies that do not listen. It is read back with the gate's choice.
    """

    def __init__(
        self,
        cache: ExpertCache,
        transfers: TransferEngine,
        *,
        prefetcher: Prefetcher | None = None,
        cpu: HostExperts | None = None,
        plan: Plan | None = None,
        passes: PassPlan | None = None,
        stream: LayerStream | None = None,
        slot_calls: SlotLane | None = None,
        many_pairs: int = MANY_PAIRS,
    ) -> None:
        assert (cpu is None) == (plan is None)
        assert passes is None or plan is not None
        self.cache, self.transfers, self.prefetcher = cache, transfers, prefetcher
        self.cpu, self.plan, self.passes, self.stream, self.slot_calls = cpu, plan, passes, stream, slot_calls
        self.many_pairs = many_pairs
        self.foresee: Callable[[int, Tensor], Tensor] | None = None
        self._flying: dict[ExpertRef, Transfer] = {}  # of the current call, not yet waited for

    def close(self) -> None:
        """Give back the CPU's threads and the host's copy of the experts, when nothing is computed any more."""
        if self.cpu is not None:
            self.cpu.close()
        with suppress(RuntimeError):  # of a device that failed: what it has registered ends with the process
            self.transfers.link.settle(self.transfers.link.mark())
            self.transfers.source.close()

    def begin(self) -> None:
        """A new sequence starts."""
        self.cache.policy.begin()
        if self.prefetcher is not None:
            self.prefetcher.predictor.begin()

    def run(self, module: OffloadedExperts, x_TH: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """See :class:`inference.experts.OffloadedExperts`.

        Raises InferenceError if an expert cannot be read or copied, and from then on in every call: what is on the link
        is not known any more. Other errors leave slots and transfers in order.
        """
        self.transfers.check()
        try:
            return self._run(module, x_TH, index_TK, weights_TK)
        except InferenceError as error:
            self.transfers.failure = error
            raise
        except BaseException:
            self._land(module.layer)
            raise

    def _run(self, module: OffloadedExperts, x_TH: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
        if not len(x_TH):
            return torch.zeros_like(x_TH)
        row = self.cache.row(module.layer)
        read = self._read_back(row, module, x_TH, index_TK)
        call = read.call
        if read.foreseen_2LE is not None:
            self.cache.policy.foresee(read.foreseen_2LE.astype(np.float64))
        self.transfers.link.fence()
        if self.prefetcher is not None:
            self.prefetcher.settle()
        many = len(call.order_N) > self.many_pairs
        if many and self.stream is not None:
            return self._through_buffers(self.stream, row, module, read, x_TH, weights_TK)
        wanted = self.cache.look(module.layer, call.experts)
        # An adapter's deltas belong between an expert's products: those experts are computed where the adapter is.
        fetch, on_cpu = (wanted.missing, []) if module.adapted else self._split(row, wanted, call)
        elsewhere = self._start_cpu(module.layer, on_cpu, call, x_TH if read.x_TH is None else read.x_TH)
        groups = self._groups(row, module.layer, wanted, fetch, read)
        if self.slot_calls is not None and not module.adapted and not many:
            return self.slot_calls.run(call, x_TH, index_TK, weights_TK, groups, elsewhere)
        return module.compute(call, x_TH, weights_TK, groups, elsewhere)

    def _read_back(self, row: int, module: OffloadedExperts, x_TH: Tensor, index_TK: Tensor) -> ReadBack:
        passed = under_way()
        # Outside of a pass of the model the rows are taken for one prompt's.
        ends = Ends((len(x_TH) - 1,), ()) if passed is None else passed.ends
        wanted, few = {"index": index_TK}, index_TK.numel() <= self.many_pairs
        part = getattr(self.prefetcher and self.prefetcher.predictor, "device_part", None)
        if few and part is not None:
            wanted["ahead"] = part(row, x_TH).float()
        if few and self.cpu is not None:
            wanted["x"] = x_TH
        if self.foresee is not None:
            wanted["foreseen"] = self.foresee(row, x_TH)
        read = dict(zip(wanted, _to_host(list(wanted.values())), strict=True))
        index, x_here = read["index"].numpy(), read.get("x")
        ahead, foreseen = (None if name not in read else read[name].numpy() for name in ("ahead", "foreseen"))
        next_up = NextUp(*(frozenset(index[list(rows)].reshape(-1).tolist()) for rows in (ends.begun, ends.decoded)))
        return ReadBack(Call.of(index, module.num_experts), next_up, x_here, ahead, foreseen)

    def _split(self, row: int, wanted: Wanted, call: Call) -> tuple[list[int], list[int]]:
        if self.plan is None or not wanted.missing:
            return wanted.missing, []
        fetch, on_cpu = self.plan(*self._known(row, call, wanted.missing, wanted.resident + wanted.coming))
        assert sorted([*fetch, *on_cpu]) == sorted(wanted.missing), (fetch, on_cpu, wanted)
        return list(fetch), list(on_cpu)

    def _known(
        self, row: int, call: Call, missing: list[int], resident: list[int]
    ) -> tuple[list[tuple[int, int]], list[int], Worth]:
        """What plans are made of: rows of the missing, of the resident, and how much each missing one is worth."""
        rows = dict(zip(call.experts, call.counts, strict=True))
        worth = dict(zip(missing, self.cache.policy.scores()[row, missing].tolist(), strict=True))
        return [(expert, rows[expert]) for expert in missing], [rows[expert] for expert in resident], worth

    def _through_buffers(
        self,
        stream: LayerStream,
        row: int,
        module: OffloadedExperts,
        read: ReadBack,
        x_TH: Tensor,
        weights_TK: Tensor,
    ) -> Tensor:
        """A call of many rows. The link begins first: what the CPU gets takes the host a while to gather."""
        layer, call = module.layer, read.call
        resident = [expert for expert in call.experts if self.cache.holds(layer, expert)]
        missing = [expert for expert in call.experts if not self.cache.holds(layer, expert)]
        way = Division(STREAM, tuple(missing))
        if self.passes is not None and not module.adapted:
            way = self.passes(row, call.tokens, *self._known(row, call, missing, resident))
        stream.bring(layer, way.fetch, ahead=way.mode == STREAM and stream.wants_most(call))
        elsewhere = self._start_cpu(layer, list(way.cpu), call, x_TH if read.x_TH is None else read.x_TH)
        groups = stream.groups(layer, call, way.fetch, read.next_up)
        return module.compute(call, x_TH, weights_TK, groups, elsewhere)

    def _start_cpu(self, layer: int, experts: list[int], call: Call, x_TH: Tensor) -> CpuRows | None:
        """Have the CPU begin."""
        if not experts:
            return None
        assert self.cpu is not None
        self.cache.counts.computed += len(experts)
        tokens = np.concatenate([call.token_N[call.rows[expert]] for expert in experts])
        x_NH = x_TH.cpu()[torch.from_numpy(tokens)]
        work = [(expert, call.rows[expert].stop - call.rows[expert].start) for expert in experts]
        return CpuRows(experts, self.cpu.submit(layer, work, x_NH))

    def _groups(self, row: int, layer: int, wanted: Wanted, fetch: list[int], read: ReadBack) -> Iterator[list[Loan]]:
        """The experts of a call as they become usable; each group is computed before the next is asked for."""
        # Where enough slots are free the link begins at once: the policy has its turn while others work.
        waiting, experts = len(fetch) <= self.cache.free, read.call.experts
        if not waiting:
            self.cache.note(layer, experts)
        flying = self._fetch(layer, fetch)
        left = fetch[len(flying) :]
        late = {expert: self._late(ExpertRef(layer, expert)) for expert in wanted.coming}
        if self.prefetcher is not None:
            if waiting:
                self.cache.note(layer, experts)
            self.prefetcher.after(row, experts, bool(fetch), read.ahead_DE)
        self.cache.counts.hits += len(wanted.resident) + len(late)
        if wanted.resident:
            yield [self.cache.loan(layer, expert) for expert in wanted.resident]
        if late or flying:
            yield self._arriving(layer, late | flying)
        if self.prefetcher is None:
            if waiting:
                self.cache.note(layer, experts)
            # A prefetcher would take slots that are free for worth nothing.
            self.cache.make_room(min(len(experts), self.cache.slots // _SPARE) if not left else 0)
        while left or self.cache.slots == 0:
            # More experts than there is room for: those computed so far make way, once they are.
            self.cache.release(layer)
            self.transfers.link.fence()
            if not left:
                break
            flying = self._fetch(layer, left)
            assert flying, (layer, left, self.cache.slots)
            left = left[len(flying) :]
            yield self._arriving(layer, flying)

    def _fetch(self, layer: int, experts: list[int]) -> dict[int, Transfer]:
        """Demand as many of the missing as there are slots for."""
        if not experts:
            return {}
        got = self.cache.reserve(layer, experts)
        self.transfers.link.fence()
        refs = [ExpertRef(layer, expert) for expert in got]
        sent = self.transfers.demand_all([(ref, self.cache.block(ref)) for ref in refs])
        self._flying.update(zip(refs, sent, strict=True))
        for _ in got:
            self.cache.count_miss()
        return dict(zip(got, sent, strict=True))

    def _late(self, ref: ExpertRef) -> Transfer:
        assert self.prefetcher is not None
        transfer = self._flying[ref] = self.prefetcher.take(ref)
        self.transfers.promote(transfer)
        self.cache.counts.late += 1
        return transfer

    def _arriving(self, layer: int, flying: dict[int, Transfer]) -> list[Loan]:
        """Wait, on the device, until these are whole; only then are they anybody's."""
        self.transfers.wait(list(flying.values()))
        for expert in flying:
            ref = ExpertRef(layer, expert)
            del self._flying[ref]
            self.cache.commit(ref)
        return [self.cache.loan(layer, expert) for expert in flying]

    def _land(self, layer: int) -> None:
        """A call was broken off: what it had asked for is made resident all the same."""
        self.transfers.wait(list(self._flying.values()))
        for ref in self._flying:
            self.cache.commit(ref)
        self._flying.clear()
        self.cache.release(layer)


def _to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies in host memory, after one wait for all."""
    if tensors[0].device.type == "cpu":
        return list(tensors)
    copies = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True) for t in tensors]
    torch.cuda.current_stream(tensors[0].device).synchronize()
    return copies
