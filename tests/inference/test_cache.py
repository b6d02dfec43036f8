from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from inference.cache import ExpertCache, _allocate
from inference.expert_block import ExpertBlock, ExpertShape
from inference.policies import LRU
from inference.store import ExpertStore, TensorFiles
from moe.refs import ExpertRef

CALLS = st.lists(
    st.tuples(st.integers(0, 3), st.lists(st.integers(0, 15), min_size=1, max_size=9, unique=True)), max_size=25
)


@pytest.fixture(scope="module")
def store(model_folder):
    paths = {layer: f"model.layers.{layer}.mlp.experts" for layer in range(4)}
    return ExpertStore(TensorFiles(model_folder), paths, ExpertShape(16, 64, 32))


def simulate(calls, slots):
    """Hits and misses of an LRU in which all experts of a call are equally recent, the resident ones served first."""
    last, resident, hits, misses = {}, set(), 0, 0
    for now, (layer, experts) in enumerate(calls):
        keys = [(layer, e) for e in experts]
        last |= dict.fromkeys(keys, now)
        ordered = sorted(keys, key=lambda k: k not in resident)
        for start in range(0, len(ordered), max(slots, 1)):
            group = ordered[start : start + max(slots, 1)]
            for key in group:
                hits += key in resident
                misses += key not in resident
            resident |= set(group)
            while len(resident) > max(slots, 1):
                resident.remove(min(resident - set(group), key=lambda k: (last[k], k)))
            if not slots:
                resident.clear()
    return hits, misses, list(resident)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(calls=CALLS, slots=st.integers(0, 12))
def test_lends_the_right_weights_and_counts_as_a_simulated_lru(store, calls, slots):
    cache = ExpertCache(store, slots, poison=True)
    for layer, experts in calls:
        lent = []
        for group in cache.lend(layer, experts):
            assert len(group) <= max(slots, 1)
            for loan in group:
                gate, up, down = store.views(layer, loan.expert)
                assert torch.equal(loan.gate_up_2IH, torch.cat([gate, up]))
                assert torch.equal(loan.down_HI, down)
                lent.append(loan.expert)
        assert sorted(lent) == sorted(experts)
    hits, misses, resident = simulate(calls, slots)
    assert (cache.counts.hits, cache.counts.misses) == (hits, misses)
    assert cache.counts.bytes_fetched == misses * store.bytes_per_expert
    assert cache.resident == tuple(sorted(ExpertRef(*key) for key in resident))


def test_slots_are_one_allocation_of_the_budget(store):
    cache = ExpertCache(store, 6)
    before = (cache.gate_up_C2IH.data_ptr(), cache.down_CHI.data_ptr())
    assert cache.blocks_CB.untyped_storage().nbytes() == 6 * store.bytes_per_expert
    for layer in range(4):
        for _ in cache.lend(layer, range(16)):
            pass
    assert before == (cache.gate_up_C2IH.data_ptr(), cache.down_CHI.data_ptr())
    assert cache.blocks_CB.untyped_storage().nbytes() == 6 * store.bytes_per_expert
    assert len(cache.resident) == 6


def test_given_up_slots_hold_nan(store):
    cache = ExpertCache(store, 0, poison=True)
    for (loan,) in cache.lend(1, [3, 4]):
        assert loan.down_HI.isfinite().all()
    assert cache.resident == ()
    assert cache.gate_up_C2IH.isnan().all()
    assert cache.down_CHI.isnan().all()


class MRU(LRU):
    """Evicts what was touched last: the policy that is hardest on the experts in use."""

    def scores(self):
        return -super().scores()


def test_an_expert_of_the_current_group_is_never_evicted(store):
    cache = ExpertCache(store, 3, poison=True, policy=MRU(4, 16))
    list(cache.lend(0, [0, 1, 2]))
    (group,) = cache.lend(0, [2, 8, 9])
    assert {loan.expert for loan in group} == {2, 8, 9}
    assert all(loan.gate_up_2IH.isfinite().all() for loan in group)
    assert len({loan.down_HI.data_ptr() for loan in group}) == 3
    assert (cache.counts.hits, cache.counts.misses) == (1, 5)


def test_a_failed_read_leaves_no_half_filled_expert(store, monkeypatch):
    cache = ExpertCache(store, 2)
    list(cache.lend(0, [0, 1]))

    def torn(layer, expert, layout, block_B):
        block_B[: layout.elements // 2].zero_()
        raise OSError("the disk went away")

    with monkeypatch.context() as patch:
        patch.setattr(store, "read", torn)
        with pytest.raises(OSError, match="went away"):
            list(cache.lend(0, [2]))
    assert cache.resident == (ExpertRef(0, 1),)
    ((loan,),) = cache.lend(0, [2])
    assert torch.equal(loan.down_HI, store.views(0, 2)[2])


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("hidden", [5, 64])
def test_every_part_of_every_slot_is_aligned_and_its_own(hidden, dtype, biased):
    layout = ExpertBlock(ExpertShape(4, hidden, 7, biased=biased), dtype)
    blocks_CB = _allocate(3, layout, "cpu").zero_()
    stacked = layout.stacked(blocks_CB)
    assert [tuple(part.shape) for part in stacked] == [(3, *part.shape) for part in layout.parts]
    assert len(stacked) == (4 if biased else 2)
    for slot, block_B in enumerate(blocks_CB):
        for stack, part in zip(stacked, layout.split(block_B), strict=True):
            assert part.is_contiguous()
            assert part.data_ptr() % 64 == 0
            assert stack[slot].data_ptr() == part.data_ptr()
            part += 1
    assert blocks_CB.max() == 1, "parts do not overlap"
    assert int(blocks_CB.float().sum()) == 3 * layout.shape.elements
