"""The CPU as a second lane beside the link: what an executor needs to have it, opened.

>>> # lane = open_cpu_lane(banks, arithmetic, profile)
>>> # Executor(cache, transfers, cpu=lane.experts, plan=lane.plan, passes=lane.passes)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from inference.banks import ExpertBanks
from inference.compiled_experts import COMPILED, CompiledExperts
from inference.costmodel import PACKED_BYTES, ExpertCosts, KernelTable, MachineProfile
from inference.cpu_experts import CpuExperts, HostWeights
from inference.cpu_lane import LaneError
from inference.errors import InferenceError
from inference.experts import Arithmetic, computable
from inference.host_expert import HostExpert, PackedExpert, StoredExpert
from inference.phases import PassPlanner, dense_seconds
from inference.placement import model_sizes
from inference.planner import CallPlanner
from inference.transfer import is_packed
from moe.refs import ExpertRef


@dataclass(frozen=True)
class CpuSide:
    """``experts`` computes what ``plan`` leaves to it, and ``passes`` in passes of many rows."""

    experts: CpuExperts
    plan: CallPlanner
    passes: PassPlanner

    def close(self) -> None:
        self.experts.close()


def open_cpu_lane(
    banks: ExpertBanks, arithmetic: Arithmetic, profile: MachineProfile, threads: int | None = None
) -> CpuSide:
    """``threads`` for experts, at least 1; by default as many as were fastest when the machine was measured.

    Raises InferenceError if the profile counts on the compiled kernel and there is no compiler here.
    """
    if threads is None:
        threads = profile.threads
    team = min(profile.team, threads)
    shape = banks.store.shape
    itemsize = PACKED_BYTES if banks.packs else banks.layout.dtype.itemsize
    costs = ExpertCosts.of(profile, shape.hidden, shape.intermediate, itemsize, threads)
    compiled = None
    if any(timing.kernel == COMPILED for timing in profile.cpu) and computable(shape):
        down_start = banks.layout.parts[1].start
        try:
            compiled = CompiledExperts(threads, shape.hidden, shape.intermediate, banks.layout.dtype, down_start)
        except LaneError as error:
            raise InferenceError(
                f"the profile of {profile.name} counts on the compiled CPU kernel: {error}; measure this machine "
                "(planaria plan-inference --recalibrate), or install a compiler"
            ) from error
    experts = CpuExperts(host_weights(banks), arithmetic.gated, KernelTable(profile.cpu), threads, team, compiled)
    sizes = model_sizes(banks.store.files.folder, str(banks.layout.dtype).removeprefix("torch."))

    def dense_s(rows: int) -> float:
        return dense_seconds(profile, sizes, rows, context=rows) / sizes.moe_layers

    return CpuSide(experts, CallPlanner(costs), PassPlanner(costs, sizes.moe_layers, dense_s))


def host_weights(banks: ExpertBanks) -> HostWeights:
    """Experts in their bank; until it is filled, read from the file: a mapped one could end while it is read."""
    form, store, layout = banks.store.shape.form, banks.store, banks.layout

    def weights(layer: int, expert: int) -> StoredExpert:
        block_B = banks.block(ExpertRef(layer, expert))
        if block_B is None:
            block_B = torch.empty(layout.elements, dtype=layout.dtype)
            store.read(layer, expert, layout, block_B)
        if is_packed(block_B):
            return PackedExpert(block_B, layout)
        return HostExpert.of_parts(layout.split(block_B), form)

    return weights
