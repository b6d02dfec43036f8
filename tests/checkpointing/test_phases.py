"""The phase board between processes, and what counts as overdue."""

import os
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpointing.phases import POLL_S, Board, Stopwatch, Ticker


@pytest.fixture
def board():
    board = Board.create("test")
    yield board
    board.close()


def test_another_mapping_reads_what_was_posted(board):
    before = time.monotonic()
    board.post("forward", 7, 10.0)
    other = Board(os.dup(board.fd))
    posted = other.read()
    assert (posted.phase, posted.step, posted.allowed_s) == ("forward", 7, 10.0)
    assert before <= posted.since <= time.monotonic()
    other.close()


def test_the_board_outlives_its_writer(board):
    pid = os.fork()
    if pid == 0:
        board.post("optimizer", 9, 1.5)
        os._exit(0)
    os.waitpid(pid, 0)
    assert (board.read().phase, board.read().step) == ("optimizer", 9)


def test_it_is_kept_while_a_keeper_looks(board, monkeypatch):
    assert not board.kept
    board.beat()
    assert board.kept
    later = time.monotonic() + 60
    monkeypatch.setattr(time, "monotonic", lambda: later)
    assert not board.kept


def test_a_phase_is_overdue_when_it_stayed_longer_than_allowed(board):
    watch = Stopwatch(board)
    board.post("forward", 1, 1.0)
    assert [watch.look(0.4) for _ in range(3)] == [None, None, None]
    assert watch.look(0.4).phase == "forward"
    board.post("forward", 1, 1.0)  # the same phase anew: the next micro-batch
    assert watch.look(5.0) is None


def test_zero_allows_for_ever(board):
    watch = Stopwatch(board)
    board.post("finish", 1, 0)
    assert [watch.look(1e6) for _ in range(3)] == [None] * 3


@given(st.lists(st.floats(0, 2), min_size=1, max_size=30), st.floats(0.5, 5))
def test_overdue_is_exactly_what_the_looks_sum_up_to(elapsed, allowed_s):
    board = Board.create("sum")
    watch = Stopwatch(board)
    board.post("forward", 1, allowed_s)
    for i, seconds in enumerate(elapsed):
        counted = sum(elapsed[1 : i + 1])  # the first look only finds out what is posted
        assert (watch.look(seconds) is not None) == (counted > board.read().allowed_s)
    board.close()


def test_time_in_which_the_watcher_did_not_run_does_not_count(monkeypatch):
    ticker = Ticker()
    later = time.monotonic() + 3600
    monkeypatch.setattr(time, "monotonic", lambda: later)
    assert ticker.elapsed() == 4 * POLL_S
