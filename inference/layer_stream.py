"""Calls of many rows: experts pass through buffers of whole layers, while the layer before is computed.

A prompt uses almost every expert once. Through the slots they would evict all that decoding needs, and every fetch
would be waited for. Instead two buffers take turns: while one layer is computed from one, the next layer's experts are
copied into the other. Into the slots go, from the buffer, the experts of each prompt's last token, with which decoding
begins; and where slots are free, those with most rows, an even share for each layer.

Many sequences that decode together want a large part of the experts at every step. Were each fetched one to get a
slot, all of them would take turns and few be found again. So there an expert gets the slot of another only if the
policy, which has heard of the call, rates it higher.

Shapes: L MoE layers, counted from 0 by *row*; E experts, B elements of a block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from inference.cache import ExpertCache, Loan
from inference.expert_block import BlockViews
from inference.experts import Call
from inference.transfer import Transfer, TransferEngine, Urgency
from moe.refs import ExpertRef

_MOST = 0.75  # share of a layer's experts in use above which all of the next layer's are worth fetching


@dataclass(frozen=True)
class NextUp:
    """The experts of the rows after which sequences go on.

    Attributes:
        begun: of the last rows of prompts.
        decoded: of the rows of sequences that decode.
    """

    begun: frozenset[int]
    decoded: frozenset[int]

    @property
    def experts(self) -> list[int]:
        """All of them, each once, ascending: a call's one fetch serves all of its rows."""
        return sorted(self.begun | self.decoded)


@dataclass
class _Buffer:
    """One layer's experts on the device; ``coming`` have been asked for."""

    blocks_EB: Tensor
    views: list[BlockViews]
    row: int = -1
    coming: dict[int, Transfer] = field(default_factory=dict)


class LayerStream:
    """Serves calls of many rows. The buffers are allocated when the first one comes."""

    def __init__(self, cache: ExpertCache, transfers: TransferEngine) -> None:
        self.cache, self.transfers = cache, transfers
        self._buffers: list[_Buffer] = []
        self._experts = cache.store.shape.num_experts

    def wants_most(self, call: Call) -> bool:
        """Whether a call uses so much of its layer that the next one's experts are worth fetching unseen."""
        return len(call.experts) >= _MOST * self._experts

    def bring(self, layer: int, experts: Sequence[int], ahead: bool) -> None:
        """Hand experts of a layer to the link, in order; if ``ahead``, all of the next layer's behind them."""
        row = self.cache.row(layer)
        buffer = self._turn(row)
        for expert in experts:
            self._demand(buffer, layer, expert)
        for expert in set(buffer.coming) - set(experts):
            if self.transfers.cancel(buffer.coming[expert]):
                del buffer.coming[expert]
        if ahead and row + 1 < len(self.cache.store.layers):
            self._fetch_ahead(row + 1)

    def groups(self, layer: int, call: Call, brought: Sequence[int], next_up: NextUp) -> Iterator[list[Loan]]:
        """The resident experts of a call, then those that :meth:`bring` was told of as they arrive.

        Args:
            next_up: the experts that calls to come will want.
        """
        cache, buffer = self.cache, self._turn(self.cache.row(layer))
        resident = [expert for expert in call.experts if cache.holds(layer, expert)]
        cache.counts.hits += len(resident)
        if resident:
            yield [cache.loan(layer, expert) for expert in resident]
        for expert in sorted(brought, key=lambda expert: buffer.coming[expert].order):
            self.transfers.wait([buffer.coming[expert]])
            cache.count_miss()
            yield [Loan(expert, -1, buffer.views[expert])]
        self._keep(layer, call, next_up, buffer)

    def _turn(self, row: int) -> _Buffer:
        """The buffer of a layer, emptied unless it is that layer's already."""
        if not self._buffers:
            self._buffers = [self._allocate() for _ in range(2)]
        buffer = self._buffers[row % 2]
        if buffer.row != row:
            for transfer in buffer.coming.values():
                self.transfers.cancel(transfer)
            buffer.row, buffer.coming = row, {}
            if self.cache.poison:
                buffer.blocks_EB.fill_(float("nan"))
                self.transfers.link.fence()
        return buffer

    def _allocate(self) -> _Buffer:
        like = self.cache.blocks_CB
        with torch.inference_mode(False):  # they outlive the call
            blocks_EB = torch.empty(self._experts, like.shape[1], dtype=like.dtype, device=like.device)
        return _Buffer(blocks_EB, [self.cache.layout.views(block_B) for block_B in blocks_EB])

    def _demand(self, buffer: _Buffer, layer: int, expert: int) -> None:
        transfer = buffer.coming.get(expert)
        if transfer is None:
            buffer.coming[expert] = self.transfers.demand(ExpertRef(layer, expert), buffer.blocks_EB[expert])
        else:
            self.transfers.promote(transfer)

    def _fetch_ahead(self, row: int) -> None:
        """Calls that want most of a layer will want most of the next: nothing else on the link is more urgent."""
        layer, buffer = self.cache.store.layers[row], self._turn(row)
        for expert in range(self._experts):
            if expert not in buffer.coming and not self.cache.holds(layer, expert):
                ref = ExpertRef(layer, expert)
                buffer.coming[expert] = self.transfers.prefetch(ref, buffer.blocks_EB[expert], Urgency.NEXT)
        self.transfers.pump(whole=True)

    def _keep(self, layer: int, call: Call, next_up: NextUp, buffer: _Buffer) -> None:
        """What decoding will want goes from the buffer into slots: a copy within the device."""
        cache, row = self.cache, self.cache.row(layer)
        cache.use(layer, next_up.experts)
        popular = sorted(call.experts, key=lambda expert: -(call.rows[expert].stop - call.rows[expert].start))
        absent = [expert for expert in popular if cache.slot_LE[row, expert] < 0 and expert in buffer.coming]
        seeds = [expert for expert in absent if expert in next_up.begun] if cache.slots else []
        seeds += cache.worth_a_slot(layer, [e for e in absent if e in next_up.decoded and e not in seeds], len(seeds))
        share = -(-cache.slots // len(cache.store.layers))
        room = min(cache.free, max(share - cache.held(layer), 0))
        seeds += [expert for expert in absent if expert not in seeds][: max(room - len(seeds), 0)]
        for expert in cache.reserve(layer, seeds):
            ref = ExpertRef(layer, expert)
            cache.block(ref).copy_(buffer.blocks_EB[expert])
            cache.commit(ref)
