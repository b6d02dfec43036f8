"""What a run may leave behind: processes, shared memory, locks and ports (Linux, from /proc).

Every process of a drilled run inherits a mark in its environment, so that its descendants are found whoever their
parent is now.
"""

from __future__ import annotations

import fcntl
import os
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

MARK = "PLANARIA_DRILL_MARK"
_LISTENING = "0A"
_LOCKS = ("run.lock", "keeper.lock", "keeper.start")


def marked_processes(mark: str) -> dict[int, str]:
    """Pid -> command line of every living process with the mark in its environment."""
    wanted, found = f"{MARK}={mark}".encode(), {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with suppress(OSError):
                if wanted in (entry / "environ").read_bytes().split(b"\0"):
                    command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    found[int(entry.name)] = command.strip()
    return found


def open_files(pid: int) -> list[tuple[str, int]]:
    """(what the descriptor points to, inode) of a process's open files; none if it is gone."""
    found = []
    with suppress(OSError):
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                found.append((os.readlink(link), link.stat().st_ino))
    return found


def listening() -> dict[int, int]:
    """Socket inode -> TCP port of all that listen on this machine."""
    found = {}
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with suppress(OSError):
            for line in Path(table).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == _LISTENING:
                    found[int(fields[9])] = int(fields[1].rpartition(":")[2], 16)
    return found


@dataclass
class Traces:
    """Of the runs with one mark: call :meth:`observe` now and then while they live, :meth:`remaining` at the end."""

    mark: str
    memory: dict[int, str] = field(default_factory=dict)
    ports: dict[int, int] = field(default_factory=dict)

    def observe(self) -> None:
        sockets = listening()
        for pid in marked_processes(self.mark):
            for target, inode in open_files(pid):
                if target.startswith("/memfd:planaria"):
                    self.memory[inode] = target
                if target.startswith("socket:") and (own := int(target[len("socket:[") : -1])) in sockets:
                    self.ports[own] = sockets[own]

    def remaining(self, run_dir: Path, patience_s: float = 15.0) -> list[str]:
        """In words what is left of the runs, after giving it ``patience_s`` to go; empty if nothing is."""
        deadline = time.monotonic() + patience_s
        while (found := self._found(run_dir)) and time.monotonic() < deadline:
            time.sleep(0.05)
        return found

    def _found(self, run_dir: Path) -> list[str]:
        found = [f"process {pid} is left: {command[:120]}" for pid, command in marked_processes(self.mark).items()]
        sockets = listening()
        found += [f"port {port} is left" for inode, port in self.ports.items() if inode in sockets]
        if self.memory:
            found += self._held_memory()
        found += [f"{run_dir / name} is locked" for name in _LOCKS if _is_locked(run_dir / name)]
        return found

    def _held_memory(self) -> list[str]:
        pids = [int(name) for name in os.listdir("/proc") if name.isdecimal() and int(name) != os.getpid()]
        return [
            f"{self.memory[inode]} is left in process {pid}"
            for pid in pids
            for target, inode in open_files(pid)
            if target.startswith("/memfd:planaria") and inode in self.memory
        ]


def _is_locked(path: Path) -> bool:
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False
