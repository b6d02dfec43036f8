"""The experts seam for inference: same call, same arithmetic, weights borrowed from a cache.

Shapes: T tokens, K experts per token, E experts, N = T*K rows sorted by expert, H hidden, I intermediate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from inference.cache import ExpertCache, Loan
from inference.errors import InferenceError
from inference.expert_block import ExpertShape
from inference.lanes import LANES
from inference.row_adapters import AdaptedExperts
from moe.form import ExpertForm
from moe.kernels.activation import split

FEW_ROWS = 256  # up to so many, the activations of all experts are computed in one operation


@dataclass(frozen=True)
class Call:
    """Which rows of one layer call go to which expert.

    Attributes:
        order_N: rows (k * T + token) in the order (expert, k, token), in which transformers' eager loop gathers them.
        experts: those that have rows, ascending.
        counts: the number of rows of each of those.
    """

    tokens: int
    choices: int
    order_N: np.ndarray
    experts: list[int]
    counts: list[int]

    @classmethod
    def of(cls, index_TK: np.ndarray, num_experts: int) -> Call:
        """Raises InferenceError for ids that are no experts."""
        flat_N = index_TK.T.reshape(-1)
        counts_E = np.bincount(flat_N, minlength=num_experts)
        if len(counts_E) != num_experts:
            raise InferenceError(f"a gate chose expert {len(counts_E) - 1} of {num_experts}: the model is damaged")
        experts_N = np.flatnonzero(counts_E)
        order_N = flat_N.argsort(kind="stable")
        return cls(*index_TK.shape, order_N, experts_N.tolist(), counts_E[experts_N].tolist())

    @cached_property
    def rows(self) -> dict[int, slice]:
        """Of each expert, among the N."""
        ends = accumulate(self.counts)
        return {e: slice(end - n, end) for e, n, end in zip(self.experts, self.counts, ends, strict=True)}

    @cached_property
    def token_N(self) -> np.ndarray:
        return self.order_N % self.tokens

    @cached_property
    def turn_KT(self) -> np.ndarray:
        """Row numbers of each token's results, in ascending order of expert."""
        row_N = np.empty_like(self.order_N)
        row_N[self.order_N] = np.arange(len(row_N))
        return np.sort(row_N.reshape(self.choices, self.tokens), axis=0)


