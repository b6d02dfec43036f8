from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from inference.errors import InferenceError
from inference.packed import pack
from inference.transfer import SimulatedLink, TransferEngine, Urgency
from moe.refs import ExpertRef

SIZE = 100  # elements of 4 bytes


class Memory:
    """Experts whose every element is their number; ``slow`` ones must be staged, in one buffer."""

    def __init__(self, slow=()):
        self.slow, self.buffer, self.free_at = set(slow), torch.zeros(SIZE), None
        self.staged_order = []

    def block(self, ref):
        return None if ref.expert in self.slow else torch.full((SIZE,), float(ref.expert))

    def staged(self, ref, settle):
        if self.free_at is not None:
            settle(self.free_at)
        self.buffer.fill_(ref.expert)
        self.staged_order.append(ref.expert)

        def release(mark):
            self.free_at = mark

        return self.buffer, release


def engine(slow=(), chunk=100, window=200):
    """One second for 100 bytes, so four for an expert."""
    return TransferEngine(SimulatedLink(rate=100.0), Memory(slow), chunk_bytes=chunk, window_bytes=window)


def target():
    return torch.full((SIZE,), float("nan"))


def test_a_demand_is_there_after_its_time_and_not_before():
    transfers, block = engine(), target()
    transfer = transfers.demand(ExpertRef(0, 7), block)
    transfers.link.advance(3.9)
    assert not transfers.arrived(transfer)
    assert block.isnan().all()
    transfers.wait([transfer])
    assert (block == 7).all()
    assert transfers.link.stall_s == pytest.approx(0.1)
    assert transfers.counts.demanded_bytes == 4 * SIZE
    transfers.wait([transfer])
    assert transfers.link.stall_s == pytest.approx(0.1)
    assert transfers.counts.waits == 1


def test_a_demand_overtakes_what_is_queued_and_waits_for_no_more_than_the_window():
    transfers = engine(chunk=100, window=200)
    ahead = [transfers.prefetch(ExpertRef(1, e), target(), Urgency.NEXT) for e in range(5)]
    transfers.pump()
    demand = transfers.demand(ExpertRef(0, 9), target())
    transfers.wait([demand])
    assert transfers.link.now == pytest.approx(2 + 4)
    assert not any(transfers.arrived(one) for one in ahead)
    assert (demand.target_B == 9).all()


def test_the_nearer_layer_goes_first_and_pieces_of_one_expert_make_it_whole():
    transfers = engine(chunk=60, window=60)
    later = transfers.prefetch(ExpertRef(2, 2), target(), Urgency.LATER)
    near = transfers.prefetch(ExpertRef(1, 1), target(), Urgency.NEXT)
    for _ in range(6):
        transfers.pump()
        assert not transfers.arrived(near)
        transfers.link.advance(0.6)
    transfers.pump()
    transfers.link.advance(0.4)
    assert transfers.arrived(near)
    assert (near.target_B == 1).all()
    assert not later.begun
    assert transfers.counts.prefetched_bytes == 400


def test_a_prefetch_that_is_wanted_is_promoted_and_travels_once():
    transfers = engine()
    first = transfers.prefetch(ExpertRef(1, 1), target(), Urgency.NEXT)
    second = transfers.prefetch(ExpertRef(1, 2), target(), Urgency.NEXT)
    transfers.pump()
    assert first.begun and not first.complete and not second.begun  # noqa: PT018
    transfers.wait([first, second])
    assert (first.target_B == 1).all() and (second.target_B == 2).all()  # noqa: PT018
    assert transfers.link.now == pytest.approx(8)
    assert transfers.counts.promoted == 2
    transfers.pump()
    assert transfers.counts.prefetched_bytes == 2 * 4 * SIZE


