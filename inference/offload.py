"""Putting together what brings experts over a link: banks, transfers, a predictor, the executor.

Without a link, on a CPU, there is nothing of this: experts are computed in the memory that holds them.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from inference.banks import CudaRegistrar, ExpertBanks, NoRegistrar
from inference.cache import ExpertCache
from inference.calibrate import ExpertKind, machine_profile
from inference.costmodel import MachineProfile
from inference.cuda_link import CudaLink
from inference.errors import InferenceError
from inference.executor import Executor, SlotLane
from inference.experts import Arithmetic, computable
from inference.hybrid import open_cpu_lane
from inference.layer_stream import LayerStream
from inference.next_gates import DevicePart, next_gates
from inference.packing import why_not_packed
from inference.predictors import PREDICTORS, Lookahead, Predictor
from inference.prefetch import Prefetcher
from inference.transfer import WINDOW_BYTES, Link, TransferEngine


@dataclass(frozen=True)
class Crossing:
    """How experts cross the link.

    Attributes:
        prefetch: what predicts the next layers' experts, one of :data:`~inference.predictors.PREDICTORS`.
        lead: for how many layers ahead.
        pin: keep all experts in page-locked memory; otherwise each is read from its file when it is wanted.
        pack: keep them packed there (:mod:`inference.packed`), where that is possible: bf16, rows of whole groups, a C
            compiler, and on a GPU Triton. No bit of what the link brings or the CPU computes depends on it; but with
            ``cpu`` it changes what is faster, and so which of the two an expert comes from.
        cpu: have the CPU compute missing experts beside the link, as far as that is faster by ``profile``, which is
            measured if it is not given. Results are then close to, not equal to, those of the link alone.
        link: None: a CUDA stream on a GPU, and nothing on a CPU. A SimulatedLink shows there what would travel when.
    """

    prefetch: str = "none"
    lead: int = 1
    pin: bool = True
    pack: bool = True
    cpu: bool = False
    profile: MachineProfile | None = None
    link: Link | None = None

    @property
    def asks(self) -> str:
        """What of this means nothing without a link, as a setting; empty if nothing was asked for."""
        if self.cpu:
            return "cpu=True (--cpu-experts)"
        if self.prefetch != "none":
            return f"prefetch={self.prefetch} (--prefetch)"
        if not self.pack:
            return "pack=False (--no-pack)"
        return "" if self.pin else "pin=False (--no-pin)"

    @property
    def packs(self) -> bool:
        """Whether experts are to be packed: there must be memory to keep them in."""
        return self.pin and self.pack

    def __post_init__(self) -> None:
        if self.prefetch not in PREDICTORS:
            raise InferenceError(f"no predictor is called {self.prefetch!r}; there are {', '.join(PREDICTORS)}")
        if self.lead < 1:
            raise InferenceError(f"lead={self.lead} looks at no layer; give at least 1")


def open_executor(
    cache: ExpertCache,
    gates: Sequence[nn.Module],
    top_k: int,
    arithmetic: Arithmetic,
    crossing: Crossing,
    heads: DevicePart | None = None,
) -> Executor | None:
    """What carries out the calls of a model whose slots lie behind a link; None where there is none.

    Args:
        gates: the model's own, by row.
        arithmetic: of its experts.
        heads: what trained lookahead heads say of the next ``crossing.lead`` calls, if the model has any.

    Raises InferenceError if the banks do not fit into memory, or a setting asks for a link that is not there.
    """
    device = cache.blocks_CB.device
    link = crossing.link
    if link is None and device.type == "cuda":
        link = CudaLink(device)
    if link is None:
        if crossing.asks:
            raise InferenceError(
                f"{crossing.asks} has nothing to save on {device}, where experts are computed in the memory that "
                "holds them; leave it out, or compute on a GPU"
            )
        return None
    registrar = CudaRegistrar(device) if device.type == "cuda" else NoRegistrar()
    all_resident = cache.slots == cache.store.total  # nothing is fetched twice: banks would not be worth their memory
    # Measured before the banks are filled, which keeps cores and memory busy for seconds.
    pin = crossing.pin and not all_resident
    packed = pin and crossing.pack and why_not_packed(cache.layout, device) is None
    profile = _profile(cache, device, crossing, packed) if crossing.cpu and not all_resident else None
    banks = ExpertBanks(cache.store, cache.layout, registrar, start=pin, packed=packed)
    window = max(WINDOW_BYTES, 2 * cache.layout.nbytes)  # prefetches enter the link once in a layer
    transfers = TransferEngine(link, banks, window_bytes=window)
    slot_calls = _slot_calls(cache, device)
    if all_resident:
        return Executor(cache, transfers, slot_calls=slot_calls)
    predictor = _predictor(cache, gates, top_k, crossing, heads)
    prefetcher = None
    if predictor is not None and cache.slots:
        prefetcher = Prefetcher(predictor, cache, transfers, window / cache.layout.nbytes)
    lane = None if profile is None else open_cpu_lane(banks, arithmetic, profile)
    return Executor(
        cache,
        transfers,
        prefetcher=prefetcher,
        cpu=lane and lane.experts,
        plan=lane and lane.plan,
        passes=lane and lane.passes,
        stream=LayerStream(cache, transfers),
        slot_calls=slot_calls,
    )


def packing_said(banks: ExpertBanks, device: torch.device) -> str:
    """Whether experts are kept packed, and if not why, in a sentence; empty where none are kept in host memory."""
    if not banks.filling:
        return ""
    if banks.packs:
        return "experts are packed in page-locked memory, 12 bits for a weight"
    why = why_not_packed(banks.layout, device) or "pack=False (--no-pack)"
    return f"experts are not packed in page-locked memory: {why}"


def _slot_calls(cache: ExpertCache, device: torch.device) -> SlotLane | None:
    """Kernels for few rows, where Triton is and the experts' form is theirs."""
    if device.type != "cuda" or not computable(cache.store.shape) or importlib.util.find_spec("triton") is None:
        return None
    from inference.slot_calls import SlotCalls

    return SlotCalls(cache)


def _profile(cache: ExpertCache, device: torch.device, crossing: Crossing, packed: bool) -> MachineProfile:
    shape = cache.store.shape
    kind = ExpertKind(shape.hidden, shape.intermediate, cache.layout.dtype, packed)
    return crossing.profile or machine_profile(kind, device)


def _predictor(
    cache: ExpertCache, gates: Sequence[nn.Module], top_k: int, crossing: Crossing, heads: DevicePart | None
) -> Predictor | None:
    if crossing.prefetch == "none":
        return None
    if crossing.prefetch == "heads" and heads is None:
        raise InferenceError(
            f"{cache.store.files.folder} has no lookahead heads to predict with; train some, or prefetch by next_gate"
        )
    sizes = (len(cache.store.layers), cache.store.shape.num_experts, top_k)
    if crossing.prefetch in ("next_gate", "heads"):
        part = heads if crossing.prefetch == "heads" else next_gates(gates, crossing.lead)
        return Lookahead(*sizes, lead=crossing.lead, device_part=part)
    return PREDICTORS[crossing.prefetch](*sizes, lead=crossing.lead)
