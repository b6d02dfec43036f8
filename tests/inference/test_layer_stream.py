"""Calls of many rows behind a link: prompts, and many sequences that decode together."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import silu

from inference.cache import ExpertCache
from inference.engine import LLM
from inference.expert_block import ExpertShape
from inference.experts import OffloadedExperts
from inference.offload import Crossing
from inference.policies import LRU, Policy
from inference.requests import Request
from inference.rows import Ends, Rows, Span, computing
from inference.store import ExpertStore, TensorFiles
from inference.transfer import SimulatedLink
from tests.inference.linked import Linked
from tests.inference.test_executor import EXPERTS, LAYERS, batch
from tests.inference.test_hybrid import EVEN


@pytest.fixture(scope="module")
def store(model_folder):
    paths = {layer: f"model.layers.{layer}.mlp.experts" for layer in range(LAYERS)}
    return ExpertStore(TensorFiles(model_folder), paths, ExpertShape(EXPERTS, 64, 32))


@pytest.fixture(scope="module")
def resident(store):
    cache = ExpertCache(store, store.total)
    return {layer: OffloadedExperts(cache, layer, silu) for layer in store.layers}


def rows_of(*counts):
    """A pass of so many rows of each sequence."""
    return Rows.of([([1] * count, Span((number,), 3, count)) for number, count in enumerate(counts)])


def heard(linked):
    """What the policy is told of."""
    calls, use = [], linked.cache.policy.use

    def hear(row, experts):
        calls.append((row, list(experts)))
        use(row, experts)

    linked.cache.policy.use = hear
    return calls


@given(st.lists(st.integers(1, 5), min_size=1, max_size=8))
def test_each_sequence_goes_on_from_its_last_row(counts):
    ends = rows_of(*counts).ends
    row, sequences = 0, []
    for count in counts:
        row += count
        sequences.append((row - 1, count > 1))
    begun, decoded = (tuple(row for row, is_prompt in sequences if is_prompt is kind) for kind in (True, False))
    assert ends == Ends(begun, decoded)


def narrow(call):
    """The same rows with half of the experts."""
    x, index, weights = call
    return x, (index[:, :1] + torch.arange(4)) % 8, weights


@pytest.mark.parametrize("slots", [6, 16, 40])
@pytest.mark.parametrize("wide", [False, True], ids=["half of the experts", "nearly all"])
def test_the_policy_hears_of_the_experts_of_all_decoding_rows(store, resident, slots, wide):
    linked = Linked(store, slots, many_pairs=32)
    calls, wanted = heard(linked), []
    with computing(rows_of(*[1] * 40)):
        for number in range(3):
            for layer in range(LAYERS):
                call = batch(40, 10 * number + layer)
                call = call if wide else narrow(call)
                assert torch.equal(linked(layer, *call), resident[layer](*call))
                linked.link.advance(1e-4)
                wanted.append((layer, call[1].unique().tolist()))
    assert calls == wanted
    assert (linked.transfers.counts.prefetched_bytes > 0) == wide, "the next layer's, unseen"


def test_a_mixed_pass_is_heard_of_by_what_goes_on(store, resident):
    """Of a chunk of a prompt its last row, of decoding sequences all."""
    linked = Linked(store, 16, many_pairs=32)
    calls, call = heard(linked), batch(40, 3)
    with computing(rows_of(1, 1, 30, 8)):
        assert torch.equal(linked(0, *call), resident[0](*call))
    assert calls == [(0, call[1][[0, 1, 31, 39]].unique().tolist())]
    begun = set(call[1][[31, 39]].flatten().tolist())
    assert begun <= {ref.expert for ref in linked.cache.resident}


class Fixed(Policy):
    """Would rather keep experts with low numbers."""

    def _note(self, row, experts_N):
        pass

    def scores(self):
        return -np.tile(np.arange(float(self.experts)), (self.layers, 1))


def test_what_takes_turns_takes_no_slot_that_the_policy_would_rather_keep(store, resident):
    """All experts in every step, half of them with a slot: half of the wants are hits."""
    linked = Linked(store, 32, policy=Fixed(LAYERS, EXPERTS), many_pairs=32)
    for number in range(4):
        with computing(rows_of(*[1] * 40)):
            for layer in range(LAYERS):
                call = batch(40, 10 * number + layer)
                assert torch.equal(linked(layer, *call), resident[layer](*call))
                linked.link.advance(1e-4)
        if number == 1:
            hits, misses = linked.cache.counts.hits, linked.cache.counts.misses
    assert all(ref.expert < 8 for ref in linked.cache.resident)
    hits, misses = linked.cache.counts.hits - hits, linked.cache.counts.misses - misses
    assert hits >= 0.45 * (hits + misses)


def test_an_expert_that_the_policy_has_come_to_prefer_gets_a_slot(store, resident):
    """Before, other experts had the slots, and are not wanted any more."""
    linked = Linked(store, 32, policy=LRU(LAYERS, EXPERTS), many_pairs=32)
    lists = {0: torch.arange(8), 1: torch.arange(4, 16)}
    for turn, steps in ((0, 3), (1, 3)):
        for number in range(steps):
            with computing(rows_of(*[1] * 24)):
                for layer in range(LAYERS):
                    x, _, weights = batch(24, number + layer)
                    pool = lists[turn]
                    index = torch.stack([pool[(t + torch.arange(4)) % len(pool)] for t in range(24)])
                    assert torch.equal(linked(layer, x, index, weights), resident[layer](x, index, weights))
                    linked.link.advance(1e-4)
    for layer in range(LAYERS):
        assert {ref.expert for ref in linked.cache.resident if ref.layer == layer} <= set(range(4, 16))


def test_more_than_32_sequences_decode_over_cache_planner_and_predictor(model_folder, prompts):
    """40 sequences in one step: the same texts, with hits, prefetches, and misses that the CPU computes."""
    asked = [prompts[number % 16] + [number + 1] for number in range(40)]
    plain = [g.token_ids for g in LLM(model_folder, device="cpu").generate(asked, 6)]
    for crossing in (
        Crossing(link=SimulatedLink(rate=5e7)),
        Crossing("next_gate", link=SimulatedLink(rate=5e7)),
        Crossing(cpu=True, profile=EVEN, link=SimulatedLink(rate=5e7)),
    ):
        with LLM(model_folder, 0.5, device="cpu", poison=True, crossing=crossing) as llm:
            llm.executor.many_pairs = 64  # 4 experts a row
            for number, prompt in enumerate(asked):
                llm.engine.submit(Request(f"{number}", tuple(prompt), max_new_tokens=6))
            made, calls = {}, heard(llm)
            while llm.engine.has_work():
                for output in llm.engine.step():
                    made.setdefault(output.id, []).extend(output.new_ids)
            assert [tuple(made[f"{number}"]) for number in range(40)] == plain
            assert len(calls[-1][1]) > 8, "more than two rows' experts"
            counts = llm.cache.counts
            assert counts.hits > 0
            assert (counts.computed > 0) == crossing.cpu
