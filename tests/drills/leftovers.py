"""Proof that a run has left nothing behind: no process, memfd, lock, socket or port."""

import fcntl
import os
import time
from pathlib import Path


def leftovers(run_dir):
    """What is still there of a run, in words. A port or memfd exists only while a process holds it."""
    found = [f"process {pid}: {command}" for pid, command in processes_of(run_dir).items()]
    found += [f"memfd {name} in {pid}" for pid in [*processes_of(run_dir), os.getpid()] for name in memfds_of(pid)]
    found += [f"{name} is locked" for name in ("run.lock", "keeper.lock", "keeper.start") if is_locked(run_dir / name)]
    return found + [f"{name} exists" for name in ("keeper.json", "keeper.sock") if (run_dir / name).exists()]


def nothing_left(run_dir, seconds=10.0):
    """Fails unless the run is wholly gone within a moment: processes that were killed still have to be reaped."""
    deadline = time.monotonic() + seconds
    while found := leftovers(run_dir):
        assert time.monotonic() < deadline, found
        time.sleep(0.02)


def processes_of(run_dir):
    """Command lines by pid: whoever names the run, or has its output or a file of its folder open."""
    found, output = {}, str(run_dir.with_name(f"{run_dir.name}.log"))
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal() or int(entry.name) == os.getpid():
            continue
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue  # it ended just now
        command = b" ".join(words).decode(errors="replace")
        named = f"log.run={run_dir.name}" in command.split() and f"log.dir={run_dir.parent}" in command.split()
        files = open_files(entry)
        named |= str(run_dir) in command.split() or output in files
        if named or any(Path(file).is_relative_to(run_dir) for file in files):
            found[int(entry.name)] = command or "(zombie)"
    return found


def memfds_of(pid):
    return [name for name in open_files(Path("/proc") / str(pid)) if name.startswith("/memfd:planaria-")]


def open_files(process):
    """Targets of a process's descriptors; none of one that is gone or not ours to see."""
    try:
        return [os.readlink(link) for link in (process / "fd").iterdir()]
    except OSError:
        return []


def is_locked(path):
    try:
        with path.open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False
