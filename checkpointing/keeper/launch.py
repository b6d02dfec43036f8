"""Starting a keeper, finding a live one, and the files by which they are found.

keeper.lock    held for a keeper's life: makes it single in a run folder
keeper.start   held while one starts or ends, so that a second starter sees it ready or gone, never half way
keeper.json    pid, process start time, node, socket, recipe fingerprint, token, version of records (mode 0600)
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import select
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from checkpointing.keeper.protocol import KeeperError, KeeperRefused
from checkpointing.records import VERSION

_LONGEST_PATH = 107
_START_TIMEOUT_S = 60.0
_TRIES = 8


@dataclass(frozen=True)
class KeeperInfo:
    """The contents of ``keeper.json``. ``start_time`` (clock ticks since boot) and pid name a process for good."""

    pid: int
    start_time: int
    node: str
    socket: str
    fingerprint: str
    token: str
    records: int = 1  # the version of the records that it reads


@dataclass(frozen=True)
class Lease:
    """A keeper's hold of its run folder: the descriptor of the ``keeper.lock`` that it locked."""

    run_dir: Path
    fd: int

    def holds(self) -> bool:
        """Whether the folder still has that file: if not, the run was deleted, and the folder may be a new run's."""
        ours = os.fstat(self.fd)
        try:
            there = os.stat(self.run_dir / "keeper.lock")
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError:
            return True  # A disk that answers nothing; writing to it will fail by itself.
        return (ours.st_dev, ours.st_ino) == (there.st_dev, there.st_ino)


def node_id() -> str:
    return platform.node() or "localhost"


def process_start_time(pid: int) -> int:
    """Clock ticks since boot, from /proc; -1 if there is no such process or it is a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return -1
    return -1 if fields[0] in "ZX" else int(fields[19])


def socket_path(run_dir: Path) -> Path:
    """In the run folder, or under the temporary folder if that path is too long for a Unix socket."""
    path = run_dir / "keeper.sock"
    if len(os.fsencode(path)) > _LONGEST_PATH:
        digest = hashlib.sha256(os.fsencode(run_dir)).hexdigest()[:12]
        path = Path(tempfile.gettempdir()) / f"planaria-{digest}.sock"
    if len(os.fsencode(path)) > _LONGEST_PATH:
        raise KeeperRefused(
            f"no socket path of at most {_LONGEST_PATH} bytes: set TMPDIR to a shorter folder than {path}"
        )
    return path


def read_info(run_dir: Path) -> KeeperInfo | None:
    """The keeper that the run folder names, alive or not; None if there is none."""
    try:
        values = json.loads((run_dir / "keeper.json").read_text())
        return KeeperInfo(**{name: values[name] for name in KeeperInfo.__dataclass_fields__ if name in values})
    except (OSError, ValueError, TypeError):
        return None


def write_info(run_dir: Path, info: KeeperInfo) -> None:
    work = run_dir / "keeper.json.tmp"
    fd = os.open(work, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with open(fd, "w") as file:
        json.dump(asdict(info), file, indent=1)
    work.rename(run_dir / "keeper.json")


def is_alive(info: KeeperInfo | None) -> bool:
    return info is not None and process_start_time(info.pid) == info.start_time


def wait_for_end(pid: int, timeout_s: float | None = None) -> None:
    """Wait until a process that need not be our child has ended, or until the timeout."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        select.select([fd], [], [], timeout_s)
    finally:
        os.close(fd)


def lock(path: Path, wait: bool) -> int | None:
    """An exclusive lock on a file, as its descriptor; None if another process holds it and we do not wait."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        os.close(fd)
        return None
    return fd


def connect(run_dir: Path) -> tuple[socket.socket, KeeperInfo] | None:
    """A connection to the run's live keeper; None if there is none."""
    info = read_info(run_dir)
    if info is None or not is_alive(info):
        return None
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.connect(info.socket)
    except OSError:
        sock.close()
        return None
    return sock, info


def connect_or_start(run_dir: Path, fingerprint: str, linger_s: float) -> tuple[socket.socket, KeeperInfo]:
    """Attach to the run's keeper, starting one if none lives.

    Raises KeeperRefused if the live one keeps another recipe's run, KeeperError if none can be started.
    """
    for _ in range(_TRIES):
        found = connect(run_dir)
        if found is not None:
            sock, info = found
            if info.records != VERSION:
                sock.close()
                raise KeeperRefused(
                    f"{run_dir}: the live keeper (pid {info.pid}) is another planaria's, whose records are of version "
                    f"{info.records}, not {VERSION}: 'planaria keeper stop {run_dir}' has it write its newest step to "
                    "disk, from where the run goes on, if the recipe has a disk; else go on with that planaria"
                )
            if info.fingerprint != fingerprint:
                sock.close()
                raise KeeperRefused(
                    f"{run_dir}: the live keeper (pid {info.pid}) keeps a run of recipe {info.fingerprint}, this is "
                    f"{fingerprint}; stop that keeper or use another run folder"
                )
            return found
        start(run_dir, fingerprint, linger_s)
    raise KeeperError(f"no keeper could be reached after {_TRIES} starts; see {run_dir / 'keeper.log'}")


def start(run_dir: Path, fingerprint: str, linger_s: float) -> None:
    """Start a keeper that outlives this process, its group, its session and its descendants' hunters.

    Returns when one is ready, be it this one or another that was quicker. Raises KeeperError with its last words.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    ready, theirs = os.pipe()
    root = str(Path(__file__).resolve().parents[2])
    inherited = os.environ.get("PYTHONPATH")
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([root, inherited] if inherited else [root]),
        # NumPy's BLAS would start a thread for each core.
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "checkpointing.keeper", "--run-dir", str(run_dir.resolve())]
    command += ["--fingerprint", fingerprint, "--linger", str(linger_s), "--ready-fd", str(theirs)]
    try:
        child = subprocess.Popen(
            command,
            env=environment,
            pass_fds=[theirs],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    finally:
        os.close(theirs)
    try:
        # The child forks and exits at once: only its own child goes on to be the keeper.
        child.wait(_START_TIMEOUT_S)
        words = _read_until_closed(ready, time.monotonic() + _START_TIMEOUT_S)
    finally:
        os.close(ready)
    if words not in ("ready", "exists"):
        raise KeeperError(f"the keeper did not start: {words or 'see ' + str(run_dir / 'keeper.log')}")


def _read_until_closed(fd: int, deadline: float) -> str:
    chunks = []
    while select.select([fd], [], [], max(deadline - time.monotonic(), 0))[0]:
        chunk = os.read(fd, 4096)
        if not chunk:
            break
        chunks.append(chunk)
    return b"".join(chunks).decode(errors="replace")
