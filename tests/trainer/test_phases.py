"""Which deadline a phase has."""

import pytest

from checkpointing.phases import Board
from trainer.phases import Phases, key_of, longest_deadline_s
from trainer.schema import DeadlinesSection

DEADLINES = DeadlinesSection(step=10, first_step=300, build=600, load=200, evaluate=100, finish=50)


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("trainer.phases.time.monotonic", lambda: now[0])
    return now


@pytest.fixture
def phases(clock):
    board = Board.create("test")
    yield Phases(board, DEADLINES)
    board.close()


def allowed(phases, phase, step=0):
    phases.enter(phase, step)
    return phases.board.read().allowed_s


def test_every_phase_has_its_own_deadline(phases):
    assert [allowed(phases, name) for name in ("build", "load", "evaluate", "finish")] == [600, 200, 100, 50]


def test_the_first_step_after_a_start_may_take_longer(phases):
    assert [allowed(phases, "forward", 7), allowed(phases, "optimizer", 7)] == [300, 300]
    assert [allowed(phases, "forward", 8), allowed(phases, "optimizer", 8)] == [10, 10]


def test_slow_steps_are_no_hang(phases, clock):
    for step in (1, 2, 3):
        phases.enter("forward", step)
        clock[0] += 30
        phases.enter("backward", step)
        clock[0] += 1
    assert allowed(phases, "forward", 4) == 120
    assert allowed(phases, "backward", 4) == 10
    clock[0] += 1
    assert allowed(phases, "forward", 5) == 10
    clock[0] += 1
    phases.enter("backward", 5)
    assert allowed(phases, "forward", 6) == 10


def test_zero_is_for_ever(clock):
    board = Board.create("test")
    phases = Phases(board, DeadlinesSection(step=0, first_step=0))
    for step in (1, 2):
        assert allowed(phases, "forward", step) == 0
        clock[0] += 100
    board.close()


def test_a_collective_waits_longer_than_any_phase():
    assert longest_deadline_s(DEADLINES) == 600
    assert longest_deadline_s(DeadlinesSection(load=0)) is None


def test_the_key_to_change_is_named():
    assert (key_of("forward"), key_of("import")) == ("parallel.deadlines.step", "parallel.deadlines.build")
