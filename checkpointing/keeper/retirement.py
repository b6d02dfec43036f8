"""What a launcher asks of the keeper when its job is stopped: put the newest step where it outlives the machine."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

from checkpointing.keeper.launch import connect, wait_for_end
from checkpointing.keeper.protocol import EndOfStream, Inbox, receive_one, send_all


@dataclass(frozen=True)
class Retirement:
    """What a run's keeper has when its job was stopped: the step on disk, the step that it goes on to hold in memory
    (-1: none), and why the newest step is not on disk ("" if it is, or was not to be)."""

    pid: int
    on_disk: int = -1
    in_memory: int = -1
    problem: str = ""


def retire_keeper(run_dir: str | os.PathLike[str], timeout_s: float) -> Retirement | None:
    """Have the keeper of a job that was stopped write the newest step and end; without a disk tier it stays with it.

    None if none lives. After the timeout it is left alone: it goes on to write.
    """
    found = connect(Path(run_dir).resolve())
    if found is None:
        return None
    sock, info = found
    deadline = time.monotonic() + timeout_s
    with sock:
        sock.settimeout(timeout_s)
        try:
            send_all(sock, {"op": "retire", "id": 0, "token": info.token})
            answer, _ = receive_one(sock, Inbox())
        except TimeoutError:
            return Retirement(info.pid, problem=f"it was still being written after {timeout_s:g} s")
        except (OSError, EndOfStream):
            wait_for_end(info.pid, timeout_s)  # it was leaving already
            return None
    if not answer["stays"]:
        wait_for_end(info.pid, max(deadline - time.monotonic(), 1.0))
    return Retirement(info.pid, answer["on_disk"], answer["in_memory"], answer["problem"])
