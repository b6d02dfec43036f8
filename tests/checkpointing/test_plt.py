"""The meter counts exactly what a simulated run has lost, and stops a lossy mode in time."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpointing.partial import Ages, Experts, select
from checkpointing.plt import Limits, Meter, MeterError, decide, doublings, expected_loss
from moe.refs import ExpertRef


class Run:
    """A run whose experts' state is just the number of tokens they have learnt from. It captures to memory every step
    and to disk now and then, and can lose either; what it lost in all is what its experts have not learnt from."""

    def __init__(self, experts: Experts, k: int, seed: int) -> None:
        self.experts, self.k, self.random = experts, k, random.Random(seed)
        self.step = 0
        self.routed: dict[ExpertRef, int] = dict.fromkeys(experts.all(), 0)
        self.learnt: dict[ExpertRef, int] = dict(self.routed)
        self.meter = Meter.new(experts.layers, experts.count, k)
        self.memory: dict[ExpertRef, tuple[int, int]] = {}
        self.disk: dict[ExpertRef, tuple[int, int]] = {}
        self.on_disk: tuple[int, bytes, dict[ExpertRef, int]] | None = None
        self.persists = 0
        self._capture(list(experts.all()))
        self.persist(self.experts.count)

    def train(self) -> None:
        self.step += 1
        for ref in self.routed:
            tokens = self.random.randrange(20)
            self.routed[ref] += tokens
            self.learnt[ref] += tokens
        self._capture(select(self.experts, self.step, self.k))

    def _capture(self, chosen: list[ExpertRef] | tuple[ExpertRef, ...]) -> None:
        self.memory |= {ref: (self.step, self.learnt[ref]) for ref in chosen}
        self.meter = self.meter.captured(self.step, self.table(self.routed), chosen)

    def persist(self, k: int) -> None:
        chosen = select(self.experts, self.persists, k)
        self.persists += 1
        self.disk |= {ref: self.memory[ref] for ref in chosen}
        self.meter = self.meter.persisted(chosen)
        self.on_disk = (self.step, self.meter.dump(), dict(self.routed))

    def recover(self, disk: bool) -> None:
        source = self.disk if disk else self.memory
        if disk:
            assert self.on_disk is not None
            self.step, blob, routed = self.on_disk
            self.meter, self.routed = Meter.load(blob), dict(routed)
            self.memory = dict(self.disk)
        self.learnt = {ref: learnt for ref, (_, learnt) in source.items()}
        self.meter = self.meter.recovered({ref: step for ref, (step, _) in source.items()})

    def lost(self) -> int:
        return sum(self.routed.values()) - sum(self.learnt.values())

    def table(self, values: Mapping[ExpertRef, int]) -> list[list[int]]:
        return [[values[ExpertRef(layer, e)] for e in range(self.experts.count)] for layer in self.experts.layers]


events = st.lists(st.sampled_from(["train"] * 6 + ["persist", "memory", "disk"]), max_size=60)


@given(events, st.integers(1, 6), st.integers(1, 6), st.integers(0, 99))
@settings(max_examples=200, deadline=None)
def test_counts_exactly_what_was_not_learnt(happened: list[str], k: int, k_persist: int, seed: int) -> None:
    """Over any order of steps, checkpoints and faults of both tiers."""
    run = Run(Experts((0, 2), 6), k, seed)
    for event in happened:
        if event == "train":
            run.train()
        elif event == "persist":
            run.persist(k_persist)
        else:
            run.recover(disk=event == "disk")
        assert sum(run.meter.lost) == run.lost()
        assert Meter.load(run.meter.dump()) == run.meter


@given(st.integers(2, 20), st.integers(0, 20), st.integers(0, 99))
@settings(deadline=None)
def test_an_age_it_does_not_remember_counts_as_older(steps: int, age: int, seed: int) -> None:
    """Never too little: what is lost at the true age is at most what the meter says."""
    experts = Experts((0,), 1)
    run = Run(experts, 1, seed)
    learnt = [0]
    for _ in range(steps):
        run.train()
        learnt.append(run.routed[ExpertRef(0, 0)])
    age = min(age, steps)
    assert run.meter.loss_of({ExpertRef(0, 0): age})[0] >= learnt[-1] - learnt[age]


@pytest.mark.parametrize("k", [1, 2, 4, 8])
@pytest.mark.parametrize("every", [1, 3])
def test_expected_loss_is_that_of_a_simulation(k: int, every: int) -> None:
    """(N/K - 1)/2 x I/I_total within 2 %: balanced routing with noise, one fault at a random checkpoint."""
    experts, steps, per_step, chance = Experts(tuple(range(6)), 16), 400, 640, random.Random(k)
    limits = Limits(routed_tokens=per_step * steps, steps=steps)
    meter, routed = Meter.new(experts.layers, 16, k), [[0] * 16 for _ in experts.layers]
    ages, losses = Ages.unsaved(experts), []
    for step in range(1, steps + 1):
        for row in routed:
            for expert in range(16):
                row[expert] += per_step // 16 + chance.choice((-5, 5))
        if step % every == 0:
            chosen = select(experts, step // every, k)
            meter, ages = meter.captured(step, routed, chosen), ages.saved(step, chosen)
            if step >= every * 16 and chance.random() < 0.2:
                losses.append(meter.recovered(ages.steps).plt(limits))
    assert len(losses) > 15
    assert sum(losses) / len(losses) == pytest.approx(expected_loss(k, 16, every, steps), rel=0.02)


def test_saving_all_experts_loses_nothing() -> None:
    run = Run(Experts((0,), 4), 4, seed=1)
    for _ in range(3):
        run.train()
    run.recover(disk=False)
    assert run.meter.lost == (0,)
    assert run.meter.faults == 1
    assert expected_loss(4, 4, 1, 10) == 0


def test_unsaved_tokens_start_again_at_a_capture_and_at_a_recovery() -> None:
    refs = [ExpertRef(5, 0), ExpertRef(5, 1)]
    meter = Meter.new([5], 2, 1).captured(1, [[3, 4]], refs[:1])
    assert meter.unsaved() == ((0, 4),)
    meter = meter.captured(2, [[10, 6]], [])
    assert meter.unsaved() == ((7, 6),)
    assert meter.recovered({refs[0]: 1, refs[1]: -1}).unsaved() == ((0, 0),)


def test_counts_of_another_shape_or_that_fall_are_refused() -> None:
    meter = Meter.new([5], 2, 1).captured(1, [[3, 4]], [])
    with pytest.raises(MeterError, match="1 layers with 2 experts"):
        meter.captured(2, [[1, 2, 3]], [])
    with pytest.raises(MeterError, match="layer 5: cumulative routed tokens fell"):
        meter.captured(2, [[3, 3]], [])
    with pytest.raises(ValueError, match="K=3 of 2"):
        Meter.new([5], 2, 3)


@pytest.mark.parametrize("blob", [b"", b"[]", b"{}", b'{"layers": 3}'])
def test_other_bytes_are_no_meter(blob: bytes) -> None:
    with pytest.raises(MeterError, match="lost-token meter"):
        Meter.load(blob)


def test_its_state_is_json() -> None:
    meter = Meter.new([0, 1], 2, 1).captured(1, [[3, 4], [5, 6]], [ExpertRef(1, 0)]).persisted([ExpertRef(1, 0)])
    values = json.loads(meter.dump())
    assert values["memory"] == [[[-1, 0], [-1, 0]], [[1, 5], [-1, 0]]]
    assert values["disk"] == [[[], []], [[[1, 5]], []]]


# -- decisions ---------------------------------------------------------------------------------------------------------

LIMITS = Limits(routed_tokens=10_000, steps=10_000)


def lossy(lost: int, k: int = 1, experts: int = 8, steps: int = 10_000) -> Meter:
    """One layer after all steps, ``lost`` of its 10,000 copies under this K."""
    refs = [ExpertRef(0, e) for e in range(experts)]
    meter = Meter.new([0], experts, k).captured(steps, [[10_000 - lost] + [0] * (experts - 1)], refs)
    meter = meter.captured(steps, [[10_000] + [0] * (experts - 1)], [])
    return meter.recovered(dict.fromkeys(refs, steps)) if lost else meter


def test_the_proportion_is_of_copies_that_were_counted() -> None:
    """Padding and dropped copies are in neither number, in each layer by itself; what is to come goes on alike."""
    limits = Limits(routed_tokens=1000, steps=10)
    meter = Meter.new([3, 4], 2, 1).begins(2).captured(4, [[30, 10], [20, 0]], [])
    assert meter.plt(limits) == 0.0
    lost = meter.recovered({ExpertRef(layer, e): -1 for layer in (3, 4) for e in (0, 1)})
    assert lost.lost == (40, 20)
    assert lost.plt(limits) == pytest.approx(2 / 10), "two of ten steps, whatever they routed"
    later = lost.captured(8, [[50, 30], [40, 40]], [])
    assert later.plt(limits) == pytest.approx((40 / (80 * 10 / 6) + 20 / (80 * 10 / 6)) / 2)
    before = {key: value for key, value in json.loads(lost.dump()).items() if key not in ("begun", "step")}
    assert Meter.load(json.dumps(before).encode()).plt(limits) == pytest.approx(60 / 2 / 1000)


def test_nothing_changes_while_the_loss_is_within_its_share() -> None:
    # K = 1, 2, 4 lose something: a third of 3.75 % each.
    decision = decide(lossy(124), LIMITS, first_k=1, every=1)
    assert (decision.k, decision.mode) == (1, None)
    assert "K=1 stays" in decision.reason


def test_k_doubles_after_a_recovery_that_exceeds_its_share() -> None:
    meter = lossy(126)
    decision = decide(meter, LIMITS, first_k=1, every=1)
    assert (decision.k, decision.mode) == (2, None)
    assert "K=2 from now on" in decision.reason
    assert "share is 1.25%" in decision.reason
    grown = meter.with_k(2)
    assert grown.plt(LIMITS) == meter.plt(LIMITS)
    assert grown.plt_under_k(LIMITS) == 0
    assert decide(grown, LIMITS, first_k=1, every=1).k == 2, "the share counts from the change"
    assert meter.with_k(1) is meter
    assert decide(lossy(375 - 80, k=4), LIMITS, first_k=1, every=1).k == 8
    fixed = Limits(10_000, 10_000, dynamic_k=False)
    assert decide(meter, fixed, first_k=1, every=1).k == 1


@pytest.mark.parametrize("fallback", ["wal", "dense"])
@pytest.mark.parametrize("dynamic", [True, False])
def test_reaching_max_plt_ends_the_lossy_mode(fallback: str, dynamic: bool) -> None:
    limits = Limits(10_000, 10_000, dynamic_k=dynamic, fallback=fallback)
    assert decide(lossy(374, k=4), limits, first_k=4, every=1).mode is None or dynamic
    for lost in (375, 5000):
        decision = decide(lossy(lost), limits, first_k=1, every=1)
        assert decision.mode == fallback
        assert "max_plt 3.75% is reached" in decision.reason
        assert f"mode {fallback}" in decision.reason


def test_a_fault_that_would_reach_it_is_foreseen() -> None:
    # 100 steps, K = 1 of 8, every step: a fault costs 3.5 %.
    short = Limits(routed_tokens=10_000, steps=100, dynamic_k=False)
    assert expected_loss(1, 8, 1, 100) == pytest.approx(0.035)
    assert decide(lossy(0, steps=100), short, first_k=1, every=1).mode is None
    foreseen = decide(lossy(30, steps=100), short, first_k=1, every=1)
    assert foreseen.mode == "wal"
    assert "expected to lose 3.50%" in foreseen.reason
    dynamic = decide(lossy(30, steps=100), Limits(routed_tokens=10_000, steps=100), first_k=1, every=1)
    assert (dynamic.k, dynamic.mode) == (2, None), "K grows first, if it may"
    assert "too near max_plt" in dynamic.reason
    hopeless = decide(lossy(0, steps=5), Limits(routed_tokens=10_000, steps=5), first_k=1, every=1)
    assert hopeless.mode == "wal"


@given(st.integers(0, 1000), st.integers(0, 6), st.sampled_from([8, 12, 64]), st.integers(1, 5), st.integers(10, 10**5))
def test_a_decision_never_expects_to_reach_max_plt(lost: int, power: int, n: int, every: int, steps: int) -> None:
    k = min(2**power, n)
    limits = Limits(10_000, steps)
    meter = lossy(lost, k, n, steps)
    decision = decide(meter, limits, first_k=1, every=every)
    if decision.mode is None:
        assert k <= decision.k <= n
        assert meter.plt(limits) + expected_loss(decision.k, n, every, steps) < limits.max_plt
    else:
        assert decision.mode == "wal"
        assert decision.reason.endswith("going on in mode wal")


def test_doublings_end_with_all_experts() -> None:
    assert doublings(1, 8) == [1, 2, 4, 8]
    assert doublings(3, 10) == [3, 6, 10]
    assert doublings(5, 5) == [5]
