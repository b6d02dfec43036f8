"""Asking a run's keeper from outside: how it is, and to end."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from checkpointing.keeper.launch import connect, is_alive, wait_for_end
from checkpointing.keeper.protocol import (
    EndOfStream,
    Inbox,
    KeeperError,
    Message,
    raise_if_error,
    receive_one,
    send_all,
)

_STOP_S = 120.0


def keeper_status(run_dir: str | os.PathLike[str], timeout_s: float = 10.0) -> tuple[int, Message] | None:
    """The live keeper's pid, and for each coordinate whether it is attached and which steps are sealed.

    None if none lives. Raises OSError or KeeperError if it does not answer.
    """
    found = connect(Path(run_dir).resolve())
    if found is None:
        return None
    sock, info = found
    with sock:
        sock.settimeout(timeout_s)
        send_all(sock, {"op": "status", "id": 0, "token": info.token})
        return info.pid, raise_if_error(receive_one(sock, Inbox())[0])


def stop_keeper(run_dir: str | os.PathLike[str], persist: bool = True, timeout_s: float = _STOP_S) -> bool:
    """Have the run's keeper end, writing the newest step first if it has a disk tier. False if none lives.

    Returns when it is gone. Raises KeeperError, and lets it live, if that step is not on disk, be it that it cannot be
    written or that this takes longer than the timeout. Without ``persist`` it is killed after the timeout.
    """
    found = connect(Path(run_dir).resolve())
    if found is None:
        return False
    sock, info = found
    with sock:
        sock.settimeout(timeout_s)
        try:
            send_all(sock, {"op": "stop", "id": 0, "token": info.token, "persist": persist})
            raise_if_error(receive_one(sock, Inbox())[0])
        except TimeoutError:
            if persist:
                raise KeeperError(
                    f"the keeper (pid {info.pid}) is still writing after {timeout_s:g} s; wait for it, or have it "
                    "end without writing"
                ) from None
        except (ConnectionError, EndOfStream):
            pass  # It was leaving already.
    wait_for_end(info.pid, timeout_s)
    if is_alive(info):
        os.kill(info.pid, signal.SIGKILL)
        wait_for_end(info.pid)
    return True