def test_only_what_has_not_begun_can_be_cancelled():
    transfers = engine()
    begun = transfers.prefetch(ExpertRef(1, 1), target(), Urgency.NEXT)
    queued = transfers.prefetch(ExpertRef(1, 2), target(), Urgency.NEXT)
    transfers.pump()
    assert not transfers.cancel(begun)
    assert transfers.cancel(queued)
    for _ in range(20):
        transfers.link.advance(1)
        transfers.pump()
    assert (begun.target_B == 1).all()
    assert queued.target_B.isnan().all()
    assert transfers.counts.cancelled == 1


def test_a_staging_buffer_is_not_filled_again_before_its_copy_is_done():
    transfers = engine(slow={1, 2, 3})
    sent = [transfers.demand(ExpertRef(0, e), target()) for e in (1, 2)]
    sent.append(transfers.prefetch(ExpertRef(0, 3), target(), Urgency.NEXT))
    transfers.pump()
    transfers.wait(sent)
    assert [float(one.target_B.unique()) for one in sent] == [1, 2, 3]
    assert transfers.counts.staged_bytes == 3 * 4 * SIZE


def test_a_failure_names_the_expert():
    class Broken(SimulatedLink):
        def copy(self, target_B, source_B):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    transfers = TransferEngine(Broken(), Memory())
    with pytest.raises(InferenceError, match=r"L03\.E017: copying .*illegal memory access.*start again"):
        transfers.demand(ExpertRef(3, 17), target())
    wanted = [(ExpertRef(3, expert), target()) for expert in (4, 9)]
    with pytest.raises(InferenceError, match=r"L03\.E004, L03\.E009: copying .*illegal memory access"):
        transfers.demand_all(wanted)


@pytest.mark.parametrize("slow", [(), (2,)])
def test_several_demands_at_once_are_each_whole_when_waited_for(slow):
    transfers = engine(slow)
    sent = transfers.demand_all([(ExpertRef(0, expert), target()) for expert in (1, 2, 3)])
    transfers.wait(sent)
    assert [float(one.target_B.unique()) for one in sent] == [1, 2, 3]
    assert transfers.counts.demanded_bytes == 3 * 4 * SIZE
    assert transfers.link.now == pytest.approx(12)


ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["demand", "demand two"]), st.integers(0, 8)),
        st.tuples(st.sampled_from(["next", "later"]), st.integers(0, 9)),
        st.tuples(st.sampled_from(["cancel", "wait"]), st.integers(0, 30)),
        st.tuples(st.sampled_from(["pump", "time"]), st.integers(1, 5)),
    ),
    max_size=40,
)


@settings(max_examples=80, deadline=None)
@given(actions=ACTIONS, chunk=st.sampled_from([4, 36, 100, 400]), slow=st.sets(st.integers(0, 9)))
def test_whatever_happens_each_expert_is_whole_once_it_has_arrived(actions, chunk, slow):
    transfers, made = engine(slow, chunk, window=2 * chunk), []
    for action, number in actions:
        if action == "demand":
            made.append(transfers.demand(ExpertRef(0, number), target()))
        elif action == "demand two":
            made += transfers.demand_all([(ExpertRef(0, expert), target()) for expert in (number, number + 1)])
        elif action in ("next", "later"):
            urgency = Urgency.NEXT if action == "next" else Urgency.LATER
            made.append(transfers.prefetch(ExpertRef(0, number), target(), urgency))
        elif action == "pump":
            transfers.pump()
        elif action == "time":
            transfers.link.advance(number / 2)
        elif made:
            one = made[number % len(made)]
            if action == "cancel":
                transfers.cancel(one)
            elif not one.cancelled:
                transfers.wait([one])
                assert (one.target_B == one.ref.expert).all()
        for one in made:
            if not one.cancelled and transfers.arrived(one):
                assert (one.target_B == one.ref.expert).all()
    transfers.pump(whole=True)
    transfers.link.advance(1e6)
    for one in made:
        assert one.target_B.isnan().all() if one.cancelled else (one.target_B == one.ref.expert).all()
    moved = transfers.counts.demanded_bytes + transfers.counts.prefetched_bytes
    assert moved == 4 * SIZE * sum(not one.cancelled for one in made)


