"""Ten thousand single bits flipped in slots and files, each followed by a recovery: none may reach restored state.

The state is captured once, by a real keeper. Then everything happens here: what the keeper would find, report and
quarantine, what each rank would plan and load. Work that cannot differ is shared: records that were not touched are not
verified again, and two recoveries from the same records load the same bytes.
"""

from __future__ import annotations

import os
import random
import shutil
from collections import Counter
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from checkpointing.keeper.arenas import Keep
from checkpointing.keeper.client import KeeperClient
from checkpointing.keeper.inventory import Inventory
from checkpointing.records import PAGE, State, read_header, state_of
from checkpointing.recover import Recovery
from checkpointing.recovery import RecoveryError, plan_recovery
from checkpointing.schedule import Rules, restorable_steps
from checkpointing.slots import Arena
from checkpointing.store import MANIFEST, list_checkpoints

pytestmark = [pytest.mark.drill, pytest.mark.slow]

IN_SLOTS, AFTER_THE_REPORT, IN_FILES, ADOPTED = 5000, 500, 3000, 1500
ROTATION, LAST, EVERY = 3, 13, 4
HEADER_BYTES, STATE_WORD = 88, 80


@dataclass
class Keeper:
    """A keeper's inventory over memory of this process, without its loop."""

    keeps: dict[str, Keep]
    inventory: Inventory = field(init=False)
    quarantined: list[tuple[str, int]] = field(default_factory=list)
    answered: dict = field(default_factory=dict)

    def __post_init__(self):
        service = SimpleNamespace(
            keeps=self.keeps, attempt=1, hashers=None, event=self._event, in_background=self._at_once,
            quiet=SimpleNamespace(then=lambda function, writes=True: function()),
            grants=SimpleNamespace(serve=lambda: None), persister=SimpleNamespace(newest=-1),
        )  # fmt: skip
        self.inventory = Inventory(service)

    def _event(self, kind, step, **fields):
        self.quarantined.append((fields["coordinate"], fields["slot"]))

    def _at_once(self, work, then):
        done = Future()
        try:
            done.set_result(work())
        except Exception as error:
            done.set_exception(error)
        then(done)

    # What a worker's client would say to it

    def _ask(self, message):
        if message["op"] == "inventory":
            connection = SimpleNamespace(answer=lambda request, fields: self.answered.update(fields))
            self.inventory.take(connection, message, [])
        return self.answered

    def client(self):
        client = SimpleNamespace(_ask=self._ask, quiesce=lambda: None, disk_step=-1, arena_of=self._arena_of,
                                 discard=lambda step, from_memory: None,
                                 rules=next(iter(self.keeps.values())).rules)  # fmt: skip
        client.inventory = lambda: KeeperClient.inventory(client)
        return client

    def _arena_of(self, coordinate):
        arena = self.keeps[coordinate].arena
        return SimpleNamespace(slots=arena.slots, close=lambda: None)

    def already_verified(self, besides=None):
        """All sealed records but one are known to be whole, and so are their tables."""
        self.inventory._verified.clear()
        for name, keep in self.keeps.items():
            for slot in keep.slots:
                if slot.sealed and (name, slot.index) != besides:
                    self.inventory._verified[name, slot.index] = (slot.sequence, 0)


@dataclass
class Lab:
    """What a job left in memory and on disk, and what each step's state was."""

    job: object
    keeper: Keeper
    checkpoints: Path
    empty: Path
    loads: dict = field(default_factory=dict)

    @property
    def records(self):
        """(coordinate, index, view) of every slot."""
        return [(name, slot.index, slot.view) for name, keep in self.keeper.keeps.items() for slot in keep.slots]

    def recovery(self, rank, folder, keeper=None):
        client = keeper.client() if keeper is not None else None
        return Recovery(client, folder, self.job.target(rank))

    def load(self, ranks, plan, key):
        """Whether the plan gives its step's state, on every rank; ``key`` names all that it reads."""
        if key not in self.loads:
            self.job.wipe()
            extras = [rank.apply(plan) for rank in ranks]
            told = [e["rng"] == f"rank {rank} step {plan.step}".encode() for rank, e in enumerate(extras)]
            self.loads[key] = all(told) and self.job.state() == self.job.history[plan.step]
        return self.loads[key]


