"""Cases of the decode step; run by test_slot_kernels.py, interpreted and uncaptured where there is no GPU."""

from __future__ import annotations

import pytest
import torch

from benchmarks.inference_arms import open_banks
from inference.cache import ExpertCache
from inference.cpu_lane import CpuLane
from inference.cuda_link import CudaLink
from inference.decode import DecodeStep
from inference.decode_experts import DecodeExperts
from inference.engine import LLM
from inference.errors import InferenceError
from inference.graphs import SegmentedGraph, Uncaptured
from inference.kv import KVShape, PagedKV
from inference.model import Model, Rows, Span
from inference.offload import Crossing
from inference.shadow import Hedge
from inference.skeleton import build_skeleton, expert_shape, load_dense, offload_experts
from inference.store import ExpertStore, TensorFiles
from inference.transfer import SimulatedLink, TransferEngine

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TABLES = [[3, 1, 4, 6], [5, 2, 7, 8]]
CHOICES = 4
STEPS = 4


class Shares:
    """The link brings a share of the misses, and one behind them."""

    most = 2 * CHOICES

    def __init__(self, share: float) -> None:
        self.share = share

    def __call__(self, misses):
        return round(self.share * misses), int(misses > 2)


class Served:
    """The tiny model with a budget of slots, and steps of two sequences."""

    def __init__(
        self,
        folder,
        slots: int,
        share: float | None = None,
        rows: int = 2,
        dtype: torch.dtype = torch.float32,
        packed: bool = False,
    ) -> None:
        files = TensorFiles(folder)
        module, blocks = build_skeleton(folder, dtype)
        shape = expert_shape(folder, blocks)
        store = ExpertStore(files, {b.layer: f"{b.path}.experts" for b in blocks}, shape)
        policy = Hedge(len(store.layers), shape.num_experts, slots)
        self.cache = ExpertCache(store, slots, device=DEVICE, dtype=dtype, policy=policy, poison=True)
        offload_experts(blocks, self.cache)
        load_dense(module, files, DEVICE)
        kv = PagedKV(KVShape.of(module.config), 10, 4, device=DEVICE, dtype=dtype)
        kv.pool_LNSCD[:, 0, 0] = 7.0
        self.model = Model(module, kv)
        banks = open_banks(store, self.cache.layout, DEVICE, packed)
        link = CudaLink(DEVICE) if DEVICE.type == "cuda" else SimulatedLink()
        graph = SegmentedGraph(DEVICE) if DEVICE.type == "cuda" else Uncaptured()
        lane = None
        if share is not None:
            layout = self.cache.layout
            lane = CpuLane(1, shape.hidden, shape.intermediate, layout.dtype, layout.parts[1].start)
        self.experts = DecodeExperts(
            self.cache,
            TransferEngine(link, banks),
            rows,
            CHOICES,
            graph=graph,
            lane=lane,
            host=banks,
            split=None if share is None else Shares(share),
        )
        if self.experts.all_resident:
            self.experts.fill()
        modules = [block.module.experts for block in blocks]
        self.step = DecodeStep(self.model, modules, self.experts, graph, rows, len(TABLES[0]))
        assert (kv.pool_LNSCD[:, 0, 0] == 7.0).all(), "capturing leaves the pool as it was"

    def tokens(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores [steps,R,V] and greedy tokens [steps,R] behind a prompt of two sequences."""
        prompts = [[5, 60, 200], [17, 9, 300]]
        logits, chosen = [], []
        for t in range(count):
            fed = [prompt[t] for prompt in prompts] if t < 3 else None
            logits.append(self.step.run([t, t], TABLES, fed).cpu().clone())
            chosen.append(self.step.token_R.cpu().clone())
        return torch.stack(logits), torch.stack(chosen)


@pytest.fixture(scope="module")
def resident(model_folder):
    served = Served(model_folder, 64)
    return served, *served.tokens(STEPS)


def test_as_the_model_computes_rows(resident, model_folder):
    _, logits, tokens = resident
    other = Served(model_folder, 64)
    fed = [[5, 60, 200, *tokens[2:-1, 0].tolist()], [17, 9, 300, *tokens[2:-1, 1].tolist()]]
    spans = [Span(tuple(table), 0, STEPS) for table in TABLES]
    for module in other.step._modules:
        assert module.executor is None, "the step's executor is gone when it is not running"
    if DEVICE.type == "cpu":
        every = other.model.forward(Rows.of(zip(fed, spans, strict=True), every=True)).view(2, STEPS, -1).cpu()
        assert torch.allclose(logits.transpose(0, 1), every, rtol=1e-3, atol=1e-3)
        assert torch.equal(every.argmax(-1)[:, 2:], tokens.T[:, 2:])


@pytest.mark.parametrize("slots", [16])
def test_the_budget_does_not_reach_the_bits(resident, model_folder, slots):
    _, logits, tokens = resident
    served = Served(model_folder, slots)
    fetched, chosen = served.tokens(STEPS)
    assert torch.equal(fetched, logits)
    assert torch.equal(chosen, tokens)
    counts = served.experts.counts
    assert counts.computed == 0
    assert min(counts.fetched, counts.resident) > 0
    assert served.cache.counts.misses == counts.fetched
    assert served.cache.counts.bytes_fetched == counts.fetched * served.cache.store.bytes_per_expert


@pytest.mark.parametrize("share", [0.5])
def test_the_cpu_lane_is_close(resident, model_folder, share):
    _, logits, tokens = resident
    served = Served(model_folder, 16, share)
    shared, chosen = served.tokens(STEPS)
    assert torch.allclose(shared, logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(chosen, tokens)
    assert served.experts.counts.computed > 0
    assert (served.experts.counts.fetched > 0) == (share > 0)


@pytest.mark.parametrize("share", [None, 0.5], ids=["fetched", "shared out"])
def test_packing_does_not_reach_the_bits(model_folder, share):
    plain = Served(model_folder, 64 if share is None else 16, share, dtype=torch.bfloat16)
    served = Served(model_folder, 16, share, dtype=torch.bfloat16, packed=True)
    for got, expected in zip(served.tokens(STEPS), plain.tokens(STEPS), strict=True):
        assert torch.equal(got, expected)
    counts, moved = served.experts.counts, served.experts.transfer.counts
    assert min(counts.fetched, counts.resident) > 0
    assert (counts.computed > 0) == (share is not None)
    assert moved.demanded_bytes < 0.8 * (counts.fetched + counts.behind) * served.cache.layout.nbytes


def test_too_few_slots_are_refused(model_folder):
    with pytest.raises(InferenceError, match="15 slots are too few to decode 2 rows"):
        Served(model_folder, 15)


def test_the_engine_captures_what_it_decodes(model_folder):
    prompts = [[5, 60, 200, 17], [9, 300]]
    answers, graphed = [], None
    for graphs in (False, True):
        crossing = Crossing() if DEVICE.type == "cuda" else Crossing(link=SimulatedLink())
        llm = LLM(model_folder, expert_budget=0.25, device=DEVICE, crossing=crossing, graphs=graphs, poison=True)
        llm.executor.transfers.source.join()
        answers.append([generation.token_ids for generation in llm.generate(prompts, max_new_tokens=3)])
        graphed = llm.engine.models[None]
    assert answers[0] == answers[1]
    assert set(graphed._steps) == {(2, 16)}
    assert graphed._steps[2, 16]._experts.counts.calls > 0


def test_where_nothing_can_be_captured_it_is_said(model_folder):
    with pytest.raises(InferenceError, match="graphs=True"):
        LLM(model_folder, device="cpu", graphs=True)
