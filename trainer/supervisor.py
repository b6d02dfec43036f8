"""One node's workers: started together, watched, ended together, and started again (no torch here).

The kernel itself tells when a worker ends (through a pidfd), within milliseconds. When one has gone the others are
killed at once: what they have not handed to the keeper is void, and who is blocked in a collective hears nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from checkpointing.phases import POLL_S, Board, Stopwatch, Ticker
from trainer.phases import BOARD_VARIABLE, IMPORT

STORE_VARIABLE = "PLANARIA_STORE"  # the descriptor on which rank 0 serves the rendezvous
_PR_SET_PDEATHSIG = 1
_PF_EXITING = 4  # linux/sched.h
_DYING_S = 0.5
_LIBC = ctypes.CDLL(None)
_STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Signals:
    """While entered, SIGTERM, SIGINT and SIGHUP end nothing: they are noted, and make ``wake`` readable."""

    def __init__(self) -> None:
        self.received: list[int] = []
        self.wake, self._write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        for number in _STOPPING:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.close(self.wake)
        os.close(self._write)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.received.append(number)
        with contextlib.suppress(BlockingIOError):
            os.write(self._write, b"!")


class Forked:
    """A copy of this process that runs ``body`` and exits with what it returns. The interface is Popen's."""

    def __init__(self, body: Callable[[], int]) -> None:
        self.returncode: int | None = None
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                status = body()
            except SystemExit as leaving:
                status = leaving.code if isinstance(leaving.code, int) else 1
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)  # what the launcher would do at its own end is none of the worker's business

    def poll(self) -> int | None:
        return self._reap(os.WNOHANG)

    def wait(self) -> int | None:
        return self._reap(0)

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)

    def _reap(self, options: int) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, options)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode


@dataclass
class Worker:
    """One process. ``status`` is None while it lives, then its exit status, negative for a signal."""

    rank: int
    process: subprocess.Popen[bytes] | Forked
    pidfd: int
    board: Board
    stopwatch: Stopwatch

    @property
    def status(self) -> int | None:
        return self.process.poll()


class Workers:
    """The workers of one attempt. Use as a context: at its end every one is dead and reaped.

    Args:
        command: of every worker; rank and address come in the environment, as torchrun names them.
        count: how many.
        environment: what they inherit.
        import_s: how long they may take from their start to their first own phase; 0: for ever.
        on_stuck: told (worker, posted phase, seconds) before a worker is killed that no keeper watches.
        body: if given, workers are copies of this process that call it, instead of running ``command``.
    """

    def __init__(
        self,
        command: Sequence[str],
        count: int,
        environment: Mapping[str, str],
        import_s: float,
        on_stuck: Callable[[Worker, Any, float], None],
        body: Callable[[], int] | None = None,
    ) -> None:
        self.workers: list[Worker] = []
        self._command, self._count, self._environment = list(command), count, environment
        self._import_s, self._on_stuck = import_s, on_stuck
        self._body = body
        self._ticker = Ticker()

    def __enter__(self) -> Workers:
        try:
            # Rank 0 serves the rendezvous on a socket that is bound already: no other process can take its port.
            with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:
                for rank in range(self._count):
                    self.workers.append(self._start(rank, listener))
        except BaseException:
            self.end()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.end()

    def _start(self, rank: int, listener: socket.socket) -> Worker:
        board = Board.create(str(rank))
        board.post(IMPORT, 0, self._import_s)
        inherited = [board.fd]
        variables = {
            **self._environment,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(self._count),
            "LOCAL_WORLD_SIZE": str(self._count),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(listener.getsockname()[1]),
            BOARD_VARIABLE: str(board.fd),
        }
        if rank == 0:
            inherited.append(listener.fileno())
            variables[STORE_VARIABLE] = str(listener.fileno())
        if self._body is None:
            process: subprocess.Popen[bytes] | Forked = self._execute(variables, inherited)
        else:
            process = self._fork(self._body, variables, inherited, listener)
        return Worker(rank, process, os.pidfd_open(process.pid), board, Stopwatch(board))

    def _execute(self, variables: dict[str, str], inherited: list[int]) -> subprocess.Popen[bytes]:
        launcher = os.getpid()
        return subprocess.Popen(
            self._command,
            env=variables,
            stdin=subprocess.DEVNULL,
            pass_fds=inherited,
            start_new_session=True,  # Ctrl-C is the launcher's business
            preexec_fn=lambda: _die_with(launcher),
        )

    def _fork(
        self, body: Callable[[], int], variables: dict[str, str], inherited: list[int], listener: socket.socket
    ) -> Forked:
        launcher = os.getpid()

        def begin() -> int:
            _die_with(launcher)
            os.setsid()
            for number in _STOPPING:
                signal.signal(number, signal.SIG_DFL)
            for worker in self.workers:
                worker.board.close()
                os.close(worker.pidfd)
            if listener.fileno() not in inherited:
                listener.close()
            os.dup2(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC), 0)
            os.environ.update(variables)
            return body()

        return Forked(begin)

    def wait(self, signals: Signals) -> list[Worker]:
        """Wait until all have ended well, one has not, or a signal came. Returns those that have ended.

        The empty list: a signal came first. Workers that no keeper watches are killed here when they are overdue.
        """
        while True:
            if signals.received:
                return []
            ended = [worker for worker in self.workers if worker.status is not None]
            if any(worker.status for worker in ended):
                return self._with_dying(ended)
            if len(ended) == self._count:
                return ended
            running = [worker.pidfd for worker in self.workers if worker.status is None]
            select.select([*running, signals.wake], [], [], POLL_S)
            self._watch()

    def _with_dying(self, ended: list[Worker]) -> list[Worker]:
        """Those, and whoever is about to end: a killed worker's peer may notice, and be gone, before it is."""
        dying = [worker for worker in self.workers if worker.status is None and is_exiting(worker.process.pid)]
        for worker in dying:
            select.select([worker.pidfd], [], [], _DYING_S)
        return ended + [worker for worker in dying if worker.status is not None]

    def _watch(self) -> None:
        elapsed = self._ticker.elapsed()
        for worker in self.workers:
            if worker.status is None:
                overdue = worker.stopwatch.look(0.0 if worker.board.kept else elapsed)
                if overdue is not None:
                    self._on_stuck(worker, overdue, worker.stopwatch.seconds)
                    worker.process.kill()

    def end(self) -> None:
        """Kill and reap whoever is left."""
        for worker in self.workers:
            worker.process.kill()
        for worker in self.workers:
            worker.process.wait()
            worker.board.close()
            if worker.pidfd >= 0:
                os.close(worker.pidfd)
                worker.pidfd = -1


def is_exiting(pid: int) -> bool:
    """Whether the kernel is already taking a process down."""
    try:
        flags = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[6])
    except (OSError, IndexError):
        return True
    return bool(flags & _PF_EXITING)


def _die_with(launcher: int) -> None:
    """In the child: have the kernel kill it when the launcher dies, from its first instruction on."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != launcher:
        os._exit(1)