@pytest.fixture
def lab(make_wal_job, run_dir, wait_until, tmp_path):
    checkpoints = run_dir / "checkpoints"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # partitions are small
    job = make_wal_job(rotation=ROTATION, disk={"every": EVERY, "keep_last": 2}, whole=range(0, LAST, EVERY))
    for step in range(1, LAST + 1):
        job.run(step)
        wait_until(lambda due=step: due % EVERY or due in [found for found, _ in list_checkpoints(checkpoints)])
    # The last thing done about a checkpoint is to remove an older one's folder.
    kept = {f"step-{LAST // EVERY * EVERY - behind}" for behind in (0, EVERY)}
    wait_until(lambda: {folder.name for folder in checkpoints.glob("step-*")} == kept)
    keeps = {}
    for name, client in zip(job.names, job.clients, strict=True):
        fd = os.memfd_create("flips", os.MFD_CLOEXEC)
        os.write(fd, client.arena.memory)
        keeps[name] = Keep(name, Arena(fd, client.arena.shape), rules=Rules(ROTATION))
        keeps[name].scan({})
    empty = tmp_path / "empty"
    empty.mkdir()
    shutil.copytree(run_dir, tmp_path / "disk", ignore=shutil.ignore_patterns("keeper*"))
    yield Lab(job, Keeper(keeps), tmp_path / "disk" / "checkpoints", empty)
    torch.set_num_threads(threads)
    for keep in keeps.values():
        keep.arena.close()


def regions_of(view):
    """Name -> byte ranges: what a record's checksum covers, the checksum and state word, and what nobody reads."""
    if state_of(view) is not State.SEALED:
        return {"free": (0, len(view))}
    header = read_header(view)
    table, payload = PAGE + header.table_bytes, header.payload_offset + header.payload_bytes
    regions = {
        "fields": (0, 64), "checksum": (64, STATE_WORD), "state": (STATE_WORD, HEADER_BYTES),
        "after the header": (HEADER_BYTES, PAGE), "table": (PAGE, table),
        "after the table": (table, header.payload_offset), "payload": (header.payload_offset, payload),
        "after the payload": (payload, len(view)),
    }  # fmt: skip
    return {name: span for name, span in regions.items() if span[0] < span[1]}


def expected_step(keeper, without=None):
    """By the rules alone: the newest step that every rank can restore when one record is missing."""
    steps = []
    for name, keep in keeper.keeps.items():
        held = [s.held for s in keep.slots if s.sealed and (name, s.index) != without]
        steps.append(restorable_steps(held, Rules(ROTATION)))
    return max(set.intersection(*steps), default=-1)


def flip(view, choice, spans):
    harmless = choice.random() < 0.15
    region = choice.choice([name for name in spans if (name in HARMLESS) == harmless] or sorted(spans))
    at, bit = choice.randrange(*spans[region]), 1 << choice.randrange(8)
    view[at] ^= bit
    return region, at, bit


def restore_slot(slot, at, bit, before):
    """Undo a flip, and what the keeper made of it."""
    slot.view[:HEADER_BYTES] = before
    if at >= HEADER_BYTES:
        slot.view[at] ^= bit


HARMLESS = ("after the header", "after the table", "after the payload", "free")


def test_bits_flipped_in_memory(lab):
    choice, seen = random.Random(1), Counter()
    keeper = lab.keeper
    known = [(s, s.state, s.step, s.parts, s.sequence) for keep in keeper.keeps.values() for s in keep.slots]
    for _ in range(IN_SLOTS):
        name, index, view = choice.choice(lab.records)
        slot, before = keeper.keeps[name].slots[index], bytes(view[:HEADER_BYTES])
        wanted = expected_step(keeper, (name, index))
        region, at, bit = flip(view, choice, regions_of(view))
        keeper.already_verified(besides=(name, index))
        ranks = [lab.recovery(rank, lab.empty, keeper) for rank in range(2)]
        plan = plan_recovery([rank.report() for rank in ranks])
        where = f"{name}, slot {index}, {region}, byte {at}"
        if region in HARMLESS:
            assert not keeper.quarantined, where
            assert plan.step == LAST, where
            assert lab.load(ranks, plan, (where, bit)), where
        else:
            assert keeper.quarantined == [(name, index)], where
            assert (plan.step, plan.tier if wanted >= 0 else "fresh") == (wanted, plan.tier), where
            assert plan.step < 0 or lab.load(ranks, plan, (name, index)), where
        seen[region if region in HARMLESS else f"{region}, step {plan.step} restored"] += 1
        restore_slot(slot, at, bit, before)
        keeper.quarantined.clear()
        for known_slot, *facts in known:
            known_slot.state, known_slot.step, known_slot.parts, known_slot.sequence = facts
    print(f"\nin memory: {sum(seen.values())} flips: {dict(sorted(seen.items()))}")


