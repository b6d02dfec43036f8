"""The keeper: what it does on each message of its workers. All bookkeeping is on the loop's thread."""

from __future__ import annotations

import os
import secrets
import socket
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from checkpointing.bandwidth import keeper_hashers
from checkpointing.keeper import launch
from checkpointing.keeper.arenas import Keep, Slot
from checkpointing.keeper.departure import Departure
from checkpointing.keeper.events import append_event
from checkpointing.keeper.faults import Faults
from checkpointing.keeper.grants import Grants
from checkpointing.keeper.health import DiskHealth
from checkpointing.keeper.inventory import Inventory
from checkpointing.keeper.loop import Connection, Loop
from checkpointing.keeper.memory import check_fits, create_memfd
from checkpointing.keeper.persister import Persist, Persister, check_place
from checkpointing.keeper.protocol import KeeperRefused, Message, OtherMemory, TooLittleMemory, refusal, sums_of
from checkpointing.keeper.quiet import Quiet
from checkpointing.keeper.reshaping import Reshaping
from checkpointing.keeper.watch import Watch
from checkpointing.records import VERSION, State, seal, state_of
from checkpointing.schedule import Rules
from checkpointing.slots import Arena, ArenaShape


def serve(run_dir: Path, fingerprint: str, linger_s: float, ready_fd: int) -> int:
    """Be the run's keeper until the run ends. Tells ``ready_fd`` "ready", or "exists" if another one lives."""
    with open(ready_fd, "wb", buffering=0) as ready:
        try:
            starting = launch.lock(run_dir / "keeper.start", wait=True)
            assert starting is not None
            life = launch.lock(run_dir / "keeper.lock", wait=False)
            if life is None:
                ready.write(b"exists")
                return 0
            service = Service(launch.Lease(run_dir, life), fingerprint, linger_s)
            os.close(starting)
            ready.write(b"ready")
        except BrokenPipeError:
            service.withdraw("its starter died")
            return 1
        except Exception as error:
            ready.write(f"{type(error).__name__}: {error}".encode())
            raise
    return service.run()


