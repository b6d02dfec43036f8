"""All experts of a model in host memory, one contiguous page-locked block each: what the link and the CPU lane read.

Shapes: E experts, B elements of a block.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from inference.errors import InferenceError
from inference.expert_block import ExpertBlock
from inference.store import ExpertStore
from moe.refs import ExpertRef

_READERS = 8  # beyond that, threads that copy out of the page cache only get into each other's way


class HostBanks:
    """One bank [E,B] per layer, read from the files when opened.

    Page-locked by ``cudaHostRegister`` where there is a GPU: torch's own pinned memory is rounded up to a power of two
    and slower to make.

    Raises InferenceError if a tensor cannot be read or the memory not be locked.
    """

    def __init__(self, store: ExpertStore, layout: ExpertBlock, *, pin: bool) -> None:
        self._layout = layout
        experts = store.shape.num_experts
        self._locked: list[Tensor] = []
        self._banks = {layer: torch.empty(experts, layout.elements, dtype=layout.dtype) for layer in store.layers}
        refs = [ExpertRef(layer, expert) for layer in store.layers for expert in range(experts)]
        with ThreadPoolExecutor(_READERS) as pool:
            list(pool.map(lambda ref: store.read(ref.layer, ref.expert, layout, self.block(ref)), refs))
        if pin:
            for bank_EB in self._banks.values():
                self._lock(bank_EB)

    def _lock(self, bank_EB: Tensor) -> None:
        error = torch.cuda.cudart().cudaHostRegister(bank_EB.data_ptr(), bank_EB.nbytes, 0)
        if int(error):
            raise InferenceError(
                f"cannot lock {bank_EB.nbytes / 1e9:.2f} GB of host memory for the link (CUDA error {int(error)}); "
                "raise the limit of locked memory (ulimit -l) or free some"
            )
        self._locked.append(bank_EB)

    def block(self, ref: ExpertRef) -> Tensor:
        return self._banks[ref.layer][ref.expert]

    def stacked(self, layer: int) -> tuple[Tensor, ...]:
        """Each part of all blocks of a layer, as views [E, *shape]."""
        return self._layout.stacked(self._banks[layer])

    def address(self, ref: ExpertRef) -> int:
        """Where the block begins."""
        bank_EB = self._banks[ref.layer]
        return bank_EB.data_ptr() + ref.expert * bank_EB.shape[1] * bank_EB.itemsize

    def close(self) -> None:
        while self._locked:
            torch.cuda.cudart().cudaHostUnregister(self._locked.pop().data_ptr())
