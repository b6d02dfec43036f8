"""One way for a whole pass: what is chosen, and that the executor goes it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import silu

from inference.cache import ExpertCache
from inference.costmodel import Rates, Timing
from inference.engine import LLM
from inference.expert_block import ExpertShape
from inference.experts import OffloadedExperts
from inference.hybrid import open_cpu_lane
from inference.offload import Crossing
from inference.phases import PassPlanner, plan_phase
from inference.planner import plan_call
from inference.store import ExpertStore, TensorFiles
from inference.transfer import SimulatedLink
from tests.inference.linked import Linked
from tests.inference.test_engine import FAMILIES, tiny
from tests.inference.test_executor import BLOCK, LAYERS, batch
from tests.inference.test_hybrid import EVEN, SIZE
from tests.inference.test_planner import costs_of, machines


def test_prefill_streams_where_the_link_is_strong_and_decode_splits():
    h100ish = costs_of(link=55, beside=0.9, cpu_us=(170, 30_000))
    prefill = plan_phase("prefill", h100ish, layers=24, missing_rows=[500] * 56, resident_rows=[500] * 8, dense_s=1e-4)
    assert prefill.mode == "stream"
    assert set(prefill.alternatives) >= {"stream", "cpu"}
    decode = plan_phase("decode", h100ish, layers=24, missing_rows=[1] * 6, resident_rows=[1] * 2, dense_s=1e-5)
    assert decode.mode == "split"
    assert decode.seconds < min(decode.alternatives["fetch"], decode.alternatives["cpu"])
    assert "against" in decode.reason()
    weak_link = costs_of(link=5, beside=0.9, cpu_us=(170, 180))
    slow = plan_phase("prefill", weak_link, layers=4, missing_rows=[9] * 4, resident_rows=[], dense_s=0)
    assert slow.mode == "cpu"
    assert slow.seconds == slow.alternatives["cpu"] < slow.alternatives["split"] < slow.alternatives["stream"]
    assert slow.reason().startswith("cpu takes ")
    assert slow.reason().endswith("stream 19.2 ms; bound by cpu")


def test_all_resident_and_all_on_the_cpu_are_phases_too():
    assert (
        plan_phase("decode", costs_of(), layers=2, missing_rows=[], resident_rows=[1] * 4, dense_s=1e-3).mode
        == "resident"
    )
    alone = plan_phase(
        "decode", costs_of(has_link=False), layers=2, missing_rows=[1] * 4, resident_rows=[], dense_s=1e-2
    )
    assert (alone.mode, alone.bound) == ("cpu", "the dense part")
    assert "the only way here" in alone.reason()


def planner(costs, layers=4, dense_s=1e-5):
    return PassPlanner(costs, layers, lambda rows: dense_s)


@settings(max_examples=60, deadline=None)
@given(machines, st.lists(st.lists(st.integers(1, 64), max_size=6), min_size=1, max_size=5))
def test_a_pass_goes_the_way_that_its_first_misses_chose(costs, layers):
    """Whatever the rows of the layers behind; in a split each is cut where it is best for itself."""
    passes = planner(costs, layers=len(layers))
    for number in (1, 2):
        chosen = None
        for row, rows in enumerate(layers):
            missing = list(enumerate(rows, 7))
            way = passes(row, 40, missing, [3, 1])
            assert sorted([*way.fetch, *way.cpu]) == [expert for expert, _ in missing]
            if missing and chosen is None:
                chosen = plan_phase(
                    "prefill", costs, layers=len(layers), missing_rows=rows, resident_rows=[3, 1], dense_s=1e-5
                )
            if chosen is None:
                continue
            assert passes.newest == chosen
            assert way.mode == chosen.mode
            if way.mode == "split":
                split = plan_call(costs, missing, resident_rows=[3, 1])
                assert (way.fetch, way.cpu) == (split.fetch, split.cpu)
            else:
                assert not (way.fetch if way.mode == "cpu" else way.cpu)
        assert passes.modes == ({} if chosen is None else {chosen.mode: number})


def test_each_pass_chooses_anew():
    passes = planner(costs_of(link=20, cpu_us=(50, 50_000)))
    few, many = [(e, 1) for e in range(8)], [(e, 400) for e in range(8)]
    assert [passes(row, 40, few, []).mode for row in (0, 2)] == ["split"] * 2
    assert [passes(row, 40, many, []).mode for row in (0, 3)] == ["stream"] * 2
    assert passes(3, 40, few, []).mode == "split", "the same layer again is another pass"
    assert passes.modes == {"split": 2, "stream": 1}
    assert passes.newest.reason().startswith("split takes ")


# Of experts of 40 rows and more: links and cores in which each way is the fastest.
def profile(link_us, cpu_us):
    link = SIZE / (link_us * 1e-6)
    cpu = tuple(Timing("linear", 2, rows, us * 1e-6) for rows, us in zip((1, 64), cpu_us, strict=True))
    return dataclasses.replace(EVEN, link=Rates(link, link), cpu=cpu, cpu_overlapped=SIZE / (cpu_us[0] * 1e-6))


WAYS = {"stream": profile(20, (300, 20_000)), "cpu": profile(500, (10, 11)), "split": profile(20, (10, 40))}


@pytest.fixture(scope="module")
def store(model_folder):
    paths = {layer: f"model.layers.{layer}.mlp.experts" for layer in range(LAYERS)}
    return ExpertStore(TensorFiles(model_folder), paths, ExpertShape(16, 64, 32))


@pytest.fixture
def hybrid(store):
    """A linked model on a machine, whose calls of more than 32 pairs are many; and the same one all resident."""
    lanes = []

    def make(slots, machine):
        linked = Linked(store, slots, banks=True, many_pairs=32)
        lanes.append(open_cpu_lane(linked.banks, linked.modules[0].arithmetic, machine))
        executor, lane = linked.executor, lanes[-1]
        executor.cpu, executor.plan, executor.passes = lane.experts, lane.plan, lane.passes
        return linked

    yield make
    for lane in lanes:
        lane.close()


def skewed(tokens, seed):
    """A few experts have many rows, the others few."""
    x, _, weights = batch(tokens, seed)
    scores = torch.rand(tokens, 16, generator=torch.Generator().manual_seed(seed)) + torch.linspace(0, 0.8, 16)
    return x, scores.argsort(dim=1, descending=True)[:, :4], weights


@pytest.mark.parametrize("slots", [0, 8])
@pytest.mark.parametrize("way", WAYS)
def test_the_way_that_is_printed_is_the_way_that_is_gone(hybrid, store, way, slots):
    linked, plain = hybrid(slots, WAYS[way]), Linked(store, slots, banks=True, many_pairs=32)
    cache = ExpertCache(store, store.total)
    resident = {layer: OffloadedExperts(cache, layer, silu) for layer in store.layers}
    counts, moved = linked.cache.counts, linked.transfers.counts
    for number in range(3):
        for layer in range(LAYERS):
            held = {ref.expert for ref in linked.cache.resident if ref.layer == layer}
            call = skewed(40, 10 * number + layer)
            rows = torch.bincount(call[1].flatten(), minlength=16)
            missing = [expert for expert in range(16) if rows[expert] and expert not in held]
            fetched, computed, prefetched = counts.misses, counts.computed, moved.prefetched_bytes
            got, exact = linked(layer, *call), resident[layer](*call)
            torch.testing.assert_close(got, exact, rtol=1e-5, atol=1e-5)
            assert way != "stream" or torch.equal(got, exact)
            fetched, computed = counts.misses - fetched, counts.computed - computed
            assert fetched + computed == len(missing)
            assert (fetched > 0, computed > 0) == (way != "cpu", way != "stream")
            if way == "split":
                assert moved.prefetched_bytes == prefetched, "what the link brings depends on the layer's own rows"
                order = sorted(missing, key=lambda expert: (-int(rows[expert]), expert))
                assert {ref.expert for ref in linked.cache.resident if ref.layer == layer} - held <= set(
                    order[:fetched]
                )
            plain(layer, *call)
            linked.link.advance(1e-4)
        passes = linked.executor.passes
        assert passes.modes == {way: number + 1}
        assert passes.newest.reason().startswith(f"{way} takes ")
        assert set(passes.newest.alternatives) == {"stream", "cpu", "split"}
    assert moved.demanded_bytes + moved.prefetched_bytes == (counts.misses if way != "stream" else 0) * BLOCK + (
        plain.transfers.counts.demanded_bytes + plain.transfers.counts.prefetched_bytes if way == "stream" else 0
    )


def test_experts_under_an_adapter_stream_whatever_was_chosen(hybrid):
    class Deltas(torch.nn.Module):
        def gate_up_delta(self, x_NH, counts_E):
            return x_NH * 0.1

        def down_delta(self, a_NI, counts_E):
            return a_NI.repeat(1, 2) * 0.1

    linked = hybrid(8, WAYS["cpu"])
    linked.modules[1].adapter = Deltas()
    for layer in range(LAYERS):
        linked(layer, *skewed(40, layer))
    assert linked.cache.counts.misses == len(skewed(40, 1)[1].unique()), "of that layer"
    assert linked.cache.counts.computed > 16


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
def test_logits_of_every_family_are_close_whatever_way_prompts_go(family, way, tmp_path):
    tiny(family, **FAMILIES[family]).save_pretrained(tmp_path)
    prompt = torch.randint(1, 96, (40,), generator=torch.Generator().manual_seed(2)).tolist()
    expected = LLM(tmp_path, device="cpu").logits(prompt)
    for budget in (0.0, 0.25):
        crossing = Crossing(cpu=True, profile=WAYS[way], link=SimulatedLink(rate=1e8))
        with LLM(tmp_path, budget, device="cpu", poison=True, crossing=crossing) as llm:
            llm.executor.many_pairs = 16
            for _ in range(2):
                logits = llm.logits(prompt)
                torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
                gap = expected.topk(2, -1).values.diff(dim=-1).abs()[:, 0]
                clear = gap > 1e-3
                assert torch.equal(logits.argmax(-1)[clear], expected.argmax(-1)[clear])
                assert clear.sum() > 20
                assert way != "stream" or torch.equal(logits, expected)
            report = llm.report(EVEN)
            ways = report.measured.pass_ways
            assert ways == {way: 2} or (way == "split" and ways == {"split": 1, "cpu": 1}), "one miss cannot be split"
            assert (report.measured.cpu_experts > 0) == (way != "stream")
            llm.generate([prompt], 1, ignore_eos=True)
            text = str(llm.report(EVEN))
            assert "passes of many rows: " in text
            assert llm.executor.passes.newest.reason() in text