def test_what_is_packed_travels_whole_in_fewer_bytes_and_arrives_as_it_was():
    block_B = torch.randn(4096, generator=torch.Generator().manual_seed(0)).bfloat16()
    packed_N = pack(block_B)

    class Banks:
        def block(self, ref):
            return packed_N if ref.layer else block_B

    engine = TransferEngine(SimulatedLink(rate=float(len(packed_N))), Banks(), chunk_bytes=64, window_bytes=64)
    targets = torch.zeros(4, 4096, dtype=torch.bfloat16)
    demand, (both, _) = engine.demand(ExpertRef(1, 0), targets[0]), engine.demand_all(
        [(ExpertRef(layer, 1), targets[1 + layer]) for layer in (0, 1)]
    )  # fmt: skip
    assert engine.counts.demanded_bytes == 2 * len(packed_N) + block_B.nbytes
    engine.link.advance(0.99)
    assert not targets.any()
    engine.wait([demand])
    assert engine.link.now == pytest.approx(1)
    assert torch.equal(targets[0], block_B)
    engine.wait([both])
    ahead = engine.prefetch(ExpertRef(1, 2), targets[3], Urgency.NEXT)
    engine.pump()
    assert ahead.complete, "its pieces would mean nothing"
    assert engine.counts.prefetched_bytes == len(packed_N) < 0.8 * block_B.nbytes
    engine.wait([ahead])
    assert all(torch.equal(target, block_B) for target in targets)


def test_no_more_packed_prefetches_are_on_the_link_than_the_window_has_room_for():
    block_B = torch.randn(4096, generator=torch.Generator().manual_seed(0)).bfloat16()
    packed_N = pack(block_B)
    nbytes = len(packed_N)

    class Banks:
        def block(self, ref):
            return packed_N

    for window, at_once in ((2 * nbytes + 64, 2), (2 * nbytes - 1, 1), (nbytes - 1, 1)):
        engine = TransferEngine(SimulatedLink(rate=float(nbytes)), Banks(), chunk_bytes=64, window_bytes=window)
        targets = torch.zeros(3, 4096, dtype=torch.bfloat16)
        ahead = [engine.prefetch(ExpertRef(0, e), target_B, Urgency.NEXT) for e, target_B in enumerate(targets)]
        engine.pump()
        assert engine.counts.prefetched_bytes == at_once * nbytes
        engine.link.advance(1.0)
        engine.pump()
        assert engine.counts.prefetched_bytes == (1 + at_once) * nbytes
        engine.wait(ahead)
        assert all(torch.equal(target_B, block_B) for target_B in targets)


def test_demands_given_together_are_waited_for_together():
    sources = {ExpertRef(0, e): torch.full((8,), float(e)) for e in range(3)}

    class Banks:
        def block(self, ref):
            return sources[ref]

    link = SimulatedLink(rate=32.0)  # a second for each
    engine = TransferEngine(link, Banks(), chunk_bytes=32, window_bytes=32)
    targets = torch.zeros(3, 8)
    wanted = [(ref, targets[ref.expert]) for ref in sources]
    transfers = engine.demand_all(wanted[:2]) + engine.demand_all(wanted[2:])
    assert engine.counts.demanded_bytes == 96
    assert not engine.arrived(transfers[0])
    engine.wait(transfers[:1])
    assert link.now == 2.0
    assert targets[:, 0].tolist() == [0.0, 1.0, 0.0], "the third is not waited for"
    engine.wait(transfers)
    assert (link.now, targets[2, 0].item()) == (3.0, 2.0)
    assert engine.demand_all([]) == []


@pytest.mark.parametrize("start", [0.1, 1 / 3, 1234.5678])
def test_what_was_waited_for_is_there_whatever_the_clock_rounds(start):
    link = SimulatedLink(rate=3e8)
    link.advance(start)
    for number in range(1, 200):
        target = torch.zeros(number)
        link.copy(target, torch.ones(number))
        link.wait(link.mark())
        assert target.all(), number
        link.advance(1e-7 * number)
