"""Which end is the reason of the others, and when it is the same again."""

from pathlib import Path

import pytest

from trainer.endings import CrashLoopError, Ending, check_restarts, diagnosis, ending_of, is_loop
from trainer.events import EventLog

KILLED = Ending(1, "forward", 7, "signal", "SIGKILL")


def exit_row(rank, status, step=7, phase="forward"):
    return {"kind": "worker_exit", "worker": rank, "pid": 100 + rank, "status": status, "step": step, "phase": phase}


def stuck_row(rank, stopped):
    return {"kind": "worker_stuck", "coordinate": f"dp{rank:04d}", "pid": 100 + rank, "step": 7, "phase": "forward",
            "allowed_s": 10.0, "stopped": stopped}  # fmt: skip


def failed_row(rank, error, lost_peer=False):
    return {"kind": "failed", "rank": rank, "pid": 100 + rank, "step": 7, "phase": "forward", "error": error,
            "lost_peer": lost_peer}  # fmt: skip


def test_a_killed_worker_is_the_reason_why_its_peer_lost_it():
    lost = failed_row(0, "RuntimeError: reset by peer", lost_peer=True)
    assert ending_of([lost, exit_row(1, -9), exit_row(0, 1)]) == KILLED
    assert ending_of([lost, exit_row(0, 1), exit_row(1, -9)]) == KILLED
    assert ending_of([exit_row(0, 1), exit_row(1, -9)]) == KILLED


def test_a_worker_that_failed_by_itself_is_the_reason():
    ending = ending_of([exit_row(0, 1), failed_row(1, "RuntimeError: boom")])
    assert str(ending) == "worker 1 in forward of step 7: RuntimeError: boom"


def test_of_several_that_hang_the_stopped_one_is_the_reason():
    ending = ending_of([stuck_row(0, False), stuck_row(1, True), exit_row(0, -9), exit_row(1, -9)])
    assert str(ending) == "worker 1 in forward of step 7: stuck for more than 10 s, stopped by a signal"


def test_nothing_known_is_no_ending():
    assert ending_of([]) is None
    assert ending_of([failed_row(0, "x", lost_peer=True)]) is None


@pytest.mark.parametrize(
    ("last", "loop"),
    [
        (KILLED, True),
        (Ending(1, "backward", 7, "signal", "SIGKILL"), True),  # the same step, killed a little later
        (Ending(1, "forward", 8, "signal", "SIGKILL"), False),  # a step was made in between
        (Ending(0, "forward", 7, "signal", "SIGKILL"), False),
        (Ending(1, "forward", 7, "signal", "SIGSEGV"), False),
        (Ending(1, "forward", 7, "failed", "RuntimeError: boom"), False),
        (None, False),
    ],
)
def test_three_alike_are_a_loop(last, loop):
    assert is_loop([KILLED, KILLED, last]) is loop
    assert not is_loop([KILLED, last])
    assert is_loop([last, KILLED, KILLED, KILLED])


def test_errors_are_alike_whatever_numbers_they_hold_and_whoever_met_them_first():
    texts = ["OutOfMemoryError: tried 20 MiB at 0x7f12", "OutOfMemoryError: tried 24 MiB at 0xab0"]
    endings = [Ending(rank, "forward", 7, "failed", texts[rank % 2]) for rank in (0, 1, 2)]
    assert is_loop(endings)


def test_one_damaged_checkpoint_after_the_other_is_no_loop():
    errors = [f"RecoveryError: step-{step}/dp0000.safetensors is damaged; set aside" for step in (8, 4, 0)]
    assert not is_loop([Ending(0, "load", 0, "failed", error) for error in errors])


@pytest.mark.parametrize(
    ("ending", "advice"),
    [
        (KILLED, "dmesg"),
        (Ending(0, "load", 0, "stuck", "stuck for more than 300 s"), "parallel.deadlines.load"),
        (Ending(0, "forward", 3, "signal", "SIGSEGV"), "torch"),
        (Ending(0, "forward", 3, "failed", "RuntimeError: boom"), "said above"),
    ],
)
def test_the_diagnosis_says_who_where_how_and_what_to_do(ending, advice):
    text = diagnosis(ending, Path("runs/x"))
    for word in (str(ending), advice, "3 times", "runs/x/events.jsonl", "runs/x/keeper.log"):
        assert word in text


def write_attempts(folder, steps):
    for attempt, step in enumerate(steps):
        with EventLog(folder, -1, attempt) as events:
            events.write("worker_gone", step, coordinate="dp0001", pid=100 + attempt, phase="forward")


def test_a_worker_that_torchrun_started_again_refuses_a_loop(tmp_path, monkeypatch):
    write_attempts(tmp_path, [4, 7, 7, 7])
    check_restarts(tmp_path)  # another launch: nothing of this one has failed yet
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    check_restarts(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "3")
    with pytest.raises(CrashLoopError, match="worker 1 in forward of step 7: SIGKILL"):
        check_restarts(tmp_path)
    write_attempts(tmp_path, [4, 7, 7, 7, 8])
    check_restarts(tmp_path)
