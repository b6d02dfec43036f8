"""A model's experts behind a simulated link, for tests of what crosses it."""

from __future__ import annotations

import torch
from torch.nn.functional import silu

from inference.banks import ExpertBanks
from inference.cache import ExpertCache
from inference.executor import Executor
from inference.experts import OffloadedExperts
from inference.layer_stream import LayerStream
from inference.prefetch import Prefetcher
from inference.transfer import SimulatedLink, TransferEngine


class Registry:
    """Remembers what was registered, in place of CUDA."""

    def __init__(self, refuse_after: int = 1 << 30):
        self.live, self.peak, self.refuse_after = {}, 0, refuse_after

    def register(self, address, nbytes):
        if len(self.live) >= self.refuse_after:
            raise RuntimeError("cudaHostRegister failed with CUDA error 2")
        assert address not in self.live
        self.live[address] = nbytes
        self.peak = max(self.peak, len(self.live))

    def unregister(self, address):
        del self.live[address]


class Linked:
    """Modules of all layers, and the parts behind them. ``predictor`` makes one from (layers, experts, top_k)."""

    def __init__(self, store, slots, *, policy=None, predictor=None, banks=False, many_pairs=1 << 30, link=None,
                 cpu=None, plan=None, chunk_bytes=4096, window_bytes=16384, act=silu, dtype=torch.float32,
                 packed=False):  # fmt: skip
        self.store = store
        self.link = link or SimulatedLink(rate=1e9, latency_s=1e-6)
        self.cache = ExpertCache(store, slots, dtype=dtype, policy=policy, poison=True)
        self.banks = ExpertBanks(store, self.cache.layout, Registry(), start=banks, packed=packed)
        if banks:
            self.banks.join()
        self.transfers = TransferEngine(self.link, self.banks, chunk_bytes=chunk_bytes, window_bytes=window_bytes)
        made = predictor and predictor(len(store.layers), store.shape.num_experts, 4)
        self.prefetcher = made and Prefetcher(made, self.cache, self.transfers)
        self.executor = Executor(
            self.cache, self.transfers, prefetcher=self.prefetcher, cpu=cpu, plan=plan,
            stream=LayerStream(self.cache, self.transfers), many_pairs=many_pairs,
        )  # fmt: skip
        self.modules = {layer: OffloadedExperts(self.cache, layer, act, self.executor) for layer in store.layers}

    def __call__(self, layer, *call):
        return self.modules[layer](*call)
