"""Layer calls of few rows by kernels that read experts from the slots: a handful of launches, not some per expert.

Experts come in groups as they become usable; each group is one table of slots, and one launch of the two kernels of
:mod:`inference.slot_kernels`, which skip the pairs of all others. Every pair's result is kept apart until the last is
there, then they are added in ascending order of expert.

Shapes: T tokens, K choices, P = T*K pairs (row t * K + k), N = P rows sorted by expert, E experts, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from inference.cache import ExpertCache, Loan
from inference.experts import Call, CpuRows, computable
from inference.slot_kernels import combine, compute


class SlotCalls:
    """Computes calls from ``cache``'s slots.

    Needs Triton and, but for its interpreter, CUDA. Tables go to the device from page-locked memory while the host goes
    on. They are written again in the next call, of which the host knows the experts only once the device has done
    everything before.
    """

    def __init__(self, cache: ExpertCache) -> None:
        assert computable(cache.store.shape), cache.store.shape
        self.cache = cache
        self._device = cache.blocks_CB.device
        self._tables: list[Tensor] = []
        self._scratch: dict[int, tuple[Tensor, Tensor]] = {}

    def run(
        self,
        call: Call,
        x_TH: Tensor,
        index_TK: Tensor,
        weights_TK: Tensor,
        groups: Iterable[Sequence[Loan]],
        elsewhere: CpuRows | None = None,
    ) -> Tensor:
        """[T,H]. ``elsewhere`` has the results of experts that are in no group."""
        call_on_device = (x_TH.contiguous(), index_TK.contiguous(), weights_TK.contiguous())
        a_PI, y_PH = self._scratch_for(index_TK.numel())
        for number, group in enumerate(groups):
            slot_E = self._table(number, group)
            compute(*call_on_device, slot_E, self.cache.gate_up_C2IH, self.cache.down_CHI, a_PI, y_PH)
        if elsewhere is not None:
            pair_N = torch.from_numpy(elsewhere.pairs(call)).to(self._device)
            score_N = weights_TK.reshape(-1)[pair_N].float()
            y_PH[pair_N] = elsewhere.result().to(self._device) * score_N[:, None]
        out_TH = torch.empty_like(x_TH)
        combine(y_PH, call_on_device[1], out_TH)
        return out_TH

    def _table(self, number: int, group: Sequence[Loan]) -> Tensor:
        """The slots [E] of a group's experts on the device, -1 for all others."""
        while len(self._tables) <= number:
            experts, pin = self.cache.store.shape.num_experts, self._device.type == "cuda"
            self._tables.append(torch.empty(experts, dtype=torch.int32, pin_memory=pin))
        table = self._tables[number].fill_(-1)
        numbers = table.numpy()
        for loan in group:
            numbers[loan.expert] = loan.slot
        return table.to(self._device, non_blocking=True)

    def _scratch_for(self, pairs: int) -> tuple[Tensor, Tensor]:
        """Rows between the kernels and results of the pairs, of any call of that size."""
        if pairs not in self._scratch:
            shape = self.cache.store.shape
            with torch.inference_mode(False):
                sizes = ((pairs, shape.intermediate), (pairs, shape.hidden))
                a_PI, y_PH = (torch.zeros(size, device=self._device) for size in sizes)
            self._scratch[pairs] = a_PI, y_PH
        return self._scratch[pairs]
