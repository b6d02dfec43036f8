"""The executor behind a simulated link: its bits are those of the path without one, whatever travels when."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn.functional import silu

from inference.cache import ExpertCache
from inference.errors import InferenceError
from inference.expert_block import ExpertShape
from inference.experts import OffloadedExperts
from inference.policies import LRU
from inference.predictors import Lookahead, SameAsLast
from inference.store import ExpertStore, TensorFiles
from inference.transfer import SimulatedLink
from tests.inference.linked import Linked

LAYERS, EXPERTS, TOP_K, BLOCK = 4, 16, 4, 3 * 64 * 32 * 4


@pytest.fixture(scope="module")
def store(model_folder):
    paths = {layer: f"model.layers.{layer}.mlp.experts" for layer in range(LAYERS)}
    return ExpertStore(TensorFiles(model_folder), paths, ExpertShape(EXPERTS, 64, 32))


@pytest.fixture(scope="module")
def resident(store):
    """The path without a link, everything resident."""
    cache = ExpertCache(store, store.total)
    return {layer: OffloadedExperts(cache, layer, silu) for layer in store.layers}


def batch(tokens, seed, sticky=False):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, 64, generator=generator)
    scores = torch.rand(tokens, EXPERTS, generator=generator)
    if sticky:  # half of the choices are always the same
        scores[:, :2] += 1
    return x, scores.argsort(dim=1, descending=True)[:, :TOP_K], torch.rand(tokens, TOP_K, generator=generator)


def check(linked, resident, passes, tokens, sticky=False, compute_s=2e-5):
    for number in range(passes):
        for layer in range(LAYERS):
            call = batch(tokens, 100 * number + layer, sticky)
            assert torch.equal(linked(layer, *call), resident[layer](*call)), (number, layer)
            linked.link.advance(compute_s)
            linked.transfers.pump()


@pytest.mark.parametrize("predictor", [None, lambda *m: SameAsLast(*m, lead=2)], ids=["demand", "prefetch"])
@pytest.mark.parametrize("banks", [False, True], ids=["staged", "banked"])
@pytest.mark.parametrize("slots", [0, 1, 6, 16, 64])
def test_bits_are_those_of_the_resident_path(store, resident, slots, banks, predictor):
    for tokens in (1, 5):
        linked = Linked(store, slots, banks=banks, predictor=predictor)
        check(linked, resident, 6, tokens, sticky=True)
        assert slots or not linked.cache.resident
        counts, moved = linked.cache.counts, linked.transfers.counts
        assert moved.demanded_bytes == counts.misses * BLOCK == counts.bytes_fetched
        assert (moved.staged_bytes == 0) == banks
        if slots == 64:
            assert counts.hits > counts.misses
    assert slots != 16 or predictor is None or counts.useful > 0


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    slots=st.integers(0, 20),
    calls=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 9), st.integers(0, 99)), max_size=12),
    many=st.sampled_from([8, 24, 1 << 30]),
    compute_us=st.sampled_from([0, 5, 500]),
    lead=st.integers(0, 4),
)
def test_bits_hold_for_any_calls_in_any_order(store, resident, slots, calls, many, compute_us, lead):
    linked = Linked(store, slots, predictor=lambda *m: SameAsLast(*m, lead=lead), many_pairs=many)
    for layer, tokens, seed in calls:
        call = batch(tokens, seed, sticky=True)
        assert torch.equal(linked(layer, *call), resident[layer](*call))
        linked.link.advance(compute_us * 1e-6)
    counts = linked.cache.counts
    held = int((linked.cache.slot_LE >= 0).sum())
    assert held + linked.cache.free == max(slots, 1)
    assert counts.useful + counts.wasted <= linked.transfers.counts.prefetched_bytes // BLOCK + len(calls) * slots


def test_prefill_streams_and_leaves_what_decoding_needs(store, resident):
    linked = Linked(store, 16, many_pairs=32)
    check(linked, resident, 4, 1, sticky=True)
    before = set(linked.cache.resident)
    fetched, demanded = linked.cache.counts.misses, linked.transfers.counts.demanded_bytes
    for layer in range(LAYERS):
        call = batch(40, layer)
        last = set(call[1][-1].tolist())
        assert torch.equal(linked(layer, *call), resident[layer](*call))
        assert last <= {ref.expert for ref in linked.cache.resident if ref.layer == layer}, "decoding begins with these"
    kept = before & set(linked.cache.resident)
    assert len(kept) >= 16 - LAYERS * TOP_K
    assert linked.cache.counts.misses > fetched + 16, "more than the slots hold went by"
    # Layers behind the first were on their way while the one before was computed.
    counts = linked.transfers.counts
    assert counts.prefetched_bytes > 2 * (counts.demanded_bytes - demanded)


def test_a_prefill_into_an_empty_cache_fills_it_evenly(store, resident):
    linked = Linked(store, 24, many_pairs=32)
    check(linked, resident, 1, 40)
    assert [linked.cache.held(layer) for layer in range(LAYERS)] == [6] * LAYERS


def test_a_call_without_tokens_asks_for_nothing(store):
    linked = Linked(store, 6, predictor=SameAsLast)
    assert linked(1, *batch(0, 0)).shape == (0, 64)
    assert linked.transfers.counts.demanded_bytes == 0


def test_the_link_begins_before_the_policy_has_its_turn(store, resident):
    """Where a slot is free, what is demanded is on the link when the policy hears of the call."""
    linked = Linked(store, 32)
    check(linked, resident, 3, 1)
    heard = []
    use = linked.cache.policy.use

    def hear(row, experts):
        heard.append(linked.transfers.counts.demanded_bytes)
        use(row, experts)

    linked.cache.policy.use = hear
    misses, before, early = linked.cache.counts.misses, linked.transfers.counts.demanded_bytes, 0
    for number in range(8):
        free = linked.cache.free
        linked(0, *batch(1, 500 + number))
        early += heard[-1] > before and linked.cache.counts.misses - misses <= free
        misses, before = linked.cache.counts.misses, linked.transfers.counts.demanded_bytes
    assert early >= 3
    assert linked.cache.free == 2
    assert len(heard) == 8


class Oracle(Lookahead):
    """Scores that say what the next layer will want, computed from what the device part is given."""

    def __init__(self, layers, experts, top_k):
        super().__init__(layers, experts, top_k, lead=1, device_part=self.scores)
        self.number = 0

    def scores(self, row, x_TH):
        wanted = choice(self.number, row + 1)
        return (
            torch.zeros(1, EXPERTS).index_fill(1, wanted, 1.0) if row + 1 < LAYERS else torch.full((1, 16), torch.nan)
        )


def choice(number, row):
    """Eight experts of each layer take turns: with four slots for each layer, LRU misses them all."""
    return torch.arange(4) + 4 * (number % 2) + row


def decode(store, predictor):
    linked = Linked(store, 16, policy=LRU(LAYERS, EXPERTS), predictor=predictor, banks=True, window_bytes=1 << 20)
    for number in range(60):
        for layer in range(LAYERS):
            if predictor is not None:
                linked.prefetcher.predictor.number = number
            x, _, weights = batch(1, layer + number)
            linked(layer, x, choice(number, layer)[None], weights)
            linked.link.advance(2e-4)
            if number == 30:
                linked.stall_then = linked.link.stall_s
    return linked


def test_a_right_prediction_hides_the_copies_of_all_layers_but_the_first(store):
    demand, ahead = decode(store, None), decode(store, Oracle)
    demand_s = demand.link.stall_s - demand.stall_then
    ahead_s = ahead.link.stall_s - ahead.stall_then
    assert demand_s > 29 * LAYERS * 4 * BLOCK / 1e9
    assert ahead_s < 0.3 * demand_s, "a quarter is the first layer's"
    counts = ahead.cache.counts
    assert counts.useful > 20 * counts.wasted
    assert ahead.prefetcher.predictor.recall == 1
    # Nothing travels twice: what is prefetched is not demanded as well.
    moved = ahead.transfers.counts
    assert moved.prefetched_bytes + moved.demanded_bytes <= 60 * LAYERS * 4 * BLOCK


class Breaking(SimulatedLink):
    """Refuses the n-th copy, or reports the failure when a mark is asked for, as CUDA does."""

    def __init__(self, copies, late):
        super().__init__(rate=1e9)
        self.left, self.late = copies, late

    def copy(self, target_B, source_B):
        self.left -= 1
        if self.left < 0 and not self.late:
            raise RuntimeError("CUDA error: unspecified launch failure")
        super().copy(target_B[: len(target_B) // 2] if self.left < 0 else target_B,
                     source_B[: len(target_B) // 2] if self.left < 0 else source_B)  # fmt: skip

    def done(self, mark):
        if self.left < 0:
            raise RuntimeError("CUDA error: unspecified launch failure")
        return super().done(mark)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("copies", [0, 3, 9])
def test_a_failed_copy_stops_the_run_and_names_the_expert(store, copies, late):
    linked = Linked(store, 8, link=Breaking(copies, late))

    def decode():
        for number in range(9):
            linked(number % LAYERS, *batch(1, number))

    with pytest.raises(InferenceError, match=r"L0\d\.E0\d\d.*: copying .* failed: CUDA error"):
        decode()
    for ref in linked.cache.resident:
        gate, up, down = store.views(ref.layer, ref.expert)
        loan = linked.cache.loan(ref.layer, ref.expert)
        linked.link.advance(1.0)
        assert torch.equal(loan.down_HI, down), "what is held resident is whole"
        assert torch.equal(loan.gate_up_2IH, torch.cat([gate, up]))
    with pytest.raises(InferenceError, match=r"must be started again, since a transfer failed: L0"):
        linked(0, *batch(1, 0))


@pytest.mark.parametrize("tokens", [1, 12])
@pytest.mark.parametrize("slots", [0, 1, 8, 64])
def test_a_call_that_is_broken_off_elsewhere_leaves_everything_in_order(store, resident, slots, tokens):
    turns = iter(range(1, 10_000))

    def breaking(gate):
        if next(turns) % 37 == 5:
            raise MemoryError("out of memory")
        return silu(gate)

    linked = Linked(store, slots, act=breaking, many_pairs=32, predictor=lambda *m: SameAsLast(*m, lead=2))
    broken = 0
    for number in range(6):
        for layer in range(LAYERS):
            call = batch(tokens, 10 * number + layer, sticky=True)
            try:
                got = linked(layer, *call)
            except MemoryError:
                broken += 1
                continue
            assert torch.equal(got, resident[layer](*call))
            linked.link.advance(1e-5)
    assert 0 < broken < 20
    assert int((linked.cache.slot_LE >= 0).sum()) + linked.cache.free == max(slots, 1)


def test_a_short_read_behind_the_link_names_layer_expert_and_tensor(store, monkeypatch):
    linked = Linked(store, 8)

    def torn(layer, expert, layout, block_B):
        block_B[:7].zero_()
        raise InferenceError(f"L{layer:02}.E{expert:03}.down_proj: tensor x: file: ends before byte 5")

    monkeypatch.setattr(store, "read", torn)
    with pytest.raises(InferenceError, match=r"L02\.E\d+\.down_proj.*ends before"):
        linked(2, *batch(1, 0))
    assert linked.cache.resident == ()


class Lane:
    """Computes missing experts beside the device, by the naive formula."""

    def __init__(self, store):
        self.store, self.calls = store, []

    def submit(self, layer, work, x_NH):
        self.calls.append((layer, [expert for expert, _ in work]))
        out, start = torch.zeros(x_NH.shape), 0
        for expert, rows in work:
            gate, up, down = self.store.views(layer, expert)
            x = x_NH[start : start + rows]
            out[start : start + rows] = (silu(x @ gate.T) * (x @ up.T)) @ down.T
            start += rows

        class Done:
            def result(self):
                return out

        return Done()


@pytest.mark.parametrize("slots", [1, 8])
def test_what_the_cpu_computes_is_not_fetched_and_close(store, resident, slots):
    lane = Lane(store)

    def plan(missing, resident_rows, worth):
        assert set(worth) == {expert for expert, _ in missing}
        half = len(missing) // 2
        return [e for e, _ in missing[half:]], [e for e, _ in missing[:half]]

    linked = Linked(store, slots, cpu=lane, plan=plan)
    for number in range(4):
        for layer in range(LAYERS):
            call = batch(3, number * 7 + layer)
            torch.testing.assert_close(linked(layer, *call), resident[layer](*call), rtol=1e-5, atol=1e-5)
    computed = sum(len(experts) for _, experts in lane.calls)
    assert computed == linked.cache.counts.computed > 8
    wanted = linked.cache.counts.hits + linked.cache.counts.misses + computed
    assert wanted == sum(
        len(set(batch(3, n * 7 + layer)[1].flatten().tolist())) for n in range(4) for layer in range(4)
    )
