"""Prefill: a layer's experts pass through a buffer of whole layers while the layer before is computed.

A prompt uses almost every expert once. Through the slots they would evict all that decoding needs, and every fetch
would be waited for. Instead two buffers take turns: while one layer is computed from one, the next layer's experts are
copied into the other. Into the slots go, from the buffer, the last token's experts, with which decoding begins; and
where slots are free, those with most rows, an even share for each layer.

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

    def groups(self, layer: int, call: Call, last: Sequence[int]) -> Iterator[list[Loan]]:
        """The experts of a call as they become usable, those of the next layer on their way behind them.

        Args:
            last: the last token's experts.
        """
        cache, row = self.cache, self.cache.row(layer)
        resident = [expert for expert in call.experts if cache.holds(layer, expert)]
        missing = [expert for expert in call.experts if not cache.holds(layer, expert)]
        buffer = self._turn(row)
        coming = {expert: self._demand(buffer, layer, expert) for expert in missing}
        for expert in set(buffer.coming) - set(missing):
            if self.transfers.cancel(buffer.coming[expert]):
                del buffer.coming[expert]
        if row + 1 < len(cache.store.layers) and len(call.experts) >= _MOST * self._experts:
            self._fetch_ahead(row + 1)
        cache.counts.hits += len(resident)
        if resident:
            yield [cache.loan(layer, expert) for expert in resident]
        for expert in sorted(missing, key=lambda expert: coming[expert].order):
            self.transfers.wait([coming[expert]])
            cache.count_miss()
            yield [Loan(expert, -1, buffer.views[expert])]
        self._keep(layer, call, last, buffer)

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

    def _demand(self, buffer: _Buffer, layer: int, expert: int) -> Transfer:
        transfer = buffer.coming.get(expert)
        if transfer is None:
            transfer = self.transfers.demand(ExpertRef(layer, expert), buffer.blocks_EB[expert])
            buffer.coming[expert] = transfer
        else:
            self.transfers.promote(transfer)
        return transfer

    def _fetch_ahead(self, row: int) -> None:
        """Calls that want most of a layer will want most of the next: nothing else on the link is more urgent."""
        layer, buffer = self.cache.store.layers[row], self._turn(row)
        for expert in range(self._experts):
            if expert not in buffer.coming and not self.cache.holds(layer, expert):
                ref = ExpertRef(layer, expert)
                buffer.coming[expert] = self.transfers.prefetch(ref, buffer.blocks_EB[expert], Urgency.NEXT)
        self.transfers.pump(whole=True)

    def _keep(self, layer: int, call: Call, last: Sequence[int], buffer: _Buffer) -> None:
        """What decoding will begin with goes from the buffer into slots: a copy within the device."""
        cache, row = self.cache, self.cache.row(layer)
        cache.use(layer, last)
        share = -(-cache.slots // len(cache.store.layers))
        room = min(cache.free, max(share - cache.held(layer), 0))
        popular = sorted(call.experts, key=lambda expert: -(call.rows[expert].stop - call.rows[expert].start))
        absent = [expert for expert in popular if cache.slot_LE[row, expert] < 0 and expert in buffer.coming]
        seeds = [expert for expert in absent if expert in last] if cache.slots else []
        seeds += [expert for expert in absent if expert not in last][: max(room - len(seeds), 0)]
        for expert in cache.reserve(layer, seeds):
            ref = ExpertRef(layer, expert)
            cache.block(ref).copy_(buffer.blocks_EB[expert])
            cache.commit(ref)
