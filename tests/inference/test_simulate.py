"""Replays against a cache written the slow way, and against all there is to evict."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inference.policies import LRU, AgedLFU, LayeredLRU
from inference.shadow import Hedge, Shadow
from inference.simulate import (
    BELADY,
    BYPASS,
    FIXED,
    POLICIES,
    Routing,
    compare,
    gap_closed,
    read_routing,
    replay,
    table,
)
from moe.tracefile import TraceError, TraceHeader, TraceRecord, TraceWriter, trace_file
from trainer.cli import main


def drawn(kind: str, tokens: int = 150, layers: int = 4, experts: int = 24, top_k: int = 3, seed: int = 0) -> Routing:
    """Routing with popular experts, with experts that a text stays with, or with neither."""
    rng = np.random.default_rng(seed)
    popular_LE = np.stack([rng.permutation(-1.2 * np.log(np.arange(1, experts + 1))) for _ in range(layers)])
    index_TLK = np.zeros((tokens, layers, top_k), dtype=int)
    for t, row in itertools.product(range(tokens), range(layers)):
        logits_E = rng.gumbel(size=experts)
        if kind == "popular":
            logits_E += popular_LE[row]
        if kind == "sticky" and t:
            logits_E[index_TLK[t - 1, row]] += 3
        index_TLK[t, row] = np.argsort(-logits_E)[:top_k]
    return Routing(index_TLK, experts)


def best_possible(calls: list[tuple[int, ...]], slots: int, bypass: bool) -> int:
    """Fewest misses of any eviction, by trying all of them."""
    states = {frozenset(): 0}
    for wanted in calls:
        after: dict[frozenset, int] = {}
        for held, misses in states.items():
            missed = misses + len(set(wanted) - held)
            every = held | set(wanted)
            must = frozenset() if bypass else frozenset(wanted)
            for kept in itertools.combinations(sorted(every), min(slots, len(every))):
                if must <= set(kept):
                    key = frozenset(kept)
                    after[key] = min(after.get(key, missed), missed)
        states = after
    return min(states.values())


@settings(max_examples=40, deadline=None)
@given(
    picks=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=2, unique=True), min_size=2, max_size=12),
    slots=st.integers(2, 4),
    name=st.sampled_from([BELADY, BYPASS]),
)
def test_belady_misses_as_little_as_any_eviction_could(picks, slots, name):
    width = max(map(len, picks))
    index_TLK = np.array([[list(p) + [99] * (width - len(p))] for p in picks])  # 99: no expert
    found = replay(Routing(index_TLK, 4), name, slots, warm_up=0)
    assert found.misses == best_possible([tuple(p) for p in picks], slots, name == BYPASS)


def test_a_shadow_never_holds_more_than_its_slots_and_counts_what_it_lacks():
    routing, slots = drawn("sticky"), 10
    shadow, held = Shadow(LRU(4, 24), slots), set()
    for _, row, experts_N in routing.calls():
        missed = shadow.use(row, experts_N)
        assert missed == sum((row, int(e)) not in held for e in experts_N)
        held = set(map(tuple, np.argwhere(shadow.resident_LE).tolist()))
        assert len(held) == shadow.held <= slots
        assert {(row, int(e)) for e in experts_N} <= held


def test_calls_that_want_more_than_there_are_slots_pass_through():
    shadow = Shadow(LRU(1, 8), 3)
    assert shadow.use(0, range(8)) == 8
    assert shadow.held == int(shadow.resident_LE.sum()) == 3
    assert shadow.use(0, range(8)) == 5


@pytest.mark.parametrize("kind", ["popular", "sticky", "neither"])
def test_the_hedge_is_within_a_point_of_the_best_fixed_policy(kind):
    for budget, found in compare(drawn(kind, tokens=400), [0.1, 0.25]).items():
        rates = {one.policy: one.hit_rate for one in found}
        candidates = Hedge(4, 24, 1).shadows
        assert rates["hedge"] >= max(rates[name] for name in candidates) - 0.01, (budget, rates)
        assert rates[BYPASS] >= rates[BELADY] >= max(rates[name] for name in POLICIES)


def test_the_hedge_changes_its_mind_when_the_text_does():
    first, second = drawn("popular", seed=1), drawn("sticky", seed=1)
    hedge, leaders = Hedge(4, 24, 12, {"layered_lru": LayeredLRU, "aged_lfu": AgedLFU}), []
    for routing in (first, second):
        for _, row, experts_N in routing.calls():
            hedge.use(row, experts_N)
        leaders.append(hedge.leader)
    assert leaders == ["aged_lfu", "layered_lru"]


def test_sequences_that_come_again_are_recognised():
    """Two topics in turn: what the first token shows tells the matrix which one it is."""
    rng = np.random.default_rng(0)
    topics = [rng.integers(0, 8, (4, 2)) + 8 * topic for topic in range(2)]
    index_TLK = np.stack([topics[(t // 10) % 2] for t in range(200)])
    routing = Routing(index_TLK, 16, frozenset(range(0, 200, 10)))
    rates = {name: replay(routing, name, 10).hit_rate for name in ("activation_matrix", "lru")}
    assert rates["activation_matrix"] > rates["lru"]


def test_reads_a_trace_as_it_would_be_decoded(tmp_path):
    header = TraceHeader("qwen3_moe", (1, 3), 8, 2)
    writer = TraceWriter(trace_file(tmp_path / "trace", 0), header)
    rng, index = np.random.default_rng(0), {}
    for step in (1, 2, 3):
        for layer in (1, 3):
            if (step, layer) != (3, 3):  # a kill between two layers
                index[step, layer] = rng.integers(0, 8, (6, 2))
                writer.write(TraceRecord(step, 0, layer, index[step, layer]))
    writer.close()
    routing = read_routing(tmp_path, sequence=6)
    assert routing.index_TLK.shape == (12, 2, 2)
    assert routing.index_TLK[7, 1].tolist() == index[2, 3][1].tolist()
    assert routing.starts == {0, 6}
    assert len(read_routing(tmp_path, tokens=5).index_TLK) == 6
    with pytest.raises(TraceError, match="give the path"):
        read_routing(tmp_path / "nowhere")


def test_experts_beyond_the_models_are_refused(tmp_path):
    """Compiled policies take them for places in memory."""
    writer = TraceWriter(trace_file(tmp_path, 0), TraceHeader("qwen3_moe", (0,), 8, 2))
    writer.write(TraceRecord(1, 0, 0, np.array([[0, 1], [7, 8]])))
    writer.close()
    with pytest.raises(TraceError, match="a model of 8 does not have"):
        read_routing(tmp_path)


def test_the_table_has_every_policy_and_says_how_much_of_the_gap_is_closed():
    results = compare(drawn("sticky", tokens=60), [0.2])
    text = table(results)
    assert all(name in text for name in (*FIXED, "hedge", BELADY, BYPASS))
    assert gap_closed(0.5, 0.25, 0.75) == 0.5
    assert gap_closed(0.5, 0.75, 0.75) == 0


def test_the_command_prints_a_table_and_meets_mistakes_in_a_sentence(tmp_path, capsys):
    writer = TraceWriter(trace_file(tmp_path, 0), TraceHeader("qwen3_moe", (0,), 8, 2))
    rng = np.random.default_rng(0)
    writer.write(TraceRecord(1, 0, 0, np.stack([rng.permutation(8)[:2] for _ in range(20)])))
    writer.close()
    assert main(["simulate", str(tmp_path), "--budgets", "0.5", "--policies", "lru,hedge"]) == 0
    printed = capsys.readouterr().out
    assert "20 tokens, 1 layers of 8 experts" in printed
    assert "hedge" in printed
    for wrong, told in (
        (["--budgets", "2"], "--budgets"),
        (["--policies", "mru"], "no policy 'mru'"),
        (["--tokens", "-1"], "0 or more"),
    ):
        assert main(["simulate", str(tmp_path), *wrong]) == 2
        assert told in capsys.readouterr().err
    assert main(["simulate", str(tmp_path / "none")]) == 2
    assert "give the path" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("passes", "counted"), [([20], 0), ([1], 1), ([9, 1, 1, 1, 1, 1], 5), ([30, 1, 1, 1, 1, 40], 5)]
)
def test_a_trace_that_leaves_too_little_to_count_is_refused(tmp_path, capsys, passes, counted):
    writer = TraceWriter(tmp_path / "t", TraceHeader("qwen3_moe", (0,), 8, 2, source="serving"))
    for micro, tokens in enumerate(passes):
        writer.write(TraceRecord(1, micro, 0, np.tile([[0, 1]], (tokens, 1))))
    writer.close()
    assert main(["simulate", str(tmp_path / "t")]) == 2
    assert f"of its {len(passes)} there are {counted}; record at least 6" in capsys.readouterr().err
    assert main(["simulate", str(tmp_path / "t"), "--sequence", "4"]) == 2
    assert "says itself where sequences start, so --sequence has no effect" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["popular", "sticky"])
def test_a_hedge_that_watches_some_layers_follows_the_same_policies(kind):
    routing = drawn(kind, tokens=300, layers=8)

    def hits(stride: int) -> float:
        shadow = Shadow(Hedge(8, routing.experts, 20, stride=stride), 20)
        missed = [shadow.use(row, routing.index_TLK[t, row]) for t in range(300) for row in range(8)]
        return 1 - sum(missed[800:]) / (routing.index_TLK.shape[2] * len(missed[800:]))

    assert abs(hits(1) - hits(4)) < 0.015


def test_no_policy_passes_the_bounds_in_the_part_that_counts():
    """Belady is best for the whole trace: counted after a warm-up alone it was passed by others."""
    for seed in range(12):
        index_TLK = np.random.default_rng(seed).integers(0, 6, (24, 2, 1))
        routing = Routing(index_TLK, 6)
        for slots in (0, 2, 4, 8):
            bound = replay(routing, BELADY, slots, warm_up=0.5).misses
            assert replay(routing, BYPASS, slots, warm_up=0.5).misses <= bound
            for name in FIXED:
                assert replay(routing, name, slots, warm_up=0.5).misses >= bound, (seed, slots, name)
