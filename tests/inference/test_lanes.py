"""Work shared out to threads: all of it is done, by whole products, and failures reach the caller."""

from __future__ import annotations

import threading

import pytest
import torch

from inference.experts import Call
from inference.lanes import WORTHWHILE, Lanes
from tests.inference.test_experts import LAYER, batch, offloaded, store  # noqa: F401


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("nbytes", [0, WORTHWHILE])
@pytest.mark.parametrize("items", [1, 2, 5])
def test_every_item_is_done_once_by_single_threads(two_threads, items, nbytes):
    done, seen = [], set()

    def note(share):
        assert torch.get_num_threads() == 1
        done.extend(share)
        seen.add(threading.current_thread())

    Lanes().run(note, list(range(items)), nbytes)
    assert sorted(done) == list(range(items))
    assert len(seen) == (2 if nbytes and items > 1 else 1)
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("bad", [0, 3])
def test_a_failure_in_any_lane_is_the_callers(two_threads, bad):
    def fail(share):
        if bad in share:
            raise RuntimeError(f"item {bad}")

    with pytest.raises(RuntimeError, match=f"item {bad}"):
        Lanes().run(fail, [0, 1, 2, 3], WORTHWHILE)
    assert torch.get_num_threads() == 2


def test_lanes_write_to_inference_tensors(two_threads):
    with torch.inference_mode():
        out = torch.zeros(4)
        Lanes().run(lambda share: [out[i].fill_(i) for i in share], [0, 1, 2, 3], WORTHWHILE)
    assert out.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("tokens", [1, 6])
@pytest.mark.parametrize("slots", [0, 3, 64])
def test_experts_have_the_same_bits_however_many_lanes(store, two_threads, monkeypatch, tokens, slots):  # noqa: F811
    x, index, scores = batch(tokens, 2)
    torch.set_num_threads(1)
    want = offloaded(store, 64)(x, index, scores)
    torch.set_num_threads(2)
    monkeypatch.setattr("inference.lanes.WORTHWHILE", 0)
    assert torch.equal(offloaded(store, slots)(x, index, scores), want)
    experts = offloaded(store, slots)
    call = Call.of(index.numpy(), 16)
    assert torch.equal(experts.compute(call, x, scores, experts.cache.lend(LAYER, call.experts)), want)
