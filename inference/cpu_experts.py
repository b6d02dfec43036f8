"""Experts computed by the CPU, straight from the weights in host memory, beside whatever the GPU does.

A call's work is a list of (expert, rows). Long lists are dealt to the workers expert by expert, short ones in parts:
each part takes some of an expert's intermediate columns through gate, up and down, and the parts' sums are added in
order. Every worker computes on threads of its own, one or a small team, so it neither waits for torch's pool nor holds
up the thread that launches the GPU's work; torch drops the interpreter's lock in every product.

Which kernel is fastest depends on the processor, the precision and the rows; so it is measured
(:mod:`inference.calibrate`) and looked up (:class:`inference.costmodel.KernelTable`).

Shapes: N rows of all experts of a call, R rows of one expert, H hidden, I intermediate or a part of it.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from inference.compiled_experts import COMPILED, CompiledExperts
from inference.costmodel import KernelTable
from inference.expert_block import ExpertBlock
from inference.host_expert import HostExpert, PackedExpert, StoredExpert

Product = Callable[[Tensor, Tensor], Tensor]
Gated = Callable[[Tensor, Tensor], Tensor]  # (gate, up), elementwise
HostWeights = Callable[[int, int], StoredExpert]  # (layer, expert)
MIN_COLUMNS = 128  # of a part: below it, calling costs more than computing


def product_linear(x_RH: Tensor, w_OH: Tensor) -> Tensor:
    """One matrix product in the weights' precision: what processors with AMX or AVX512-BF16 are fast at."""
    return torch.nn.functional.linear(x_RH, w_OH)


def product_rows(x_RH: Tensor, w_OH: Tensor) -> Tensor:
    """A matrix-vector product for each row, which reads the weights once per row, but at full memory speed."""
    return torch.stack([torch.mv(w_OH, x_H) for x_H in x_RH])