@dataclass(frozen=True)
class CpuRows:
    """Experts of a call that the CPU computes, beside whatever else is under way.

    Attributes:
        pending: its ``result()`` waits, and is float32 [rows of these experts, H], expert by expert, unweighted.
    """

    experts: list[int]
    pending: Any

    def fill(self, call: Call, y_NH: Tensor) -> None:
        """Put the results into the call's rows."""
        done_NH = self.result().to(device=y_NH.device, dtype=y_NH.dtype)
        sizes = [call.rows[expert].stop - call.rows[expert].start for expert in self.experts]
        for expert, part in zip(self.experts, done_NH.split(sizes), strict=True):
            y_NH[call.rows[expert]] = part

    def pairs(self, call: Call) -> np.ndarray:
        """(token, choice) pairs t * K + k of the rows of :meth:`result`."""
        row_N = np.concatenate([call.order_N[call.rows[expert]] for expert in self.experts])
        return np.asarray(row_N % call.tokens * call.choices + row_N // call.tokens)

    def result(self) -> Tensor:
        done_NH: Tensor = self.pending.result()
        return done_NH


def computable(shape: ExpertShape) -> bool:
    """Whether the kernels that read slots know the experts' form."""
    return shape.plain and shape.form.act == "silu"


class Arithmetic:
    """An expert's products and activation, as transformers' eager loop computes them, whatever device they are on."""

    def __init__(self, form: ExpertForm, act: Callable[[Tensor], Tensor], biased: bool) -> None:
        self.form, self.act, self.biased = form, act, biased
        # torch rounds silu of a row alike in whatever company; of gelu and sigmoid that is not so.
        self.rows_apart = form.limit is None and form.act == "silu"

    def up(self, x: Tensor, loan: Loan, out: Tensor | None = None) -> Tensor:
        """Rows through the first projection: gate and up, [.,2I]."""
        h = torch.mm(x, loan.views.up, out=out)
        return h.add_(loan.views.parts[2]) if self.biased else h

    def down(self, a: Tensor, loan: Loan, out: Tensor) -> None:
        """Activations through the second projection, [.,H]."""
        torch.mm(a, loan.views.down, out=out)
        if self.biased:
            out.add_(loan.views.parts[3])

    def between(self, h: Tensor) -> Tensor:
        return self.gated(*split(h, self.form))

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        if self.form.limit is None:
            return self.act(gate) * up
        gate = gate.clamp(max=self.form.limit)
        up = up.clamp(min=-self.form.limit, max=self.form.limit)
        return (up + 1) * (gate * torch.sigmoid(gate * self.form.alpha))


class OffloadedExperts(nn.Module):
    """Computes ``experts(hidden_states [T,H], top_k_index [T,K], top_k_weights [T,K]) -> [T,H]`` with borrowed weights.

    The rows of each expert are multiplied as transformers' eager loop does it, and a token's partial results are
    added in ascending order of expert. Neither depends on what is resident, so the bits do not either.
    It holds no weight of its own; ``adapter`` adds its scaled deltas to the frozen products. Where there is a link
    between the experts and what computes, an ``executor`` takes the whole call.
    """

    first_expert = 0
    ep_size = 1

    def __init__(self, cache: ExpertCache, layer: int, act: Callable[[Tensor], Tensor], executor: Any = None) -> None:
        super().__init__()
        shape = cache.store.shape
        self.cache, self.layer, self.executor = cache, layer, executor
        self.num_experts = self.num_local_experts = shape.num_experts
        self.hidden_size, self.intermediate_size = shape.hidden, shape.intermediate
        self.act_fn = act
        self.arithmetic = Arithmetic(shape.form, act, shape.biased)
        self.adapter: nn.Module | None = None

    @property
    def adapted(self) -> bool:
        """Whether an adapter has a part in the call under way."""
        return self.adapter is not None and (not isinstance(self.adapter, AdaptedExperts) or self.adapter.present)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        if self.executor is not None:
            return self.executor.run(self, hidden_states, top_k_index, top_k_weights)
        if top_k_index.shape[0] == 1 and self.adapter is None:
            return self._one(hidden_states, top_k_index, top_k_weights)
        call = Call.of(top_k_index.numpy(), self.num_experts)
        return self.compute(call, hidden_states, top_k_weights, self.cache.lend(self.layer, call.experts))

    def _one(self, x_1H: Tensor, index_1K: Tensor, weights_1K: Tensor) -> Tensor:
        """A single token, of which every expert has one row: :meth:`compute` without gathering, for the same bits."""
        do, chosen = self.arithmetic, index_1K[0].tolist()
        experts = sorted(chosen)
        if experts[-1] >= self.num_experts:
            raise InferenceError(f"a gate chose expert {experts[-1]} of {self.num_experts}: the model is damaged")
        y_K1H = x_1H.new_empty(len(experts), *x_1H.shape)
        y_1H = y_K1H.unbind()

        def share(loans: Sequence[Loan]) -> None:
            ups = [do.up(x_1H, loan) for loan in loans]
            acted = do.between(torch.stack(ups)).unbind() if do.rows_apart else map(do.between, ups)
            for a_1I, loan in zip(acted, loans, strict=True):
                do.down(a_1I, loan, y_1H[experts.index(loan.expert)])

        for group in self.cache.lend(self.layer, experts):
            LANES.run(share, group, len(group) * self.cache.layout.nbytes)
        score_K = weights_1K[0].index_select(0, torch.tensor([chosen.index(expert) for expert in experts]))
        y_K1H = (y_K1H * score_K.view(-1, 1, 1)).to(x_1H.dtype)
        first, *others = y_K1H.unbind()
        out_1H = first.clone()
        for y_1H in others:
            out_1H += y_1H
        return out_1H

    def compute(
        self,
        call: Call,
        x_TH: Tensor,
        weights_TK: Tensor,
        groups: Iterable[Sequence[Loan]],
        elsewhere: CpuRows | None = None,
    ) -> Tensor:
        """The call, its experts lent in ``groups``, each valid until the next is asked for; those that are in none are
        computed ``elsewhere``.
        """
        if call.tokens == 1:
            y_NH = self._unweighted(call, x_TH.expand(call.choices, -1), groups)
        else:
            y_NH = self._unweighted(call, x_TH.index_select(0, _on(call.token_N, x_TH)), groups)
        if elsewhere is not None:
            elsewhere.fill(call, y_NH)
        score_N = weights_TK.t().reshape(-1).index_select(0, _on(call.order_N, x_TH))
        y_NH = (y_NH * score_N[:, None]).to(x_TH.dtype)
        return add_up(call, y_NH)

    def _unweighted(self, call: Call, x_NH: Tensor, groups: Iterable[Sequence[Loan]]) -> Tensor:
        """Every row through its expert."""
        do, rows = self.arithmetic, call.rows
        adapter = self.adapter if self.adapted else None
        if isinstance(adapter, AdaptedExperts):
            adapter = adapter.bound(call)
        y_NH = x_NH.new_empty(x_NH.shape)
        if adapter is not None:
            counts_E = torch.zeros(self.num_experts, dtype=torch.int64)
            counts_E[call.experts] = torch.tensor(call.counts)
            counts_E = counts_E.to(x_NH.device)
            delta_N2I = adapter.gate_up_delta(x_NH, counts_E)
        a_NI = None if adapter is None else x_NH.new_empty(x_NH.shape[0], self.intermediate_size)
        for group in groups:
            if adapter is None and x_NH.shape[0] <= FEW_ROWS:
                share = partial(self._few, x_NH, rows, y_NH)
                if x_NH.device.type == "cpu":
                    LANES.run(share, group, len(group) * self.cache.layout.nbytes)
                else:
                    share(group)
                continue
            for loan in group:
                here = rows[loan.expert]
                h = do.up(x_NH[here], loan)
                a = do.between(h if adapter is None else h + delta_N2I[here])
                do.down(a, loan, y_NH[here])
                if a_NI is not None:
                    a_NI[here] = a
        return y_NH if adapter is None else y_NH + adapter.down_delta(a_NI, counts_E)

    def _few(self, x_NH: Tensor, rows: dict[int, slice], y_NH: Tensor, loans: Sequence[Loan]) -> None:
        """Several experts, their activations at once: with few rows, operations cost more than what they compute."""
        places = [rows[loan.expert] for loan in loans]
        counts = [place.stop - place.start for place in places]
        h_M2I = x_NH.new_empty(sum(counts), 2 * self.intermediate_size)
        for place, loan, h_n2I in zip(places, loans, h_M2I.split(counts), strict=True):
            self.arithmetic.up(x_NH[place], loan, h_n2I)
        if self.arithmetic.rows_apart:
            acted = self.arithmetic.between(h_M2I).split(counts)
        else:
            acted = map(self.arithmetic.between, h_M2I.split(counts))
        for place, loan, a_nI in zip(places, loans, acted, strict=True):
            self.arithmetic.down(a_nI, loan, y_NH[place])

    def extra_repr(self) -> str:
        return f"layer={self.layer}, experts={self.num_experts}, slots={self.cache.slots}"


def add_up(call: Call, y_NH: Tensor) -> Tensor:
    """The weighted results of each token's experts, added in ascending order of expert: [T,H]."""
    if call.tokens == 1:
        first, *others = y_NH.split(1)
        out_TH = first.clone()
        for y_1H in others:
            out_TH += y_1H
        return out_TH
    out_TH = y_NH.new_zeros(call.tokens, y_NH.shape[1])
    for turn_T in _on(call.turn_KT, y_NH):
        out_TH += y_NH.index_select(0, turn_T)
    return out_TH


def _on(array: np.ndarray, like: Tensor) -> Tensor:
    """An index array as a tensor where ``like`` is."""
    return torch.from_numpy(array).to(like.device)
