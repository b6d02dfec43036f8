"""While the ranks exchange what they have, nobody registers memory: each call of the driver would wait for a slot."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import trainer.snapshots as module
from trainer.snapshots import Snapshots


class Pinning:
    resting = False

    @contextmanager
    def paused(self):
        self.resting = True
        yield
        self.resting = False


def test_registering_pauses_for_an_exchange_and_only_for_it(monkeypatch):
    pinning, seen = Pinning(), []

    def all_gather_object(everyone, mine):
        seen.append(pinning.resting)
        everyone[:] = [mine] * len(everyone)

    monkeypatch.setattr(module.dist, "all_gather_object", all_gather_object)
    snapshots = object.__new__(Snapshots)
    snapshots.process, snapshots.capturer = SimpleNamespace(world=2), SimpleNamespace(pinning=pinning)
    assert snapshots._gather("mine") == ["mine", "mine"]
    assert (seen, pinning.resting) == ([True], False)
    snapshots.capturer = None  # a run without checkpoints
    assert snapshots._gather(1) == [1, 1]