def product_upcast(x_RH: Tensor, w_OH: Tensor) -> Tensor:
    """Weights are widened to float32 a piece at a time, small enough to stay in the cache, and multiplied there."""
    x_RH = x_RH.float()
    if w_OH.dtype == torch.float32:
        return torch.nn.functional.linear(x_RH, w_OH)
    pieces = w_OH.split(max(_PIECE // w_OH.shape[1], 1))
    return torch.cat([torch.nn.functional.linear(x_RH, piece.float()) for piece in pieces], dim=1)


_PIECE = 1 << 17  # weights widened at once: 512 KiB
KERNELS: dict[str, Product] = {"linear": product_linear, "rows": product_rows, "upcast": product_upcast}


def kernels_for(dtype: torch.dtype) -> tuple[str, ...]:
    """The kernels worth measuring. In float32 there is nothing to widen, and a product of one row is a vector's."""
    return ("linear",) if dtype == torch.float32 else tuple(KERNELS)


def expert_rows(product: Product, gated: Gated, expert: HostExpert, x_RH: Tensor, columns: slice) -> Tensor:
    """Rows through some intermediate columns of one expert: a float32 share [R,H] of the result.

    As in transformers, what stands between two products has the weights' precision. The share with the first column
    has the last bias. Few operations, since each holds the interpreter's lock for a moment, and workers share it.
    """
    dtype, down_HI = expert.dtype, expert.down_HI
    gate_RI, up_RI = _gate_and_up(product, expert, x_RH.to(dtype), columns)
    if columns.stop - columns.start < down_HI.shape[1]:
        down_HI = down_HI[:, columns]
    y_RH = product(gated(gate_RI.to(dtype), up_RI.to(dtype)), down_HI).float()
    if expert.down_bias is not None and columns.start == 0:
        y_RH += expert.down_bias
    return y_RH


def _gate_and_up(product: Product, expert: HostExpert, x_RH: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    bias, fused_2IH = expert.gate_up_bias, expert.gate_up_2IH
    whole = columns.stop - columns.start == expert.intermediate
    if expert.interleaved or whole:
        rows = slice(2 * columns.start, 2 * columns.stop)
        both_R2I = product(x_RH, fused_2IH if whole else fused_2IH[rows])
        if bias is not None:
            both_R2I = both_R2I + bias[rows]
        if expert.interleaved:
            return both_R2I[:, ::2], both_R2I[:, 1::2]
        gate_RI, up_RI = both_R2I.chunk(2, -1)
        return gate_RI, up_RI
    gate_IH, up_IH = expert.halves
    gate_RI, up_RI = product(x_RH, gate_IH[columns]), product(x_RH, up_IH[columns])
    if bias is not None:
        gate_I, up_I = bias.chunk(2)
        return gate_RI + gate_I[columns], up_RI + up_I[columns]
    return gate_RI, up_RI


class Pending:
    """Work that was submitted."""

    def __init__(
        self,
        rows: Sequence[slice],
        shares: Sequence[Tensor],
        workers: Sequence[Future[None]],
        out_NH: Tensor,
        compiled: CompiledExperts | None,
    ) -> None:
        self._rows, self._shares, self._workers, self._out_NH = rows, shares, workers, out_NH
        self._compiled = compiled

    def result(self) -> Tensor:
        """Waits; float32 [N,H], rows as they were given, unweighted. An error of a worker is raised here."""
        if self._compiled is not None:
            self._compiled.wait()
        for worker in self._workers:
            worker.result()
        for rows, share_RH in zip(self._rows, self._shares, strict=True):
            self._out_NH[rows] += share_RH
        self._rows = self._shares = ()
        self._compiled = None
        return self._out_NH


class CpuExperts:
    """Computes missing experts on threads of its own.

    Args:
        weights: (layer, expert) to where it lies.
        gated: activation of (gate, up), elementwise.
        table: measured times, which say what kernel to use.
        threads: of all workers together.
        team: threads of one worker. Large teams need the interpreter less often, small ones wait less for each other.
        compiled: has threads of its own; computes what the table gives to it, as far as it takes it. Closed with this.
    """

    def __init__(
        self,
        weights: HostWeights,
        gated: Gated,
        table: KernelTable,
        threads: int,
        team: int = 1,
        compiled: CompiledExperts | None = None,
    ) -> None:
        assert 1 <= team <= threads, (team, threads)
        self.compiled = compiled
        self.weights, self.gated, self.table, self.threads = weights, gated, table, threads
        self.workers = threads // team
        self._pool = _workers(self.workers, team)

    def submit(
        self, layer: int, work: Sequence[tuple[int, int]], x_NH: Tensor, out_NH: Tensor | None = None
    ) -> Pending:
        """Start computing; returns at once.

        Args:
            work: (expert, number of its rows), in the order of the rows of ``x_NH``.
            x_NH: inputs in host memory; must not change until the result is taken.
            out_NH: float32, for the result; a new one by default.
        """
        assert sum(rows for _, rows in work) == x_NH.shape[0], (work, x_NH.shape)
        out_NH = torch.empty(x_NH.shape, dtype=torch.float32) if out_NH is None else out_NH
        out_NH.zero_()
        tasks: list[tuple[Product, StoredExpert, Tensor, slice]] = []
        compiled: list[tuple[StoredExpert, slice]] = []
        where, start = [], 0
        for expert, count in work:
            rows = slice(start, start + count)
            start += count
            weights = self.weights(layer, expert)
            kernel = self.table.best(count, self.threads).kernel
            if kernel == COMPILED and self._compiles(weights, compiled):
                compiled.append((weights, rows))
                continue
            if kernel == COMPILED:
                kernel = self.table.best(count, self.threads, without=COMPILED).kernel
            product = KERNELS[kernel]
            for columns in self._columns(weights.intermediate, len(work)):
                tasks.append((product, weights, x_NH[rows], columns))
                where.append(rows)
        if compiled and self.compiled is not None:
            self.compiled.submit(compiled, x_NH, out_NH, (layer, [expert for expert, _ in work]))
        shares: list[Tensor] = [out_NH] * len(tasks)
        turns = iter(range(len(tasks)))  # workers take the next one from here: the interpreter's lock keeps it whole
        workers = [
            self._pool.submit(_work, turns, tasks, self.gated, shares) for _ in range(min(self.workers, len(tasks)))
        ]
        return Pending(where, shares, workers, out_NH, self.compiled if compiled else None)

    def _compiles(self, weights: StoredExpert, with_them: Sequence[tuple[StoredExpert, slice]]) -> bool:
        """Whether the compiled kernel takes it into a call with others; their layer's bank may be ready by now."""
        alike = not with_them or type(with_them[0][0]) is type(weights)
        return alike and self.compiled is not None and self.compiled.takes(weights)

    def _columns(self, intermediate: int, experts: int) -> list[slice]:
        """Into how many parts an expert is cut: so many that no worker is idle."""
        parts = max(min(-(-self.workers // experts), intermediate // MIN_COLUMNS), 1)
        ends = [intermediate * part // parts for part in range(parts + 1)]
        return [slice(a, b) for a, b in itertools.pairwise(ends)]

    def hand_over(self) -> None:
        """Give the workers nothing to do, and wait for it: what it costs to use them at all."""
        self._pool.submit(int).result()

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        if self.compiled is not None:
            self.compiled.close()

    def __enter__(self) -> CpuExperts:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _workers(count: int, team: int) -> ThreadPoolExecutor:
    """Workers whose products run on ``team`` threads each.

    torch keeps that count for each thread, but threads that start later inherit the one set last: so all workers start
    here, and the caller's count is set again behind them.
    """
    mine = torch.get_num_threads()
    started = threading.Barrier(count + 1)

    def begin() -> None:
        torch.set_num_threads(team)
        torch.get_num_threads()  # the first question settles a thread's count; before the caller's is set again
        started.wait(60)

    pool = ThreadPoolExecutor(count, "cpu-expert", initializer=begin)
    for _ in range(count):
        pool.submit(int)  # a worker starts when there is work and no idle one: none is idle before the barrier
    started.wait(60)
    torch.set_num_threads(mine)
    return pool


@torch.inference_mode()
def _work(
    turns: Iterator[int],
    tasks: Sequence[tuple[Product, StoredExpert, Tensor, slice]],
    gated: Gated,
    shares: list[Tensor],
) -> None:
    for turn in turns:
        product, expert, x_RH, columns = tasks[turn]
        if isinstance(expert, PackedExpert):
            expert = expert.unpacked(columns, _own_block(expert.layout))
        shares[turn] = expert_rows(product, gated, expert, x_RH, columns)


_own = threading.local()


def _own_block(layout: ExpertBlock) -> Tensor:
    """[B], of this thread, to unpack experts to."""
    block_B: Tensor | None = getattr(_own, "block_B", None)
    if block_B is None or (block_B.numel(), block_B.dtype) != (layout.elements, layout.dtype):
        block_B = _own.block_B = torch.empty(layout.elements, dtype=layout.dtype)
    return block_B
