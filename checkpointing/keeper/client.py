"""A worker's side of the keeper: one connection, many requests in flight, and a new keeper if the old one is killed."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from checkpointing.keeper.launch import connect_or_start, process_start_time, wait_for_end
from checkpointing.keeper.protocol import (
    Inbox,
    KeeperError,
    Message,
    raise_if_error,
    receive_one,
    send_all,
)
from checkpointing.phases import Board
from checkpointing.records import Kind, RecordInfo, decode_table
from checkpointing.schedule import WHOLE, Rules
from checkpointing.slots import Arena, ArenaShape

_HANDSHAKES = 5
_DYING_S = 5.0
_FINISH_S = 600.0


@dataclass(frozen=True)
class Grant:
    """Slots that this worker may write, by index: for bases, and for the other kinds that were asked for. The sequence
    number of their records, and the seconds waited for them."""

    bases: tuple[int, ...]
    others: Mapping[Kind, int]
    sequence: int
    waited_s: float


class KeeperClient:
    """Attach with :meth:`attach`. Thread-safe. If the keeper dies, another is started and given this worker's memory;
    requests in flight are repeated to it.

    Attributes:
        disk_step: the newest step that the keeper knew to be on disk at the last :meth:`inventory`; -1 for none.
        patience_s: how long :meth:`check_heard` bears with a keeper that says nothing.
    """

    patience_s = 120.0

    def __init__(self, run_dir: Path, hello: Message, board: Board | None = None, populate: bool = True) -> None:
        self._populate = populate
        self.run_dir = run_dir
        self._board = board
        self.coordinate: str = hello["coordinate"]
        self.attempt: int = hello["attempt"]
        self.restored_step = -1
        self.disk_step = -1
        self.keeper_pid = -1
        self._hello = hello
        self._lock = threading.Lock()
        self._pending: dict[int, tuple[Message, Future[tuple[Message, list[int]]]]] = {}
        self._held: dict[int, int] = {}
        self._next_id = 1
        self._closing = False
        self._failure: Exception | None = None
        self._heard = time.monotonic()
        self._sign_of_life: Future[tuple[Message, list[int]]] | None = None
        self.arena, self._sock, self._inbox = self._first_attach()
        self._hello["kill"] = None
        self._receiver = threading.Thread(target=self._receive, name="keeper-client", daemon=True)
        self._receiver.start()

    @classmethod
    def attach(
        cls,
        run_dir: str | os.PathLike[str],
        coordinate: str,
        coordinates: Sequence[str],
        shape: ArenaShape,
        fingerprint: str,
        rules: Rules = WHOLE,
        attempt: int = 0,
        disk: Mapping[str, Any] | None = None,
        linger_s: float = 600.0,
        tensors: Mapping[str, Any] | None = None,
        metadata: Mapping[str, Any] | None = None,
        partitions: str = "",
        populate: bool = True,
        kill: Mapping[str, Any] | None = None,
        node_coordinates: Sequence[str] | None = None,
        disk_fault: Mapping[str, Any] | None = None,
        board: Board | None = None,
        any_shape: bool = False,
    ) -> KeeperClient:
        """Attach this worker to the run's keeper, starting one if none lives.

        Args:
            coordinates: all of the job; ``node_coordinates`` those of this node (default: all).
            shape: of this worker's memory; see :func:`checkpointing.capture.arena_shape`.
            rules: how this worker's records belong together.
            disk: ``{"every": steps (0: only at the end), "keep_last": count}``; None: no disk tier. Optional:
                ``permanent_every`` (steps), ``url`` (instead of the run folder), ``hung_after_s``.
            tensors: ``{unit: {"param", "shape", "dtype", "elements"}}`` for the manifest; ``elements`` (optional) lets
                a reader prove that the unit is whole.
            populate: map every page now; where slots are pinned for a GPU, that does it, for those that are needed.
            partitions: how this worker's flat partitions lie, for whoever redoes its log from disk.
            any_shape: take memory of another shape or rules as it is, if the keeper has such; see :meth:`reshape`.
            kill: a drill, ``{"at": "disk", "step": N, "pids": [pid or "keeper", ...]}``; ``disk_fault``: another.
            board: where this worker posts its phases; the keeper kills it when one takes too long.
        Raises KeeperRefused (another recipe, too little memory, coordinate taken) or KeeperError.
        """
        hello = {
            "op": "attach",
            "coordinate": coordinate,
            "coordinates": list(coordinates),
            "node_coordinates": list(node_coordinates or coordinates),
            "shape": shape.as_list(),
            "rules": asdict(rules),
            "fingerprint": fingerprint,
            "pid": os.getpid(),
            "attempt": attempt,
            "disk": None if disk is None else dict(disk),
            "linger_s": linger_s,
            "tensors": dict(tensors or {}),
            "metadata": dict(metadata or {}),
            "partitions": partitions,
            "kill": None if kill is None else dict(kill),
            "disk_fault": None if disk_fault is None else dict(disk_fault),
            "board": None if board is None else process_start_time(os.getpid()),
            "any_shape": any_shape,
        }
        return cls(Path(run_dir).resolve(), hello, board, populate)

    # Requests

    def inventory(self) -> list[RecordInfo]:
        """All sealed records of all coordinates that this keeper holds, re-verified since this attempt began."""
        answer = self._ask({"op": "inventory"})
        self.disk_step = answer["disk"]
        tables = {digest: decode_table(table.encode()).entries for digest, table in answer["tables"].items()}
        return [
            RecordInfo(
                r["source"], Kind(r["kind"]), r["step"], r["attempt"], r["sequence"], tables[r["table"]], r["slot"]
            )
            for r in answer["records"]
        ]

    def quiesce(self) -> None:
        """Wait until the keeper seals and writes nothing any more; :meth:`inventory` waits for the seals only."""
        self._ask({"op": "quiesce"})

    def check_heard(self, since: float) -> None:
        """For whoever waits since ``since`` (``time.monotonic``): have the keeper give a sign of life.

        Raises KeeperError if it has given none for ``patience_s``. A slow disk is no reason: only its writer waits.
        """
        silent_s = time.monotonic() - max(self._heard, since)
        if silent_s > self.patience_s:
            raise KeeperError(
                f"the keeper (pid {self.keeper_pid}) has not said anything for {silent_s:.0f} s; is it stopped, or the "
                f"machine out of memory? See {self.run_dir / 'keeper.log'}"
            )
        # While the receiver looks for another keeper it holds the lock.
        if not self._lock.locked() and (self._sign_of_life is None or self._sign_of_life.done()):
            self._sign_of_life = self._request({"op": "status"})

    def arena_of(self, coordinate: str) -> Arena:
        """The memory of a coordinate, to read from; the caller closes it unless it is this worker's own."""
        if coordinate == self.coordinate:
            return self.arena
        answer, fds = self._request({"op": "arena", "coordinate": coordinate}).result()
        raise_if_error(answer)
        return Arena(fds[0], ArenaShape.from_list(answer["shape"]))

    @property
    def rules(self) -> Rules:
        """How the records in this worker's memory belong together."""
        return Rules(**self._hello["rules"])

    def reshape(self, shape: ArenaShape, rules: Rules) -> None:
        """Take other memory instead of the present; ``arena`` is then another, and nobody may use the former.

        The keeper keeps the former until the new one holds a step that all workers of this machine can restore, and
        goes back to it if they die before. If there is not enough memory for both, the former is freed first.
        Raises KeeperRefused if there is too little even then.
        """
        wanted = {"shape": shape.as_list(), "rules": asdict(rules)}
        answer, fds = self._request({"op": "reshape", "released": False, **wanted}).result()
        if raise_if_error(answer).get("release"):
            self.arena.close()  # there is no room for both
            answer, fds = self._request({"op": "reshape", "released": True, **wanted}).result()
        raise_if_error(answer)
        with self._lock:
            self.arena.close()
            self.arena = Arena(fds[0], shape, self._populate)
            self._hello |= wanted
        self.restored_step = -1

    def acquire(self, step: int, committed: int, bases: int = 1, least: int | None = None,
                others: Sequence[Kind] = (Kind.EXTRAS,)) -> Grant:  # fmt: skip
        """Slots for a step's records; blocks while none may be overwritten (back-pressure).

        ``bases`` are asked for; if they cannot be had at once, ``least`` will do.
        """
        answer = self._ask(
            {
                "op": "acquire",
                "step": step,
                "committed": committed,
                "bases": bases,
                "least": bases if least is None else least,
                "others": [int(kind) for kind in others],
            }
        )
        slots = dict(zip(others, answer["others"], strict=True))
        return Grant(tuple(answer["bases"]), slots, answer["sequence"], answer["waited_s"])

    def copied(self, step: int, grant: Grant, persist: Sequence[int] | None = None,
               sums: Mapping[int, Mapping[int, bytes]] | None = None) -> Future[None]:  # fmt: skip
        """Say that the granted slots hold COPIED records; the future is done when the keeper has sealed them.

        ``persist``: the parts that a checkpoint on disk of this step holds anew (the others stay as the last one has
        them); none: this step is not to be written yet; None: all. ``sums``: by slot, see :func:`records.seal`.
        """
        sealed: Future[None] = Future()
        indices = sorted([*grant.bases, *grant.others.values()])

        def answered(done: Future[tuple[Message, list[int]]]) -> None:
            with self._lock:
                for index in indices:
                    self._held.pop(index, None)
            try:
                raise_if_error(done.result()[0])
            except Exception as error:
                sealed.set_exception(error)
            else:
                sealed.set_result(None)

        message = {
            "op": "copied",
            "step": step,
            "slots": indices,
            "persist": None if persist is None else list(persist),
            "sums": {slot: {n: known.hex() for n, known in of.items()} for slot, of in (sums or {}).items()},
        }
        self._request(message).add_done_callback(answered)
        return sealed

    def discard(self, after_step: int, from_memory: bool = True) -> None:
        """Free this coordinate's records newer than the restored step; all of them if memory was not restored from."""
        answer = self._ask({"op": "discard", "after_step": after_step, "from_memory": from_memory})
        self.restored_step = answer["newest"]

    def finish(self, persist: bool, timeout_s: float = _FINISH_S) -> int:
        """Say that this worker ended well, and wait until all local ones have and all writing is done.

        Returns the step that is on disk now, -1 if none was to be. Raises KeeperError if it could not be written (the
        keeper then stays with it in memory), or if that took longer than ``timeout_s``. Closes the client.
        """
        try:
            answer = raise_if_error(self._request({"op": "finish", "persist": persist}).result(timeout_s)[0])
        except TimeoutError:
            raise KeeperError(
                f"the keeper (pid {self.keeper_pid}) has not ended its writing to {self.run_dir} for {timeout_s:g} s"
            ) from None
        finally:
            self.close()
        if answer["problem"]:
            raise KeeperError(
                f"step {answer['step']} could not be written to disk: {answer['problem']}; the keeper (pid "
                f"{self.keeper_pid}) stays with it in memory: mend the disk, then start the run again"
            )
        return int(answer["step"])

    def close(self) -> None:
        """Leave without saying that the run is finished. The keeper keeps the memory."""
        with self._lock:
            if self._closing and self._sock.fileno() < 0:
                return
            self._closing = True
            # The receiver sees the end of the stream.
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_RDWR)
        if threading.current_thread() is not self._receiver:
            self._receiver.join()
        self._sock.close()
        self.arena.close()

    # The connection

    def _ask(self, message: Message) -> Message:
        return raise_if_error(self._request(message).result()[0])

    def _request(self, message: Message) -> Future[tuple[Message, list[int]]]:
        future: Future[tuple[Message, list[int]]] = Future()
        with self._lock:
            if self._failure is not None:
                raise KeeperError(f"the keeper is lost: {self._failure}") from self._failure
            if self._closing:
                raise KeeperError("this client is closed")
            message = message | {"id": self._next_id}
            self._next_id += 1
            self._pending[message["id"]] = (message, future)
            # If this fails, the receiver reconnects and sends whatever is pending.
            with contextlib.suppress(OSError):
                send_all(self._sock, message)
        return future

    def _first_attach(self) -> tuple[Arena, socket.socket, Inbox]:
        sock, inbox, answer, fds = self._handshake({}, [])
        self._hello |= {"shape": answer["shape"], "rules": answer["rules"]}
        return Arena(fds[0], ArenaShape.from_list(answer["shape"]), self._populate), sock, inbox

    def _handshake(self, also: Message, fds: Sequence[int]) -> tuple[socket.socket, Inbox, Message, list[int]]:
        """Attach on a new connection. A keeper that is just dying may still accept one: then wait for its end."""
        for tries_left in range(_HANDSHAKES - 1, -1, -1):
            sock, info = connect_or_start(self.run_dir, self._hello["fingerprint"], self._hello["linger_s"])
            self.keeper_pid = info.pid
            inbox = Inbox()
            try:
                also_board = [] if self._board is None else [self._board.fd]
                send_all(sock, self._hello | also | {"id": 0, "token": info.token}, [*fds, *also_board])
                answer, received = receive_one(sock, inbox)
            except (KeeperError, OSError) as error:
                sock.close()
                if not tries_left:
                    raise KeeperError(f"{self.run_dir}: no keeper answered: {error}") from error
                wait_for_end(info.pid, _DYING_S)
                continue
            if "error" in answer:
                sock.close()
            raise_if_error(answer)
            return sock, inbox, answer, received
        raise AssertionError("unreachable")

    def _receive(self) -> None:
        try:
            self._receive_until_closed()
        except Exception as error:
            # Whatever it is, nobody would ever be answered again.
            self._fail(error)

    def _receive_until_closed(self) -> None:
        while True:
            try:
                while (got := self._inbox.pop()) is not None:
                    self._deliver(*got)
                if self._inbox.receive(self._sock):
                    self._heard = time.monotonic()
                    continue
            except OSError:
                pass
            if self._closing:
                self._fail(KeeperError("this client is closed"))
                return
            self._reconnect()
            self._heard = time.monotonic()

    def _deliver(self, answer: Message, fds: list[int]) -> None:
        with self._lock:
            message, future = self._pending.pop(answer["id"])
            if message["op"] == "acquire" and "bases" in answer:
                # Before anybody can lose the connection again: a new keeper must not free these.
                self._held |= dict.fromkeys([*answer["bases"], *answer["others"]], message["step"])
            if message["op"] == "finish" and "ok" in answer:
                # The keeper leaves now: the end of the stream is no reason to start another.
                self._closing = True
        future.set_result((answer, fds))

    def _reconnect(self) -> None:
        """Give our memory to another keeper, then repeat what was not answered."""
        with self._lock:
            self._sock.close()
            held = {str(index): step for index, step in self._held.items()}
            sock, inbox, _, fds = self._handshake({"held": held}, [self.arena.fd])
            for fd in fds:
                os.close(fd)
            self._sock, self._inbox = sock, inbox
            for message, _ in list(self._pending.values()):
                send_all(sock, message)

    def _fail(self, error: Exception) -> None:
        with self._lock:
            self._failure = error
            pending, self._pending = list(self._pending.values()), {}
        for _, future in pending:
            future.set_exception(KeeperError(f"the keeper is lost: {error}"))
