"""The cases of the drill matrix, and how they share runs (no torch here).

A run of a small recipe takes seconds, most of them to start its workers. So one run is killed again and again, once or
twice in each of its attempts; each kill is a case with a verdict of its own.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from checkpointing.keeper.faults import POINTS as KEEPER_POINTS
from trainer.faults import VICTIMS, WORKER_POINTS, Attempts, KillSpec
from trainer.schema import Recipe

MATRIX_STEPS = 32
DISK_EVERY = 4
_SPACING = 3  # steps from one kill to the next, so that something was done in between
_ON_DISK = ("disk", "rename")
_FIRST_SAFE = 2 * DISK_EVERY + 1  # from here on there is something to recover from, whoever is killed


@dataclass(frozen=True)
class Case:
    """One thing to survive.

    Attributes:
        kind: ``kill``; ``flip`` (a kill, and a bit of what it leaves is flipped, in ``where``); ``opening`` (a kill
            that another case needs before it); else the scenario.
        where: ``memory`` or ``disk`` for a flip.
    """

    kind: str
    ranks: int
    at: str = ""
    rank: int = 0
    who: str = ""
    where: str = ""
    number: int = 0

    @property
    def name(self) -> str:
        """Unique, and good for a file's name: ``2.kill.optimizer.rank1.both``."""
        if self.kind == "kill":
            return f"{self.ranks}.kill.{self.at}.rank{self.rank}.{self.who}"
        if self.kind == "flip":
            return f"{self.ranks}.flip.{self.where}.{self.number:02d}"
        return f"{self.ranks}.{self.kind}"

    @property
    def in_keeper(self) -> bool:
        return self.at in KEEPER_POINTS

    @property
    def ends_attempt(self) -> bool:
        return self.who != "keeper"


@dataclass(frozen=True)
class Strike:
    """A case, and the kill that stands for it in its run."""

    case: Case
    kill: KillSpec


@dataclass(frozen=True)
class PlannedRun:
    """One run of the recipe: what is done to each of its attempts, in order."""

    name: str
    ranks: int
    attempts: tuple[tuple[Strike, ...], ...]

    @property
    def kills(self) -> Attempts:
        return tuple(tuple(strike.kill for strike in strikes) for strikes in self.attempts)


# Cases

SCENARIOS = (
    "truncated-file", "missing-file", "swapped-files", "stale-latest", "empty-latest", "full-disk", "slow-disk",
    "hung-disk", "too-large-for-machine", "too-large-for-cgroup", "sigterm", "sigstop",
)  # fmt: skip
_FEWER_POINTS = (
    "forward",
    "alltoall",
    "optimizer",
    "capture",
    "copied",
    "recovery",
    "seal",
    "between",
    "disk",
    "rename",
)
_REDUCED = (
    ("alltoall", 1, "worker"), ("optimizer", 0, "both"), ("copied", 1, "worker"), ("recovery", 0, "worker"),
    ("between", 1, "worker"), ("sealed", 0, "keeper"), ("rename", 1, "both"),
)  # fmt: skip


def all_cases(ranks: Sequence[int], expert_parallel: bool = True) -> list[Case]:
    """The whole matrix: everything at the first of ``ranks``, a choice of kills at the others."""
    cases: list[Case] = []
    for index, count in enumerate(ranks):
        if index:
            cases += [c for c in kill_cases(count, _FEWER_POINTS) if c.rank in (1, count - 1) and _is_chosen(c)]
            continue
        cases += kill_cases(count, (*WORKER_POINTS, *KEEPER_POINTS))
        cases += [Case("flip", count, "forward", i % count, "worker", "memory", i) for i in range(12)]
        cases += [Case("flip", count, "forward", i % count, "both", "disk", i) for i in range(8)]
        cases += [Case(name, count) for name in SCENARIOS]
    needs_others = [c for c in cases if c.ranks == 1 and (c.at == "between" or c.kind == "swapped-files")]
    needs_experts = [c for c in cases if c.at == "alltoall" and not expert_parallel]
    return [c for c in cases if c not in needs_others and c not in needs_experts]


def kill_cases(ranks: int, points: Iterable[str]) -> list[Case]:
    return [Case("kill", ranks, at, rank, who) for at in points for rank in range(ranks) for who in VICTIMS]


def _is_chosen(case: Case) -> bool:
    """With more ranks: each point on one rank, the keeper too where records are half done."""
    first = case.rank == 1
    return (first and case.who == "worker") or (not first and case.who == "both" and case.at in ("optimizer", "disk"))


def reduced_cases(ranks: int) -> list[Case]:
    """What a test run has time for."""
    kills = [Case("kill", ranks, at, rank % ranks, who) for at, rank, who in _REDUCED]
    return [*kills, Case("flip", ranks, "forward", 0, "worker", "memory", 0),
            Case("flip", ranks, "forward", ranks - 1, "both", "disk", 0)]  # fmt: skip