def test_bits_flipped_before_another_keeper_adopts_the_memory(lab):
    """The state words and headers are all that the new keeper knows."""
    choice, seen = random.Random(2), Counter()
    for _ in range(ADOPTED):
        name, index, view = choice.choice(lab.records)
        before = bytes(view[:HEADER_BYTES])
        wanted = expected_step(lab.keeper, (name, index))
        spans = regions_of(view)
        region, at, bit = flip(view, choice, spans)
        keeps = {n: Keep(n, k.arena, rules=k.rules) for n, k in lab.keeper.keeps.items()}
        for keep in keeps.values():
            keep.scan({})
        keeper = Keeper(keeps)
        keeper.inventory._sound = lab.keeper.inventory._sound
        keeper.already_verified(besides=(name, index))
        ranks = [lab.recovery(rank, lab.empty, keeper) for rank in range(2)]
        plan = plan_recovery([rank.report() for rank in ranks])
        where = f"{name}, slot {index}, {region}, byte {at}"
        if region in HARMLESS:
            assert plan.step == LAST, where
            assert lab.load(ranks, plan, (where, bit)), where
        else:
            assert not keeps[name].slots[index].sealed, where
            assert plan.step == wanted, where
            assert plan.step < 0 or lab.load(ranks, plan, (name, index)), where
        seen["harmless" if region in HARMLESS else "detected"] += 1
        restore_slot(lab.keeper.keeps[name].slots[index], at, bit, before)
    print(f"\nbefore an adoption: {sum(seen.values())} flips: {dict(sorted(seen.items()))}")


def test_bits_flipped_after_the_report_are_not_loaded(lab):
    """Between the keeper's check and the copy: the load itself must refuse, unless it does not read the record."""
    choice, seen = random.Random(3), Counter()
    keeper = lab.keeper
    keeper.already_verified()
    for _ in range(AFTER_THE_REPORT):
        ranks = [lab.recovery(rank, lab.empty, keeper) for rank in range(2)]
        plan = plan_recovery([rank.report() for rank in ranks])
        name, index, view = choice.choice(lab.records)
        region, at, bit = flip(view, choice, regions_of(view))
        where = f"{name}, slot {index}, {region}, byte {at}"
        try:
            assert lab.load(ranks, plan, (where, bit, "late")), where
            assert region in HARMLESS or index not in [s.index for s in keeper.keeps[name].of_step(LAST)], where
            seen["not read"] += 1
        except RecoveryError:
            assert region not in HARMLESS, where
            seen["refused"] += 1
        view[at] ^= bit
    assert seen["refused"] > AFTER_THE_REPORT // 10
    print(f"\nafter the report: {sum(seen.values())} flips: {dict(sorted(seen.items()))}")


def test_bits_flipped_on_disk(lab):
    """In the newest checkpoint the older one is used; in the only one, none."""
    choice, seen = random.Random(4), Counter()
    steps = {8: lab.checkpoints / "step-8", 12: lab.checkpoints / "step-12"}
    away = lab.empty / "away"
    contents = {file: file.read_bytes() for path in steps.values() for file in path.iterdir()}
    files = sorted(contents)
    for _ in range(IN_FILES):
        file = choice.choice(files)
        blob = bytearray(contents[file])
        # Half of the flips of a large file go where its header is.
        at = choice.randrange(min(1024, len(blob)) if choice.random() < 0.5 else len(blob))
        blob[at] ^= 1 << choice.randrange(8)
        alone = file.parent == steps[8]
        if alone:
            steps[12].rename(away)
        file.write_bytes(blob)
        ranks = [lab.recovery(rank, lab.checkpoints.parent) for rank in range(2)]
        plan = plan_recovery([rank.report() for rank in ranks])
        where = f"{file.relative_to(lab.checkpoints)}, byte {at}"
        used = file.parent.exists() and plan.step == int(file.parent.name.removeprefix("step-"))
        if used:  # the same values in other letters, e.g. 1e-5 and 1E-5
            assert file.name == MANIFEST, where
            assert lab.load(ranks, plan, where), where
        else:
            assert (plan.step, plan.tier) == ((-1, "fresh") if alone else (8, "disk")), where
            assert alone or lab.load(ranks, plan, "step 8 on disk"), where
        seen[f"{'harmless in' if used else 'detected in'} {file.suffix.removeprefix('.')}"] += 1
        for moved in lab.checkpoints.glob("*.corrupt*"):
            moved.rename(file.parent)
        file.write_bytes(contents[file])
        if alone:
            away.rename(steps[12])
    print(f"\non disk: {sum(seen.values())} flips: {dict(sorted(seen.items()))}")
