"""What a run leaves behind is found, whoever holds it."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

from trainer.leftovers import MARK, Traces

HOLDER = """
import os, socket, sys
fd = os.memfd_create("planaria-dp0000")
sock = socket.create_server(("127.0.0.1", 0))
print(sock.getsockname()[1], flush=True)
sys.stdin.read()
"""


def start(mark: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", HOLDER], env=os.environ | {MARK: mark}, stdin=subprocess.PIPE,
                            stdout=subprocess.PIPE, text=True)  # fmt: skip


def test_a_process_its_memory_its_port_and_a_lock_are_found_until_they_are_gone(tmp_path: Path) -> None:
    traces = Traces("here")
    holder, stranger = start("here"), start("elsewhere")
    try:
        assert holder.stdout is not None
        assert stranger.stdout is not None
        port = int(holder.stdout.readline())
        stranger.stdout.readline()
        traces.observe()
        with (tmp_path / "run.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            found = traces.remaining(tmp_path, patience_s=0)
    finally:
        for process in (holder, stranger):
            process.kill()
            process.communicate(timeout=10)
    assert [line for line in found if line.startswith(f"process {holder.pid} is left")]
    assert f"port {port} is left" in found
    assert any("/memfd:planaria-dp0000" in line and line.endswith(f"in process {holder.pid}") for line in found)
    assert f"{tmp_path / 'run.lock'} is locked" in found
    assert len(found) == 4, "the stranger is nobody's leftover"
    assert traces.remaining(tmp_path, patience_s=5) == []
