"""A recovery's parts overlap: the whole is neither their sum nor the last of them."""

from __future__ import annotations

import threading

import pytest

from benchmarks.recovery_clock import PARTS, Clock, watched
from checkpointing.pinning import Pinning


def test_the_whole_lasts_from_the_first_beginning_to_the_end_of_the_plan():
    clock = Clock(
        {name: [] for name in PARTS}
        | {
            "check_s": [(1.0, 1.5), (1.5, 2.0)],
            "verify_s": [(1.2, 2.2)],
            "pin_s": [(1.5, 2.5), (3.0, 3.5), (4.5, 5.0)],  # the last one beside training
            "apply_s": [(2.5, 4.0)],
            "weights_s": [(4.0, 4.25)],
        }
    )
    seconds = clock.seconds()
    assert seconds["restore_s"] == pytest.approx(3.0)
    assert seconds["pin_s"] == pytest.approx(1.5)
    assert seconds["check_s"] == pytest.approx(1.0)
    assert seconds["weights_s"] == pytest.approx(0.25)
    assert seconds["redo_s"] == 0


def test_parts_are_noted_in_whichever_thread_they_run(monkeypatch):
    monkeypatch.setattr(Pinning, "_register", lambda self, slot: slot)
    before = Pinning._register
    with watched() as clock:
        thread = threading.Thread(target=lambda: Pinning._register(None, 3))
        thread.start()
        thread.join()
        assert Pinning._register(None, 4) == 4
    assert len(clock.spans["pin_s"]) == 2
    assert Pinning._register is before
