"""The ways of decoding one sequence that the inference benchmark compares: ours, transformers' and accelerate's.

Every arm has the same weights and the same forced routing, reads its newest token back, and feeds it again.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import dispatch_model
from torch import Tensor, nn
from transformers import DynamicCache

from benchmarks.inference_model import ForcedRouting
from inference.banks import CudaRegistrar, ExpertBanks, NoRegistrar
from inference.cache import ExpertCache
from inference.cpu_lane import CpuLane
from inference.cuda_link import CudaLink
from inference.decode import DecodeStep
from inference.decode_experts import DecodeCounts, DecodeExperts, Split
from inference.expert_block import ExpertBlock
from inference.graphs import SegmentedGraph, Uncaptured
from inference.kv import KVShape, PagedKV
from inference.model import Model
from inference.policies import Policy
from inference.skeleton import build_skeleton, expert_shape, load_dense, offload_experts
from inference.store import ExpertStore, TensorFiles
from inference.transfer import SimulatedLink, TransferEngine

CONTEXT = 256  # positions; an arm that reaches the end goes back to the prompt's
PROMPT = 32


def open_banks(store: ExpertStore, layout: ExpertBlock, device: torch.device, packed: bool = False) -> ExpertBanks:
    """All experts in host memory, page-locked where there is a GPU."""
    registrar = CudaRegistrar(device) if device.type == "cuda" else NoRegistrar()
    banks = ExpertBanks(store, layout, registrar, packed=packed)
    banks.join()
    return banks


class Arm(Protocol):
    """``most``: tokens of a round, where fewer than the others' must do."""

    name: str
    note: str
    most: int | None

    def warm(self, tokens: int) -> None:
        """Decode so many tokens from the trace's first on."""

    def round(self, tokens: int) -> float:
        """Decode so many more; seconds."""

    def figures(self) -> dict[str, Any]:
        """What it counted since it was last asked."""

    def close(self) -> None:
        """End what would outlive it."""


def warmed(make: Callable[[], Arm], tokens: int) -> Arm:
    """An arm that has decoded ``tokens`` tokens, or its most. One that raises meanwhile is closed."""
    arm = make()
    try:
        arm.warm(min(tokens, arm.most or tokens))
        arm.figures()
    except BaseException:
        arm.close()
        raise
    return arm