def matching(cases: Iterable[Case], pattern: str) -> list[Case]:
    """Those whose name matches one of the shell patterns, separated by commas, or holds it as it is."""
    parts = pattern.split(",")
    return [case for case in cases if any(fnmatch.fnmatch(case.name, part) or part in case.name for part in parts)]


# Runs


def settings(recipe: Recipe, ranks: int) -> list[str]:
    """What the matrix changes in a recipe: short, on disk every few steps, its batch spread over ``ranks``."""
    train = recipe.train
    ep = recipe.parallel.ep if ranks % recipe.parallel.ep == 0 else 1
    changed = [
        f"train.steps={max(MATRIX_STEPS, train.warmup_steps + 2)}",
        f"checkpoint.disk.every={DISK_EVERY}",
        f"parallel.workers={ranks}",
        f"parallel.ep={ep}",
    ]
    if ranks != recipe.parallel.workers:
        # At least two micro-batches for each worker, so that gradients accumulate.
        batch = max(train.global_batch_size, 2 * ranks)
        batch -= batch % (2 * ranks)
        changed += [f"train.global_batch_size={batch}", f"train.micro_batch_size={batch // (2 * ranks)}"]
    return changed


def planned_runs(cases: Iterable[Case], steps: int, longest: int = 14) -> list[PlannedRun]:
    """Kills and flips of one count of ranks, packed into runs of at most ``longest`` attempts. A flip has a run alone:
    it may cost an attempt of its own.

    An attempt has at most one kill of the keeper alone, and then one that ends it. The keeper's own failpoints are told
    to the first keeper of an attempt only, so a kill of the keeper is never followed by one of them.
    """
    cases = list(cases)
    runs: list[PlannedRun] = []
    for flips in (False, True):
        for ranks in dict.fromkeys(case.ranks for case in cases):
            mine = [case for case in cases if case.ranks == ranks and (case.kind == "flip") == flips]
            packing = _Packing(steps, 1, 3 * DISK_EVERY + 1) if flips else _Packing(steps, longest)
            for attempt in _attempts(mine):
                packing.add(attempt)
            word = "flips" if flips else "kills"
            runs += [PlannedRun(f"{word}{ranks}-{i}", ranks, run) for i, run in enumerate(packing.finish(), 1)]
    return runs


def _attempts(cases: Sequence[Case]) -> list[list[Case]]:
    """What is done to each attempt. The first is never a kill during recovery, unless there is nothing else."""
    fatal = [c for c in cases if c.ends_attempt]
    quiet = [c for c in cases if not c.ends_attempt]
    fatal.sort(key=lambda c: c.at == "recovery")  # stable
    attempts = []
    for case in fatal:
        before = [] if case.in_keeper or case.at == "recovery" or not quiet else [quiet.pop(0)]
        attempts.append([*before, case])
    return [*attempts, *([case] for case in quiet)]


class _Packing:
    """Fills runs with attempts, giving each kill its step."""

    def __init__(self, steps: int, longest: int, first: int = _SPACING) -> None:
        self._steps, self._longest, self._first = steps, longest, first
        self._runs: list[tuple[tuple[Strike, ...], ...]] = []
        self._run: list[tuple[Strike, ...]] = []
        self._next = first

    def add(self, cases: Sequence[Case]) -> None:
        if self._place(cases) is None or len(self._run) >= self._longest:
            self._close()
        if cases[0].at == "recovery" and (not self._run or self._next <= _FIRST_SAFE):
            self._next = max(self._next, _FIRST_SAFE)
            self._append([Case("opening", cases[0].ranks, "forward", 0, "worker")])
        self._append(cases)
        if not cases[-1].ends_attempt:
            self._close()  # nothing starts the workers again

    def _append(self, cases: Sequence[Case]) -> None:
        placed = self._place(cases)
        assert placed is not None, "the recipe has too few steps for one attempt"
        strikes, self._next = placed
        self._run.append(strikes)

    def _place(self, cases: Sequence[Case]) -> tuple[tuple[Strike, ...], int] | None:
        at, strikes = self._next, []
        for case in cases:
            if case.at in _ON_DISK:
                at = -(-at // DISK_EVERY) * DISK_EVERY
            step = 1 if case.at == "recovery" else at
            strikes.append(Strike(case, KillSpec(case.rank, step, case.at, case.who)))
            at += DISK_EVERY if case.at in _ON_DISK else 0 if case.at == "recovery" else _SPACING
        return (tuple(strikes), at) if at <= self._steps - 1 else None

    def _close(self) -> None:
        if self._run:
            self._runs.append(tuple(self._run))
        self._run, self._next = [], self._first

    def finish(self) -> list[tuple[tuple[Strike, ...], ...]]:
        self._close()
        return self._runs