class Service:
    def __init__(self, lease: launch.Lease, fingerprint: str, linger_s: float) -> None:
        self.lease, self.run_dir = lease, lease.run_dir
        self.fingerprint, self.linger_s = fingerprint, linger_s
        self.token = secrets.token_hex(16)
        self.keeps: dict[str, Keep] = {}
        self.job: list[str] = []
        self.local: list[str] = []
        self.disk: dict[str, Any] | None = None
        self.attempt = 0
        self.sequence = 0
        self.allocating: dict[str, int] = {}
        self.quiet = Quiet(self)
        self.departure = Departure(self)
        self.grants = Grants(self)
        self.reshaping = Reshaping(self)
        self.loop = Loop(self._listen(), self.on_message, self.on_closed, self.on_signal)
        self.loop.install_signals()
        self.jobs = ThreadPoolExecutor(4, "job")
        self.hashers = ThreadPoolExecutor(keeper_hashers(), "hash")
        health = DiskHealth(self.loop.set_timer, self.event)
        self.faults = Faults(self.event)
        self.persister = Persister(
            lease, self.loop.call, self.event, self.on_persisted, self.hashers, health, self.faults
        )
        self.inventory = Inventory(self)
        self.watch = Watch(self)
        self.departure.arm()
        self.event("keeper_started", pid=os.getpid())

    def _listen(self) -> socket.socket:
        path = launch.socket_path(self.run_dir)
        path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        mask = os.umask(0o177)
        try:
            listener.bind(str(path))
        finally:
            os.umask(mask)
        listener.listen(128)
        started = launch.process_start_time(os.getpid())
        launch.write_info(
            self.run_dir,
            launch.KeeperInfo(os.getpid(), started, launch.node_id(), str(path), self.fingerprint, self.token, VERSION),
        )
        return listener

    def run(self) -> int:
        self.loop.run()
        self.withdraw(self.departure.reason)
        return 0

    def withdraw(self, reason: str) -> None:
        """Take away the files by which workers find this keeper."""
        # A second starter either finds this keeper whole or, after these lines, finds none.
        if self.lease.holds():
            launch.lock(self.run_dir / "keeper.start", wait=True)
        if self.lease.holds():
            for name in (self.run_dir / "keeper.json", launch.socket_path(self.run_dir)):
                name.unlink(missing_ok=True)
        self.event("keeper_exit", reason=reason)

    def event(self, kind: str, step: int | None = None, attempt: int | None = None, **fields: object) -> None:
        """A row in the run's events, unless the run folder has become another run's; from any thread."""
        if self.lease.holds():
            append_event(self.run_dir, kind, step, self.attempt if attempt is None else attempt, **fields)

    def on_signal(self) -> None:
        self.departure.leave("SIGTERM", persist=self.disk is not None)

    def in_background(self, work: Callable[[], Any], then: Callable[[Future[Any]], None]) -> None:
        """Run ``work`` on a thread, then ``then`` on the loop's."""
        self.jobs.submit(work).add_done_callback(lambda done: self.loop.call(lambda: then(done)))

    # Messages

    def on_message(self, connection: Connection, request: Message, fds: list[int]) -> None:
        operations = {
            "attach": self.attach,
            "inventory": self.inventory.take,
            "reshape": self.reshaping.take,
            "arena": self.inventory.give_arena,
            "acquire": self.grants.acquire,
            "copied": self.copied,
            "discard": self.discard,
            "quiesce": self.quiet.answer,
            "status": self.inventory.status,
            "finish": self.departure.finish,
            "stop": self.departure.stop,
            "retire": self.departure.retire,
        }
        try:
            if not connection.authenticated:
                if not secrets.compare_digest(str(request.get("token", "")), self.token):
                    raise KeeperRefused("wrong token: read keeper.json again")
                connection.authenticated = True
            operations[request["op"]](connection, request, fds)
        except KeeperRefused as error:
            connection.answer(request, refusal(error))
            if isinstance(error, TooLittleMemory):
                self.departure.refused()
        except Exception as error:
            traceback.print_exc()
            connection.answer(request, {"error": f"{type(error).__name__}: {error}"})
        finally:
            # Those that an operation takes over, it takes out of the list.
            for fd in fds:
                os.close(fd)

    def on_closed(self, connection: Connection) -> None:
        self.departure.closed(connection)
        for keep in self.keeps.values():
            if keep.connection is connection:
                self._worker_gone(keep)
                if not keep.finished:
                    self.inventory.verify_ahead()
                self.grants.serve()
                self.departure.arm()
                break

    def _worker_gone(self, keep: Keep) -> None:
        keep.connection = None
        keep.abandon()
        where = self.watch.forget(keep.pid)
        if not keep.finished:
            self.event("worker_gone", pid=keep.pid, coordinate=keep.coordinate, **where)

    # Attaching

    def attach(self, connection: Connection, request: Message, fds: list[int]) -> None:
        self.watch.adopt(request, fds)
        coordinate, shape = request["coordinate"], ArenaShape.from_list(request["shape"])
        check_place(request["disk"])
        if request["attempt"] > self.attempt:
            self.reshaping.undo()
        keep = self.keeps.get(coordinate)
        if keep is not None:
            self._check_same(keep, shape, request, fds)
            self._enter(keep, connection, request, adopted=bool(fds))
            return
        if coordinate in self.allocating:
            raise KeeperRefused(f"{coordinate} is being attached by another process")
        if fds:
            self._enter(self._adopt(coordinate, shape, request, fds), connection, request, adopted=True)
            return
        others = [c for c in request["node_coordinates"] if c not in self.keeps and c not in self.allocating]
        pending = sum(self.allocating.values())
        check_fits(
            pending + shape.nbytes * max(len(others), 1),
            f"checkpointing of {len(others)} workers, {shape} each,",
        )
        self.allocating[coordinate] = shape.nbytes

        def allocated(done: Future[int]) -> None:
            del self.allocating[coordinate]
            problem = done.exception()
            if problem is not None:
                refused = isinstance(problem, KeeperRefused)
                connection.answer(request, refusal(problem) if refused else {"error": str(problem)})
                return
            rules = Rules(**request["rules"])
            self.keeps[coordinate] = Keep(coordinate, Arena(done.result(), shape), rules=rules)
            self._enter(self.keeps[coordinate], connection, request, adopted=False)

        self.in_background(lambda: create_memfd(coordinate, shape.nbytes), allocated)

    def _check_same(self, keep: Keep, shape: ArenaShape, request: Message, fds: list[int]) -> None:
        if keep.shape != shape and not (request["any_shape"] and not fds):
            raise OtherMemory(
                f"{keep.coordinate}: this keeper's memory holds {keep.shape}, the worker wants {shape}; stop the "
                "keeper first (planaria keeper stop RUN)"
            )
        if fds and os.fstat(fds[0]).st_ino != os.fstat(keep.arena.fd).st_ino:
            raise KeeperRefused(f"{keep.coordinate}: this keeper has other memory for it already")
        attached = keep.connection is not None and launch.process_start_time(keep.pid) >= 0
        if attached and keep.pid != request["pid"] and request["attempt"] <= keep.attempt:
            raise KeeperRefused(f"{keep.coordinate} is attached by the living process {keep.pid}")

    def _adopt(self, coordinate: str, shape: ArenaShape, request: Message, fds: list[int]) -> Keep:
        """Memory that a worker brings from a keeper that died. It may be training, so seals' few threads verify it."""
        keep = Keep(coordinate, Arena(fds.pop(0), shape), rules=Rules(**request["rules"]))
        self.keeps[coordinate] = keep
        sealed = keep.scan({int(slot): step for slot, step in request["held"].items()})
        self.sequence = max(self.sequence, *(slot.sequence for slot in keep.slots))
        self.inventory.check(keep, sealed, request["attempt"], lambda: self._due_after_adoption(keep), self.hashers)
        self.event("keeper_adopted", coordinate=coordinate, steps=sorted(keep.steps()))
        return keep

    def _due_after_adoption(self, keep: Keep) -> None:
        """The write that the dead keeper may have left undone."""
        for step in sorted(keep.steps(), reverse=True):
            if self.is_due(step):
                self.persist(step, whole=True)
                break

    def _enter(self, keep: Keep, connection: Connection, request: Message, adopted: bool) -> None:
        if connection.closed:
            return
        if keep.connection is not None and keep.connection is not connection:
            keep.connection.close()
            self._worker_gone(keep)
        elif not adopted:
            keep.abandon()
        keep.connection, keep.pid, keep.attempt = connection, request["pid"], request["attempt"]
        keep.finished = False
        if not request["any_shape"]:
            keep.rules = Rules(**request["rules"])
        keep.tensors, keep.metadata = request["tensors"], request["metadata"]
        keep.partitions = request["partitions"]
        self.attempt = max(self.attempt, keep.attempt)
        self.job, self.local = request["coordinates"], request["node_coordinates"]
        self.disk, self.linger_s = request["disk"], request["linger_s"]
        self.persister.use(self.disk, request.get("disk_fault"))
        self.faults.arm(keep.coordinate, request.get("kill"))
        self.departure.attached()
        slots = [{"kind": s.kind, "state": s.state.name, "step": s.step} for s in keep.slots]
        answer = {"ok": True, "slots": slots, "shape": keep.shape.as_list(), "rules": asdict(keep.rules)}
        connection.answer(request, answer, [keep.arena.fd])

    # Slots

    def keep_of(self, connection: Connection) -> Keep:
        for keep in self.keeps.values():
            if keep.connection is connection:
                return keep
        raise KeeperRefused("attach first")

    def committed(self) -> int:
        """The newest step that every coordinate of the job can restore, as far as this node can tell."""
        if not self.job or any(c not in self.keeps for c in self.job):
            return -1
        return max(set.intersection(*(self.keeps[c].steps() for c in self.job)), default=-1)

    def copied(self, connection: Connection, request: Message, fds: list[int]) -> None:
        keep, step = self.keep_of(connection), request["step"]
        slots = [keep.slots[index] for index in request["slots"]]
        for slot in slots:
            if slot.step != step or slot.state not in (State.WRITING, State.SEALED):
                raise KeeperRefused(
                    f"{keep.coordinate}, slot {slot.index}: {slot.state.name} of step {slot.step}, not {step}"
                )
        # Sealed already: by a keeper that died before it could answer.
        fresh = [slot for slot in slots if slot.state is State.WRITING]
        for slot in fresh:
            slot.state = State.COPIED
        keep.note_for_disk(step, request.get("persist"))

        def work() -> None:
            self.faults.before_seal(step, keep.coordinate)
            for slot in fresh:
                seal(slot.view, self.hashers, sums_of(request, slot.index))

        self.quiet.sealing += 1
        self.in_background(work, lambda done: self._sealed(keep, fresh, connection, request, done))

    def _sealed(self, keep: Keep, slots: list[Slot], connection: Connection, request: Message,
                done: Future[None]) -> None:  # fmt: skip
        step, problem = request["step"], done.exception()
        self.quiet.sealing -= 1
        for slot in slots:
            if problem is None and state_of(slot.view) is State.SEALED:
                keep.sealed(slot)
            else:
                slot.free()
        if problem is not None:
            connection.answer(request, {"error": f"step {step} of {keep.coordinate} was not sealed: {problem}"})
        else:
            self.faults.reached("sealed", step, keep.coordinate)
            connection.answer(request, {"ok": True, "step": step})
            # What an earlier attempt's worker left half sealed must not be written while others recover.
            if keep.attempt == self.attempt:
                self._persist_due(keep, step)
        self.reshaping.settle(self.committed())
        self.grants.serve()
        self.quiet.check()

    def discard(self, connection: Connection, request: Message, fds: list[int]) -> None:
        keep = self.keep_of(connection)
        # What was not restored from is of no use: left in place, it would hold memory that new captures need.
        keep.discard(request["after_step"] if request["from_memory"] else -1)
        self.persister.discard(request["after_step"])
        connection.answer(request, {"ok": True, "newest": keep.newest()})
        self.grants.serve()

    # Disk

    def is_due(self, step: int) -> bool:
        every = (self.disk or {}).get("every", 0)
        due = bool(every) and step > 0 and step % every == 0 and not self.departure.reason
        return due and self.persister.health.ready(step)

    def _persist_due(self, keep: Keep, sealed: int) -> None:
        """Write a due step that is complete now. In mode ``pec`` older experts may be sealed after its own records."""
        for step in keep.unwritten() if keep.rules.lossy else [sealed]:
            if not self.is_due(step):
                keep.for_disk.pop(step, None)
            elif self.persist(step, whole=True):
                for other in self.keeps.values():
                    other.asked(step)
                return

    def persist(self, step: int, whole: bool = False) -> bool:
        """Write a step if the whole job can restore it from here (``whole``: without a log) and it is not under way.
        Returns whether it will be."""
        keeps = [self.keeps.get(c) for c in self.job]
        if not keeps or self.persister.knows(step) or any(k is None or step not in k.steps() for k in keeps):
            return False
        held = [keep for keep in keeps if keep is not None]
        if whole and not all(keep.is_whole(step) for keep in held):
            return False
        tensors: Message = {}
        metadata: Message = {}
        for keep in sorted(held, key=lambda k: k.coordinate, reverse=True):
            tensors |= keep.tensors
            metadata |= keep.metadata
        slots = {keep.coordinate: keep.of_step(step) for keep in held}
        disk = self.disk or {}
        keep_last, permanent_every = disk.get("keep_last", 2), disk.get("permanent_every", 0)
        metadata |= {"recipe": self.fingerprint, "attempt": self.attempt}
        if permanent_every and step % permanent_every == 0:
            metadata["permanent"] = True
        partitions = {keep.coordinate: keep.partitions for keep in held if keep.partitions}
        experts = {keep.coordinate: keep.selection(step, whole) for keep in held if keep.rules.lossy}
        metadata |= {"lossy": True} if experts else {}
        self.persister.submit(
            Persist(step, self.attempt, slots, tensors, metadata, keep_last, permanent_every, partitions, experts)
        )
        return True

    def persist_newest(self) -> int:
        self.reshaping.undo()
        common = [self.keeps[c].steps() for c in self.job if c in self.keeps]
        steps = set.intersection(*common) if len(common) == len(self.job) and common else set()
        if steps:
            self.persist(max(steps))
        return max(steps, default=-1)

    def on_persisted(self, job: Persist, problem: str) -> None:
        self.reshaping.sweep()
        self.grants.serve()
        self.departure.written(job.step, problem)
        self.quiet.check()
        self.departure.when_idle()