class _Decoding(ABC):
    """An arm in this process."""

    device: torch.device
    most: int | None = None

    @abstractmethod
    def decode(self, tokens: int) -> None:
        """So many decode steps of one sequence."""

    def warm(self, tokens: int) -> None:
        self.decode(tokens)

    def round(self, tokens: int) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        self.decode(tokens)
        return time.perf_counter() - began

    def figures(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:  # noqa: B027 - most have nothing to give back
        """Nothing outlives it."""


class Ours(_Decoding):
    """The product's decode step.

    Args:
        slots: resident experts.
        policy: of the cache.
        lane: the CPU lane, with ``split`` as :class:`DecodeExperts` takes it; None: everything missing is fetched.
        graphs: capture the step.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        trace_NLK: np.ndarray,
        banks: ExpertBanks,
        device: torch.device,
        slots: int,
        policy: Callable[[int, int, int], Policy],
        *,
        lane: CpuLane | None = None,
        split: Split | None = None,
        graphs: bool = True,
        note: str = "",
    ) -> None:
        self.name, self.note, self.device = name, note, device
        files = TensorFiles(folder)
        module, blocks = build_skeleton(folder, None)
        shape = expert_shape(folder, blocks)
        store = ExpertStore(files, {b.layer: f"{b.path}.experts" for b in blocks}, shape)
        dtype = blocks[0].experts.gate_up_proj.dtype
        kept = policy(len(store.layers), shape.num_experts, slots)
        self.cache = ExpertCache(store, slots, device=device, dtype=dtype, policy=kept)
        offload_experts(blocks, self.cache)
        load_dense(module, files, device)
        self.routing = ForcedRouting(trace_NLK, device)
        self.routing.attach([block.module.gate for block in blocks])
        kv = PagedKV(KVShape.of(module.config), CONTEXT // 16 + 1, 16, device=device, dtype=dtype)
        cuda = device.type == "cuda"
        graph = SegmentedGraph(device) if graphs and cuda else Uncaptured()
        transfer = TransferEngine(CudaLink(device, timed=False) if cuda else SimulatedLink(), banks)
        beside = {"lane": lane, "host": banks, "split": split}
        self.experts = DecodeExperts(self.cache, transfer, 1, trace_NLK.shape[2], graph=graph, **beside)
        if self.experts.all_resident:
            self.experts.fill()
        self.table = tuple(range(1, CONTEXT // 16 + 1))
        modules = [block.module.experts for block in blocks]
        self.step = DecodeStep(Model(module, kv), modules, self.experts, graph, 1, len(self.table))
        self.routing.start(0)
        self.position = 0
        self.step.token_R.fill_(1)
        self.experts.counts = DecodeCounts()

    def decode(self, tokens: int) -> None:
        for _ in range(tokens):
            self.step.run([self.position], [self.table])
            int(self.step.token_R[0])
            self.position = self.position + 1 if self.position + 1 < CONTEXT else PROMPT

    def scores(self, tokens: list[int]) -> Tensor:
        """[N,V] behind tokens that are fed one by one."""
        self.routing.start(0)
        found = [self.step.run([t], [self.table], [token]).clone() for t, token in enumerate(tokens)]
        return torch.cat(found).float().cpu()

    def figures(self) -> dict[str, Any]:
        counts, self.experts.counts = self.experts.counts, DecodeCounts()
        return vars(counts)


class Transformers(_Decoding):
    """transformers' own model and cache. ``offloaded``: its experts are accelerate's to move, layer by layer."""

    def __init__(
        self,
        name: str,
        folder: Path,
        trace_NLK: np.ndarray,
        banks: ExpertBanks,
        device: torch.device,
        experts: str,
        *,
        offloaded: bool = False,
        note: str = "",
    ) -> None:
        self.name, self.note, self.device = name, note, device
        self.most = 2 if offloaded else None
        module, blocks = build_skeleton(folder, None)
        for block in blocks:
            _fill_experts(block.experts, banks, block.layer, device)
        load_dense(module, TensorFiles(folder), device)
        module.set_experts_implementation(experts)
        self.routing = ForcedRouting(trace_NLK, device)
        self.routing.attach([block.module.gate for block in blocks])
        self.module = _dispatched(module, [f"{block.path}.experts" for block in blocks]) if offloaded else module
        self.kv = DynamicCache(config=module.config)
        self.routing.start(0)
        self.token = 1

    @torch.inference_mode()
    def decode(self, tokens: int) -> None:
        for _ in range(tokens):
            if self.kv.get_seq_length() >= CONTEXT:
                self.kv.crop(PROMPT)
            fed = torch.tensor([[self.token]], device=self.device)
            logits = self.module(input_ids=fed, past_key_values=self.kv, use_cache=True).logits
            self.token = int(logits[0, -1].argmax())

    @torch.inference_mode()
    def scores(self, tokens: list[int]) -> Tensor:
        """[N,V] behind tokens that are fed one by one."""
        kv, found = DynamicCache(config=self.module.config), []
        self.routing.start(0)
        for token in tokens:
            fed = torch.tensor([[token]], device=self.device)
            found.append(self.module(input_ids=fed, past_key_values=kv, use_cache=True).logits[0])
        return torch.cat(found).float().cpu()


def _fill_experts(experts: nn.Module, banks: ExpertBanks, layer: int, device: torch.device) -> None:
    """The layer's stacked parameters from the banks."""
    for name, part_E in zip(("gate_up_proj", "down_proj"), banks.stacked(layer)[:2], strict=True):
        made = torch.empty(part_E.shape, dtype=part_E.dtype, device=device)
        for expert, part in enumerate(part_E):
            made[expert].copy_(part)
        setattr(experts, name, nn.Parameter(made, requires_grad=False))


def _dispatched(module: nn.Module, experts: list[str]) -> nn.Module:
    """The modules named in ``experts`` in host memory, moved to the GPU for each call; the rest on the GPU."""
    places: dict[str, str | int] = {}
    for name, child in module.named_modules():
        if name in experts:
            child.to("cpu")
        inside = any(path == name or path.startswith(f"{name}.") for path in experts) if name else True
        if name in experts or not inside:
            places[name] = "cpu" if name in experts else 0
    outermost = {n: p for n, p in places.items() if not any(n.startswith(f"{other}.") for other in places)}
    return dispatch_model(module, outermost, main_device=0)
